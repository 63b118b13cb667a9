"""Compares the server with others under load, and says which targets are met.

    python benchmarks/bench.py [--models tiny,mlp] [--connections 1,64] [--protocols http,grpc]
                               [--rounds 3] [--seconds 1.2] [--manta serve,direct,direct:2]
                               [--peers 1 | --peers triton,kserve] [--manta-args "--flag=value"]
                               [--runtimes] [--scale]

Keeps what it has measured and goes on from there; `--fresh` begins anew. `make bench` calls it;
how it measures and what the columns mean stands in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import load, matrix, models, plots, report, scale, servers
from benchmarks.contestants import Baseline, Contestant, Manta, Stage
from benchmarks.load import LoadError, Timing
from benchmarks.models import MODELS, Model
from benchmarks.peers import PEERS
from benchmarks.runtimes import RUNTIMES
from benchmarks.servers import ServerError
from benchmarks.stand import Plan, say
from benchmarks.store import Store
from benchmarks.targets import DELAY_US

ROOT = Path(__file__).resolve().parents[1]
OUR_CODE = ("configs", "deployments", "cluster")
PICK_CONNECTIONS, PICK_SECONDS = 32, 1.0


# --- options -------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def numbers(text: str) -> list[int]:
    return [int(word) for word in words(text)]


def names_of(known: Sequence[str], text: str) -> list[str]:
    """A subset by name; "1" or "all" is all of them, "0" none."""
    if text in ("1", "all"):
        return list(known)
    chosen = [] if text == "0" else words(text)
    if unknown := set(chosen) - set(known):
        raise argparse.ArgumentTypeError(
            f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}"
        )
    return chosen


MODE = re.compile(
    r"(serve|direct)(?::([1-9]|1[0-6]))?(?:\+(fp32|bf16|fp16)|@(" + "|".join(RUNTIMES) + "))?"
)
DEFAULTS: dict[str, Any] = {
    "manta": ["serve", "direct"],
    "models": list(MODELS),
    "protocols": ["http", "grpc"],
}
# One row for each runtime.
RUNTIME_DEFAULTS: dict[str, Any] = {
    "manta": [f"direct@{name}" for name in RUNTIMES],
    "models": ["mlp"],
    "connections": [1, 64],
    "protocols": ["http"],
}


def manta_mode(word: str) -> tuple[str, int, str, str]:
    """`direct:2+bf16`: direct batching, two Routers, what `manta optimize` makes of the model;
    `direct@aoti`: the same network as an AOT Inductor package."""
    found = MODE.fullmatch(word)
    if found is None:
        raise argparse.ArgumentTypeError(f"no such mode: {word}")
    batching, routers, precision, runtime = found.groups()
    return batching, int(routers or 1), precision or "", runtime or ""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Manta and other servers under the same load.")
    add = parser.add_argument
    add("--models", type=lambda text: names_of(list(MODELS), text), help="by default all")
    add("--connections", type=numbers, default=None, help="by default what suits the model")
    add("--protocols", type=lambda text: names_of(("http", "grpc"), text), help="by default both")
    add("--rounds", type=int, default=3)
    add("--seconds", type=float, default=1.2, help="of one run; slow models get more")
    add("--delays", type=numbers, default=None, help="queue delays in us, for all models")
    add("--manta", type=words, help="serve, direct:2, serve+bf16, direct@aoti")
    add("--runtimes", action="store_true", help="only the last part: one network, each runtime")
    add("--scale", action="store_true", help="1, 2 and 4 Routers by 1 and 2 replicas of a model")
    add("--manta-args", type=shlex.split, default=[], help="more flags for manta serve")
    add("--peers", type=lambda text: names_of(list(PEERS), text), default=[])
    add("--idle", choices=("freeze", "run", "stop"), default="freeze")
    add("--fresh", action="store_true", help="forget what was measured before")
    add("--keep", action="store_true", help="also show what was measured with other code")
    add("--report-only", action="store_true", help="measure nothing, write the report anew")
    add("--output", type=Path, default=ROOT / "benchmarks" / "out")
    options = parser.parse_args(arguments)
    subset = any(getattr(options, name) is not None for name in RUNTIME_DEFAULTS)
    options.whole = not (subset or options.runtimes or options.scale)
    if options.scale and (options.runtimes or options.peers):
        parser.error("--scale goes with neither --runtimes nor --peers")
    for name, value in defaults_of(options).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if not 0 < options.seconds <= 60 or not 1 <= options.rounds <= 20:
        parser.error("--seconds must lie in (0, 60], --rounds in 1 to 20")
    if not all(1 <= count <= 1024 for count in options.connections or ()):
        parser.error("--connections must lie in 1 to 1024")
    try:
        options.manta = [manta_mode(word) for word in options.manta]
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    if options.scale and any(mode[1:] != (1, "", "") for mode in options.manta):
        parser.error("--scale takes --manta=serve, direct or both, and adds the Routers")
    return options


def defaults_of(options: argparse.Namespace) -> Mapping[str, Any]:
    if options.scale:
        return scale.DEFAULTS
    return RUNTIME_DEFAULTS if options.runtimes else DEFAULTS


def parts_of(options: argparse.Namespace) -> list[argparse.Namespace]:
    """The matrix and, where no part of it was asked for, one network in each runtime."""
    if not options.whole:
        return [options]
    modes = [manta_mode(word) for word in RUNTIME_DEFAULTS["manta"]]
    changed = RUNTIME_DEFAULTS | {"manta": modes, "peers": []}
    return [options, argparse.Namespace(**(vars(options) | changed))]


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What a figure depends on, besides its key: another value makes it another figure."""
    digest = hashlib.sha256()
    for folder in OUR_CODE:
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return {
        "seconds": options.seconds,
        "idle": options.idle,
        "manta_args": shlex.join(options.manta_args),
        "code": "any" if options.keep else digest.hexdigest()[:12],
    }


# --- who and what --------------------------------------------------------------------------------


def stages_of(options: argparse.Namespace, model: Model) -> list[tuple[int, list[int]]]:
    """(queue delay, connections); one connection also without delay where a call is short."""
    connections = options.connections or list(model.connections)
    if not model.batched:
        return [(0, connections)]
    if options.delays is not None:
        return [(delay_us, connections) for delay_us in options.delays]
    stages = [(DELAY_US, connections)]
    if model.quick and 1 in connections:
        stages.append((0, [1]))
    return stages


def pick_executor(stage: Stage, folder: Path) -> str:
    """Where the baseline runs the model: whichever is faster, each measured twice in turn."""
    best: dict[str, float] = {"loop": 0.0, "pool": 0.0}
    request = Baseline().request(stage, "http")
    timing = Timing(min(1.0, stage.model.warm_up_s), PICK_SECONDS)
    for executor in ("loop", "pool", "pool", "loop"):
        launch = Baseline(executor).launch(stage, folder)
        with servers.running("fastapi", launch, folder / "fastapi.log") as server:
            port = server.launch.ports["http"]
            found = load.run("h2load", port, request, PICK_CONNECTIONS, timing)
            best[executor] = max(best[executor], found.throughput)
    say(f"  fastapi: loop {best['loop']:,.0f}/s, pool {best['pool']:,.0f}/s")
    return max(best, key=lambda executor: best[executor])


def install_peers(options: argparse.Namespace, store: Store) -> list[Contestant]:
    """Those that could be installed; the others get their reason."""
    found: list[Contestant] = []
    for name in options.peers:
        peer = PEERS[name](options.output / "peers")
        try:
            say(f"{name}: installing, unless it is there")
            peer.install()
        except ServerError as error:
            store.problem("installation", name, str(error))
            say(f"{name}: {error}")
            continue
        store.problem("installation", name, None)
        found.append(peer)
    return found


def run(options: argparse.Namespace, store: Store) -> None:
    peers = install_peers(options, store)
    if peers:
        store.note("versions", [peer.version() for peer in peers])
    plan = Plan(tuple(options.protocols), options.rounds, options.seconds, options.idle)
    for name in options.models:
        model = MODELS[name]
        file = models.build(model, options.output / "models")
        row = model.one_row()
        expected = models.expected(model, file, row)
        for delay_us, connections in stages_of(options, model):
            stage = Stage(model, file, delay_us, row, expected)
            for everyone in line_ups(options, stage, peers, store):
                matrix.run_stage(stage, connections, everyone, plan, store)


def line_ups(
    options: argparse.Namespace, stage: Stage, peers: Sequence[Contestant], store: Store
) -> Iterator[Sequence[Contestant]]:
    """Who is started together. Of combinations those of one mode, or they would fill the memory."""
    name = stage.model.name
    if options.scale:
        for batching in scale.batchings(name, [mode[0] for mode in options.manta]):
            yield scale.contestants(batching, options.manta_args)
        return
    executors: dict[str, str] = store.noted("executors", {})
    if name not in executors:
        executors[name] = pick_executor(stage, options.output)
        store.note("executors", executors)
    ours = [
        Manta(batching, routers, precision, runtime, options.manta_args)
        for batching, routers, precision, runtime in options.manta
    ]
    yield [Baseline(executors[name]), *ours, *peers]


def write_report(options: argparse.Namespace, store: Store) -> None:
    facts = {
        "machine": report.machine(),
        "settings": {"rounds": options.rounds} | store.settings,
        "versions": store.noted("versions", []),
    }
    store.note("machine", facts["machine"])
    sections = scale.section(store, int(facts["machine"]["cores"]))
    page = "\n".join([report.markdown(store, facts), *sections])
    (options.output / "bench.md").write_text(page + "\n")
    print(page)
    try:
        for file in plots.draw(store, options.output):
            say(f"wrote {file}")
    except ImportError as error:
        say(f"no plots: {error}; pip install '.[bench]'")
    if store.hidden:
        say(f"{store.hidden} runs of other settings or other code are not shown")


def terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM unwinds the stack, so that all servers are stopped."""
    sys.exit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, terminate)
    if reason := load.missing():
        print(f"error: {reason}", file=sys.stderr)
        return 1
    options.output = options.output.resolve()
    options.output.mkdir(parents=True, exist_ok=True)
    store = Store(options.output / "bench.json", settings_of(options), options.fresh)
    try:
        if not options.report_only:
            store.note("versions", [])
            for part in parts_of(options):
                run(part, store)
    except (ServerError, LoadError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("interrupted: what was measured is kept")
    write_report(options, store)
    return 0


if __name__ == "__main__":
    sys.exit(main())
