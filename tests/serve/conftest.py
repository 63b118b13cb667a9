"""One real server for most serve tests, with stock clients in front of it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient

from tests.serve import repository
from tests.serve.server import Server, manta_serve

GOOD = ("mlp", "eager_mlp", "seed", "slow", "shared", "picky", "strings", "big")
BROKEN = ("bad_field", "pickled", "bad_name")

HERE = Path(__file__).parent

# A shell starts what runs in its background with SIGINT ignored, and servers would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.serve)


@pytest.fixture(scope="session")
def models_root(tmp_path_factory: pytest.TempPathFactory, seed_package: Path) -> Path:
    return repository.build(tmp_path_factory.mktemp("repository"), seed_package)


@pytest.fixture(scope="session")
def overrides_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the files of load requests are kept."""
    return tmp_path_factory.mktemp("overrides")


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where COMPILE_ON_LOAD keeps what it compiles."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="session")
def server(models_root: Path, compile_cache: Path, overrides_root: Path) -> Iterator[Server]:
    """`manta serve` in explicit mode; ends with SIGTERM and must end well."""
    loads = [f"--load-model={name}" for name in (*GOOD, *BROKEN)]
    flags = ["--model-control-mode=explicit", "--exit-on-error=false", "--strict-readiness=false"]
    flags.append(f"--compile-cache={compile_cache}")
    flags += ["--allow-file-override=true", f"--file-override-directory={overrides_root}"]
    with manta_serve(models_root, *flags, *loads, environment={"CUDA_LAUNCH_BLOCKING": "1"}) as one:
        one.wait_ready()
        yield one
        assert one.stop() == 0, one.output()[-3000:]


@pytest.fixture
def http(server: Server) -> Iterator[httpclient.InferenceServerClient]:
    client = httpclient.InferenceServerClient(server.http, concurrency=16, network_timeout=120)
    yield client
    client.close()


@pytest.fixture
def grpc(server: Server) -> Iterator[grpcclient.InferenceServerClient]:
    client = grpcclient.InferenceServerClient(server.grpc)
    yield client
    client.close()
