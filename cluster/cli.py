"""The `manta` command. `manta serve` runs Ray, Serve and the server in the foreground.

Owns the process: preflight, start, SIGINT and SIGTERM, the order of the end, the exit code. What it
serves is `deployments.app`; `manta check` and `manta optimize` are rooms of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs import grpc_options, grpc_tls, stores
from configs.errors import ConfigError
from configs.server import ServerSettings

from .flags import FlagError, parse, trace_entry, warnings
from .foreground import START_POLL_S, say, show
from .usage import usage

SERVE_ENV = Path(__file__).with_name("serve.env")
# The same stand in serve_config.yaml.
PROXY_SERVICES = (
    "deployments.grpc_stubs.add_GRPCInferenceServiceServicer_to_server",
    "deployments.grpc_stubs.add_health_to_server",
)
# Serve's own bookkeeping on top of the grace that Routers have.
END_MARGIN_S = 30.0
USAGE = """\
usage: manta COMMAND ...

  manta serve --model-repository=PATH ...   serve a model repository
  manta check PATH ...                      validate a repository without serving it
  manta config PATH [--model NAME]          print the completed config.pbtxt of models
  manta optimize PATH --model NAME ...      make a faster version of a model, checked and measured
  manta deploy PATH --dry-run ...           print the manifest for a cluster with KubeRay

manta COMMAND --help tells the options of each."""
HINT = "usage: manta serve [--option=value | --option value] ...; --help lists the options"
# Settings whose folders must be there.
_FOLDERS = ("file_override_directory", "remote_directory")
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 1
    if words[0] == "optimize":
        from .optimize import command

        return command.main(words[1:])
    if words[0] == "check":
        from .check import command as check

        return check.main(words[1:])
    if words[0] == "config":
        from . import configure

        return configure.main(words[1:])
    if words[0] == "deploy":
        from . import deploy

        return deploy.main(words[1:])
    if words[0] != "serve":
        known = "serve, check, config, optimize, deploy"
        print(f"manta: unknown command '{words[0]}'; there are: {known}", file=sys.stderr)
        return 1
    if any(word in ("-h", "--help") for word in words[1:]):
        print(usage())
        return 0
    load_environment()
    try:
        settings = read_settings(words[1:])
        for line in warnings(words[1:]):
            print(f"manta serve: {line}", file=sys.stderr)
    except (FlagError, ConfigError, ValueError) as error:
        print(f"manta serve: {_first_reason(error)}\n{HINT}", file=sys.stderr)
        return 1
    if settings.grpc_lane and settings.allow_grpc and (text := grpc_options.unheard(settings)):
        print(f"manta serve: {text}", file=sys.stderr)
    return serve(settings)


def read_settings(arguments: Sequence[str]) -> ServerSettings:
    """Raises FlagError, ConfigError, CertificateError or pydantic's ValidationError. Paths become
    absolute."""
    settings = ServerSettings(**parse(arguments))
    for path in settings.model_repository:
        if stores.is_remote(path):
            stores.parse(path, os.environ)  # its form; what is there, the Controller sees
        elif not os.path.isdir(path):
            raise FlagError(f"model repository '{os.path.abspath(path)}' is not a directory")
    folders = {name: getattr(settings, name) for name in _FOLDERS}
    for name, folder in folders.items():
        if folder and not os.path.isdir(folder):
            raise FlagError(f"--{name.replace('_', '-')} '{folder}' is not a directory")
    if settings.log_file:
        folders["log_file"] = settings.log_file
        if not os.access(os.path.dirname(os.path.abspath(settings.log_file)), os.W_OK):
            raise FlagError(f"log file '{settings.log_file}' cannot be written there")
    traces = tuple(map(trace_entry, settings.trace_config))
    paths = folders | {name: getattr(settings, name) for name in grpc_tls.FILES}
    absolute = {name: os.path.abspath(path) for name, path in paths.items() if path}
    repositories = tuple(
        path if stores.is_remote(path) else os.path.abspath(path)
        for path in settings.model_repository
    )
    update = {"model_repository": repositories, "trace_config": traces, **absolute}
    settings = settings.model_copy(update=update)
    grpc_tls.certificates(settings)
    return settings


def _first_reason(error: Exception) -> str:
    errors = getattr(error, "errors", None)
    if errors is None:
        return str(error)
    first = errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else str(first["msg"])


def load_environment(path: Path = SERVE_ENV) -> Mapping[str, str]:
    """The throughput profile, where the user has not said otherwise. Before Ray is imported, and
    before the settings are read."""
    pairs = {}
    for line in path.read_text().splitlines():
        name, equals, value = line.strip().partition("=")
        if equals and not name.startswith("#"):
            pairs[name] = os.environ.setdefault(name, value)
    return pairs


class _Signals:
    """SIGINT and SIGTERM set a flag; repeated ones change nothing."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self.asked = False

    def take(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _frame: object) -> None:
        if not self.asked:
            say(self._settings, "shutting down")
        self.asked = True


def serve(settings: ServerSettings) -> int:
    """Runs until a signal; 0 when all accepted requests were answered, 1 when it cannot start.

    Ray's processes belong to a session of their own: a Ctrl-C in the terminal, or a signal to the
    whole process group, would otherwise end them before the requests that they serve.
    """
    from deployments.ports import PortInUse, check_free

    try:
        for edge in ("http", "grpc", "metrics"):
            port = getattr(settings, f"{edge}_port")
            if getattr(settings, f"allow_{edge}") and port:
                check_free(getattr(settings, f"{edge}_address"), port)
    except PortInUse as error:
        print(f"manta serve: {error}", file=sys.stderr)
        return 1
    sys.stdout.flush()
    _adopt_orphans()
    parent = os.getpid()
    child = os.fork()
    if child:
        return _watch_over(child)
    os.setsid()
    _end_with(parent)
    code = 1
    try:
        code = _serve_here(settings)
    except BaseException as error:
        if not isinstance(error, SystemExit):
            traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _watch_over(child: int) -> int:
    """The parent: hands signals on, and ends with the child's code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os.kill(child, signal.SIGTERM))
    while True:
        ended, status = os.waitpid(-1, 0)  # any: as a container's first process it adopts orphans
        if ended == child:
            return os.waitstatus_to_exitcode(status) & 0xFF


def _adopt_orphans() -> None:
    """What outlives its parent stays in this process's tree, and is not lost sight of (Linux only):
    forked replicas, whose server is started by a process that ends at once."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _end_with(parent: int) -> None:
    """A parent that is killed outright must not leave a server behind (Linux only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before we asked to hear of it
        os.kill(os.getpid(), signal.SIGTERM)


def _serve_here(settings: ServerSettings) -> int:
    signals = _Signals(settings)
    signals.take()
    with _fork_server(settings), _ray(settings):
        signals.take()  # Ray has set handlers of its own
        return asyncio.run(_serve(settings, signals))


@contextlib.contextmanager
def _fork_server(settings: ServerSettings) -> Iterator[None]:
    """The fork server of a local Ray, so early that it imports torch while Ray starts. Workers
    start one themselves where there is none or where it does not suit them."""
    from deployments import forkclient

    wanted = settings.fork_server and forkclient.supported()
    if not wanted or os.environ.get("RAY_ADDRESS"):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="manta-") as folder:
        try:
            pid = forkclient.launch(os.path.join(folder, "s"), os.getpid())
        except OSError as error:  # too long a path, say: replicas then start without it
            print(f"manta: no fork server: {error}", file=sys.stderr, flush=True)
            yield
            return
        os.environ[forkclient.FOLDER] = folder
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)  # it holds nothing
                os.waitpid(pid, 0)


@contextlib.contextmanager
def _ray(settings: ServerSettings) -> Any:
    """A local Ray cluster of our own, or the one that RAY_ADDRESS names."""
    import ray

    own = not os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": settings.log_verbose > 1}
    if own:
        gpus = _gpu_count()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        if visible:
            os.environ["MANTA_VISIBLE_DEVICES"] = visible
        options |= {
            "include_dashboard": False,
            "resources": {f"manta_gpu_{index}": 1.0 for index in range(gpus)},
        }
        if gpus:
            options["num_gpus"] = gpus
    ray.init(namespace="serve", **options)
    try:
        yield
    finally:
        ray.shutdown()


def _gpu_count() -> int:
    """Logical GPUs when asked for (tests of placement), else what Ray finds on this machine."""
    logical = os.environ.get("MANTA_LOGICAL_GPU_COUNT")
    if logical:
        return int(logical)
    from ray._private.accelerators import NvidiaGPUAcceleratorManager

    count = int(NvidiaGPUAcceleratorManager.get_current_node_num_accelerators())
    visible = NvidiaGPUAcceleratorManager.get_current_process_visible_accelerator_ids()
    return count if visible is None else min(count, len(visible))


async def _serve(settings: ServerSettings, signals: _Signals) -> int:
    from ray import serve as ray_serve
    from ray.serve.config import HTTPOptions, gRPCOptions

    from deployments.app import APPLICATION, build_app

    by_serve = settings.listener == "serve"
    await asyncio.to_thread(
        ray_serve.start,
        proxy_location="EveryNode" if by_serve else "Disabled",
        http_options=HTTPOptions(host=settings.http_address, port=settings.http_port),
        grpc_options=gRPCOptions(
            port=settings.grpc_port if by_serve and settings.allow_grpc else 0,
            grpc_servicer_functions=list(PROXY_SERVICES) if by_serve else [],
            enable_reflection=grpc_options.reflects(settings),
        ),
    )
    code = 1
    try:
        app = build_app(settings)
        await asyncio.to_thread(ray_serve.run, app, name=APPLICATION, route_prefix="/")
        controller = ray_serve.get_deployment_handle("Controller", APPLICATION)
        code = await show(controller, settings, lambda: signals.asked)
    except RuntimeError as error:
        print(f"manta serve: {error}", file=sys.stderr)
    finally:
        await _end(settings)
    return code


async def _end(settings: ServerSettings) -> None:
    """Routers answer what they have, then Controller and models go."""
    from ray import serve as ray_serve

    from deployments.app import APPLICATION

    with contextlib.suppress(Exception):
        await asyncio.to_thread(ray_serve.delete, APPLICATION, _blocking=False)
        end_s = time.monotonic() + settings.exit_timeout_s + END_MARGIN_S
        while time.monotonic() < end_s:
            status = await asyncio.to_thread(ray_serve.status)
            if APPLICATION not in status.applications:
                break
            await asyncio.sleep(START_POLL_S)
    if not os.environ.get("RAY_ADDRESS"):
        with contextlib.suppress(Exception):
            await asyncio.to_thread(ray_serve.shutdown)


if __name__ == "__main__":
    sys.exit(main())
