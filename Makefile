# Everything here works on a fresh machine with Python 3.10 or newer; the environment is made first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
REPOSITORY ?= examples/model_repository
EXTRAS ?= dev,examples
ARGS ?=

.PHONY: install check test test-unit test-serve test-long serve example bench clean

install: $(VENV)/installed

# torch first and pinned: a looser range would bring gigabytes of CUDA.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: install
	$(BIN)/python -m pytest -m "not long" $(ARGS)

test-unit: install
	$(BIN)/python -m pytest tests/unit $(ARGS)

test-serve: install
	$(BIN)/python -m pytest tests/serve -m "not long" $(ARGS)

test-long: install
	$(BIN)/python -m pytest -m long $(ARGS)

example: $(REPOSITORY)/add_sub/config.pbtxt

$(REPOSITORY)/add_sub/config.pbtxt: | install
	$(BIN)/python examples/build.py --output $(REPOSITORY)

serve: install example
	exec $(BIN)/manta serve --model-repository=$(REPOSITORY) $(ARGS)

bench: install
	$(BIN)/python benchmarks/bench.py $(ARGS)

clean:
	rm -rf $(VENV) $(REPOSITORY) benchmarks/out .pytest_cache .mypy_cache .ruff_cache
