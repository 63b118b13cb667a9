"""One real server for most serve tests, with stock clients in front of it.

Files that use it come first; it ends with the last test that does, and only then do the others
start servers of their own: an idle one costs a third of a core.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Generator, Iterator
from pathlib import Path

import psutil
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient

from tests.conftest import OWN_SERVERS
from tests.serve import raw, repository
from tests.serve.clients import infer, rows
from tests.serve.server import START_S, Server, manta_serve, wait_for

GOOD = ("mlp", "eager_mlp", "seed", "slow", "shared", "picky", "strings", "big")
BROKEN = ("bad_field", "pickled", "bad_name")

HERE = Path(__file__).parent

# A shell starts what runs in its background with SIGINT ignored, and servers would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# They share a server as well, which a test of the last one ends.
_PAIR_FILES = (
    "test_placement.py",
    "test_metrics.py",
    "test_logging.py",
    "test_traces_of_routers.py",
    "test_paths.py",
)
_SHARED = pytest.StashKey[Server]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    users = {item.path for item in items if _uses_server(item)}
    confused = {path.name for path in users if f"tests/serve/{path.name}" in OWN_SERVERS}
    if confused:
        raise pytest.UsageError(f"{confused} use the shared server: not for OWN_SERVERS")

    def turn(item: pytest.Item) -> int:
        if HERE not in item.path.parents:
            return -1  # with two workers both do these, and then one does ours
        if item.path in users:
            return 0
        name = item.path.name
        return 1 + _PAIR_FILES.index(name) if name in _PAIR_FILES else 1 + len(_PAIR_FILES)

    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.serve)
    items.sort(key=turn)


def _uses_server(item: pytest.Item) -> bool:
    return "server" in getattr(item, "fixturenames", ())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, None, None]:
    """A server that does not end well is an error of the last test that used it."""
    yield
    if _uses_server(item) and (nextitem is None or not _uses_server(nextitem)):
        items = item.session.items
        if not any(map(_uses_server, items[items.index(item) + 1 :])):
            _end(item.config)


def _end(config: pytest.Config) -> None:
    one = config.stash.get(_SHARED, None)
    if one is not None:
        del config.stash[_SHARED]
        assert one.stop() == 0, one.output()[-3000:]


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
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where servers write what they trace, once a test asks them to."""
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="session")
def server(
    models_root: Path,
    compile_cache: Path,
    overrides_root: Path,
    traces: Path,
    pytestconfig: pytest.Config,
) -> Iterator[Server]:
    """`manta serve` in explicit mode; ends with SIGTERM and must end well."""
    loads = [f"--load-model={name}" for name in (*GOOD, *BROKEN)]
    flags = ["--model-control-mode=explicit", "--exit-on-error=false", "--strict-readiness=false"]
    flags.append(f"--compile-cache={compile_cache}")
    flags.append("--allow-client-shm=true")
    flags.append(f"--trace-config=triton,file={traces / 'server.json'}")
    flags += [f"--{edge}-header-forward-pattern=MY_HEADER|priority" for edge in ("http", "grpc")]
    flags += ["--allow-file-override=true", f"--file-override-directory={overrides_root}"]
    with manta_serve(models_root, *flags, *loads, environment={"CUDA_LAUNCH_BLOCKING": "1"}) as one:
        one.wait_ready()
        pytestconfig.stash[_SHARED] = one
        yield one
        _end(pytestconfig)


@pytest.fixture(scope="session")
def log_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pair below writes its log."""
    return tmp_path_factory.mktemp("log") / "manta.log"


@pytest.fixture(scope="session")
def pair(
    tmp_path_factory: pytest.TempPathFactory, log_path: Path, traces: Path
) -> Iterator[Server]:
    """Two Routers and two logical GPUs, in explicit mode, with a log file and more metrics; `nap`
    has two replicas of one instance each, which take 20 ms a batch. Ended by a test."""
    root = tmp_path_factory.mktemp("pair")
    repository.write_nap(root, "nap", "instance_group [ { kind: KIND_CPU count: 2 } ]\n")
    flags = ["--router-replicas=2", "--logical-gpus=true"]
    flags += ["--model-control-mode=explicit", "--load-model=nap", f"--log-file={log_path}"]
    flags.append(f"--trace-config=triton,file={traces / 'pair.json'}")
    flags += ["--metrics-interval-ms=200", "--metrics-config=summary_latencies=true"]
    flags.append("--metrics-config=summary_quantiles=0.5:0.05,0.99:0.001")
    with manta_serve(root, *flags, environment={"MANTA_LOGICAL_GPU_COUNT": "2"}) as one:
        one.wait_ready()
        wait_for(lambda: len(one.replica_pids("manta:Router")) == 2, START_S, "two Routers")
        yield one


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


@pytest.fixture(scope="module")
def router(server: Server) -> psutil.Process:
    """Its only one."""
    (pid,) = server.replica_pids("manta:Router")
    return psutil.Process(pid)


@pytest.fixture(scope="session")
def slow_clients(server: Server) -> Iterator[list[socket.socket]]:
    """Each has begun a request, in turn its head and its body, and goes no further."""
    begun = (b"POST /v2/models/mlp/infer HTTP/1.1\r\nHost:", raw.head("Content-Length: 9") + b"{")
    clients = [raw.connect(server) for _ in range(8)]
    for number, client in enumerate(clients):
        client.sendall(begun[number % 2])
    yield clients
    for client in clients:
        client.close()


@pytest.fixture
def unharmed(
    server: Server,
    router: psutil.Process,
    slow_clients: list[socket.socket],
    http: httpclient.InferenceServerClient,
    grpc: grpcclient.InferenceServerClient,
) -> Iterator[None]:
    """Afterwards: live, the same answer over both protocols, and no more memory than the
    allocator may keep."""
    before = router.memory_info().rss
    yield
    assert server.live()
    told = [infer(one, "mlp", {"INPUT__0": rows(1, 8)}) for one in (http, grpc)]
    one, other = (reply.as_numpy("OUTPUT__0") for reply in told)
    assert one.shape == (1, 4) and (one == other).all()
    wait_for(lambda: router.memory_info().rss < before + (64 << 20), 60, "memory is given back")
