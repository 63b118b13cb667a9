"""`manta config`: prints the completed config.pbtxt of models without serving them.

Owns the command line and what is printed; the configuration comes from the very steps that the
Controller and its replicas take. Imports torch only once the command line is known to be good.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from configs import pbtxt
from configs.errors import ConfigError
from configs.model import ModelConfig
from configs.parameters import parse_parameters
from configs.placement import list_gpus
from deployments.disk import CONFIG
from deployments.errors import MantaError
from deployments.repository import Found, Repository

GOOD, BAD = 0, 1

DESCRIPTION = """\
Prints the configuration with which `manta serve` would serve a model: config.pbtxt with all that
its file and its model tell. It can be saved as config.pbtxt."""
EPILOG = """\
For what config.pbtxt leaves out, the model is read on this machine, or run on its sample_input.npz
or on zeros. What the model contradicts is an error, as it is when it is served.

exit codes: 0 all printed; 1 some model has an error, or there is none; 2 a wrong command line."""


def main(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    try:
        root, only = _root(Path(os.path.abspath(options.path)))
        repository = Repository([root])
        repository.check()
        names = list(dict.fromkeys(options.model)) or only or _names(repository)
    except (ConfigError, MantaError) as error:
        print(f"manta config: {error}", file=sys.stderr)
        return BAD
    if not names:
        print(f"manta config: there is no model in {root}", file=sys.stderr)
        return BAD
    code = GOOD
    for name in names:
        try:
            found = repository.find(name)
            number, config = configuration(repository, found, options.version)
        except (ConfigError, MantaError) as error:
            print(f"manta config: {error}", file=sys.stderr)
            code = BAD
            continue
        print(f"# {name}/{CONFIG}, version {number}")
        print(pbtxt.to_text(config), flush=True)
    return code


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="manta config",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="PATH", help="a model repository, or one model in it")
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME", help="this model only; repeatable"
    )
    parser.add_argument(
        "--version",
        type=int,
        metavar="N",
        help="this version (default: the newest that the version policy selects)",
    )
    return parser.parse_args(arguments)


def _root(path: Path) -> tuple[Path, list[str]]:
    """The repository, and the model where the path is one."""
    if (path / CONFIG).is_file() or (path / "1").is_dir():
        return path.parent, [path.name]
    return path, []


def _names(repository: Repository) -> list[str]:
    return [found.name for found in repository.scan()]


def configuration(
    repository: Repository, found: Found, version: int | None = None
) -> tuple[int, ModelConfig]:
    """A version's number and its whole configuration; raises ConfigError or an error of ours."""
    import torch

    from deployments.runtimes import autocomplete

    if found.error:
        raise ConfigError(found.error)
    gpus = torch.cuda.device_count()
    config = repository.read_config(found, partial=True)
    numbers, missing = repository.select_versions(config, found.versions)
    if version is None and not numbers:
        raise ConfigError(next(iter(missing.values())))
    number = numbers[-1] if version is None else version
    try:
        normal = repository.version_config(found, number, config, gpus > 0, partial=True)
        normal = list_gpus(normal, gpus)
        artifact = repository.artifact(found, number, normal)
        parameters, _ = parse_parameters(normal, (artifact.name,))
        kind = normal.instance_group[0].kind
        device = "cuda:0" if kind == "KIND_GPU" else "cpu"
        return number, autocomplete.complete(artifact, normal, parameters, device, kind)
    except ConfigError as error:
        raise repository.explain(found, error) from None
