"""`manta check`: the command line, what is printed, and the exit code.

What is wrong with a model is for `verdicts` to say. Imports torch only once the command line is
known to be good, so that --help is quick.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from configs.errors import ConfigError
from deployments.errors import MantaError

GOOD, BAD = 0, 1
# Loading may compile; a model that takes longer than this is taken to hang.
LIMIT_S = 300.0

DESCRIPTION = """\
Validates a model repository without serving it, and prints all that is wrong at once: the
configurations, version policies, files, parameters, labels, the placement of instance groups, what
the archives are, and how the names of each version's tensors fit its model."""
EPILOG = """\
Each version is loaded on this machine as a replica would load it, in a process of its own that
may take --timeout seconds. Loading a model.py, or a model whose archive brings code, runs that
code with your rights: check what you do not trust with --no-load, which only reads.

A line per finding, on standard output: `ok: ...` for a version that is good, `error: FILE:LINE:
FIELD: reason`, `warning: ...` for what has no effect, `note: ...` for what could not be checked.

exit codes: 0 all good; 1 there are errors, or nothing to check; 2 a wrong command line."""


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    try:
        return run(options)
    except (ConfigError, MantaError) as error:
        print(f"manta check: {error}", file=sys.stderr)
        return BAD


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="manta check",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "repositories", type=Path, nargs="+", metavar="PATH", help="a model repository"
    )
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME", help="this model only; repeatable"
    )
    parser.add_argument(
        "--gpus",
        type=_gpus,
        metavar="N",
        help="place as on a machine with so many GPUs (default: as on this one)",
    )
    parser.add_argument(
        "--no-load", action="store_true", help="read only: load no model and run no code of it"
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=LIMIT_S,
        metavar="SECONDS",
        help=f"how long one version may take to load (default: {LIMIT_S:g})",
    )
    return parser.parse_args(arguments)


def _gpus(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 1024:
        raise argparse.ArgumentTypeError(f"{value} must lie in 0 to 1024")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{value} must be greater than 0")
    return value


def run(options: argparse.Namespace) -> int:
    from ..machine import Machine
    from . import trial
    from .verdicts import Verdicts

    roots = [Path(os.path.abspath(path)) for path in options.repositories]
    gpus = trial.gpu_count() if options.gpus is None else options.gpus
    limit_s = None if options.no_load else options.timeout
    verdicts = Verdicts(roots, Machine(gpus), limit_s)
    names = list(dict.fromkeys(options.model)) or verdicts.names()
    counts: Counter[str] = Counter()
    for name in names:
        for finding in verdicts.of_model(name):
            counts[finding.kind] += 1
            print(f"{finding.kind}: {finding.text}", flush=True)
    if not names:
        print(f"error: there is no model in {', '.join(map(str, roots))}")
    print(
        f"{_count(len(names), 'model')}: {_count(counts['ok'], 'good version')}, "
        f"{_count(counts['error'], 'error')}, {_count(counts['warning'], 'warning')}"
    )
    return BAD if counts["error"] or not names else GOOD


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
