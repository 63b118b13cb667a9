"""`manta optimize`: the order of the steps, what is printed, and the exit code.

Imports torch only once the command line is known to be good, so that --help is quick.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from configs.complete import DEFAULT_FILES

from .options import Options
from .target import Destination, OptimizeError, read

if TYPE_CHECKING:
    from .bench import Bench
    from .export import Recipe
    from .judge import Candidate

WRITTEN, FAILED, NOT_BETTER = 0, 1, 3

EPILOG = """\
exit codes: 0 a new version was written, or would be without --dry-run; 1 it cannot be done, and
why; 2 a wrong command line; 3 no candidate is both right and faster: nothing was written.

The new version holds model.pt2 and stands beside the old one: Manta picks the runtime of each
version by the file that it finds there. Triton itself wants one kind of file in all versions of a
model: give --output NAME there, which writes a model of its own with platform torch_aoti.
"""


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    try:
        with _ended_by_signals():
            return run(options)
    except OptimizeError as error:
        print(f"manta optimize: {error}", file=sys.stderr)
        return FAILED


def parse(arguments: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(
        prog="manta optimize",
        description="Makes a faster version of a model, and keeps it only if it answers as the "
        "original does.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("repository", type=Path, metavar="PATH", help="the model repository")
    parser.add_argument("--model", required=True, metavar="NAME", help="the model's directory")
    parser.add_argument("--version", type=int, help="version to start from (default: the newest)")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="what to compute in; inputs and outputs keep their types (default: fp32)",
    )
    parser.add_argument(
        "--tolerance",
        type=_positive,
        help="largest deviation, as a share of an output's largest value "
        "(default: 1e-4 in fp32, 1e-2 in fp16, 5e-2 in bf16)",
    )
    parser.add_argument(
        "--batch-sizes",
        type=_sizes,
        default=(),
        metavar="N,N",
        help="sizes to measure (default: 1, 8 and max_batch_size)",
    )
    parser.add_argument(
        "--threads", type=_count, help="intra-op threads (default: as the model is served here)"
    )
    parser.add_argument(
        "--min-speedup",
        type=_positive,
        default=1.05,
        metavar="X",
        help="gain below which nothing is written, over all sizes (default: 1.05)",
    )
    parser.add_argument(
        "--min-each",
        type=_positive,
        default=0.8,
        metavar="X",
        help="the same for each size by itself: what may be lost at one of them (default: 0.8)",
    )
    parser.add_argument(
        "--samples", type=Path, metavar="FILE.npz", help="real inputs by name, rows first"
    )
    parser.add_argument("--output", metavar="NAME", help="write a new model instead of a version")
    parser.add_argument(
        "--rounds", type=_rounds, default=7, help="measurements of each, 3 or more (default: 7)"
    )
    parser.add_argument("--dry-run", action="store_true", help="judge only, write nothing")
    return Options(**vars(parser.parse_args(arguments)))


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def _rounds(text: str) -> int:
    value = _count(text)
    if value < 3:
        raise argparse.ArgumentTypeError(f"{value} rounds tell nothing: at least 3")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} must be greater than 0")
    return value


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(sorted({_count(part) for part in text.split(",")}))


# --- the steps -----------------------------------------------------------------------------------


def run(
    options: Options, recipes: Callable[[Bench], Sequence[Recipe]] = lambda bench: bench.recipes()
) -> int:
    """Raises OptimizeError for what cannot be done at all. `recipes`: what to try."""
    import torch

    from .bench import Bench

    source = read(
        options.repository, options.model, options.version, has_gpu=torch.cuda.is_available()
    )
    destination = Destination(source, options.output)
    destination.check()
    with destination.workshop() as workshop, _compiler_cache():
        bench = Bench(source, destination, options, workshop)
        print(
            f"{options.model} version {source.version}: {bench.served.label}, {options.precision}, "
            f"intra-op threads: {_threads(bench)}, device: {bench.served.device}",
            flush=True,
        )
        bench.judge(recipes(bench))
        print(table(bench.candidates, bench.sizes), flush=True)
        return _conclude(bench, destination, options, workshop)


def _threads(bench: Bench) -> str:
    original, package = bench.threads(), bench.threads(DEFAULT_FILES["aoti"])
    return str(original) if original == package else f"{original} ({package} for a package)"


def _conclude(bench: Bench, destination: Destination, options: Options, workshop: Path) -> int:
    from .judge import choose

    winner = choose(bench.candidates[1:], options.min_speedup, options.min_each)
    for candidate in bench.candidates[1:]:
        if candidate.refusal:
            print(f"{candidate.label}: not taken: {candidate.refusal}")
    if winner is None:
        print("nothing written: no candidate is both right and faster")
        return NOT_BETTER
    if options.dry_run:
        print(f"nothing written, as asked: {winner.label} would be")
        return WRITTEN
    version = destination.publish(bench.files[winner.label], workshop)
    print(f"written {version}: {winner.label}, {winner.speedup:.2f} times as fast")
    if warning := destination.warning(int(version.name)):
        print(f"warning: {warning}", file=sys.stderr)
    if note := destination.note(int(version.name)):
        print(f"note: {note}")
    return WRITTEN


def table(candidates: Sequence[Candidate], sizes: Sequence[int]) -> str:
    """One line each: the deviation, and per batch size the median time and the gain."""
    heads = [f"batch {size}" if size else "one call" for size in sizes]
    rows = [["candidate", "abs dev", "rel dev", *heads, "gain"]]
    for candidate in candidates:
        found = candidate.deviation
        row = [candidate.label]
        row += ["", ""] if found is None else [f"{found.absolute:.1e}", f"{found.relative:.1e}"]
        for size in sizes:
            times = candidate.milliseconds
            row.append(
                f"{times[size]:.2f} ms {candidate.speedups[size]:.2f}x" if size in times else "-"
            )
        row.append(f"{candidate.speedup:.2f}x" if candidate.speedups else "-")
        rows.append(row)
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


@contextmanager
def _compiler_cache() -> Iterator[None]:
    """Inductor's intermediate files go when the command ends, unless the user keeps a cache."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    if os.environ.get(name):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="manta-optimize-", ignore_cleanup_errors=True) as path:
        os.environ[name] = path
        try:
            yield
        finally:
            del os.environ[name]


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """What ends the command ends it in order, so that nothing half made stays behind."""

    # nohup has SIGHUP ignored, and it stays so.
    taken = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_DFL]

    def end(number: int, _frame: object) -> None:
        for each in taken:  # cleaning up is not to be broken off
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
