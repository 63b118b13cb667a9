"""What `manta optimize` reads and writes: one version of one model, and the next one beside it.

Owns version numbers, what may be written when, and the configuration of a new model directory.
Knows no torch.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from configs import warmup
from configs.complete import DEFAULT_FILES, RuntimeKind, of_version, runtime_kind
from configs.errors import ConfigError
from configs.model import ModelConfig
from configs.parameters import ModelParameters, parse_parameters
from deployments.disk import CONFIG
from deployments.errors import MantaError
from deployments.names import check_model_name
from deployments.repository import Found, Repository

from . import disk


class OptimizeError(Exception):
    """Why nothing can be made or written, in words for the terminal."""


@dataclass(frozen=True)
class Source:
    """The version that is optimised, as it would be served. `kind` is an instance group's."""

    repository: Path
    found: Found
    version: int
    config: ModelConfig
    parameters: ModelParameters
    artifact: Path
    runtime: RuntimeKind
    kind: str
    content_hash: str
    named: bool = False  # the user chose the version; otherwise it was the newest

    @property
    def folder(self) -> Path:
        return Path(self.found.path)

    def check_unchanged(self) -> None:
        """What was made may be served in this version's place: only while its files and its
        configuration are still those that it was made from. Raises OptimizeError."""
        repository = Repository((self.repository,))
        try:
            found = repository.find(self.found.name)
            digest = repository.content_hash(found, self.version, self.config, with_config=True)
        except (ConfigError, MantaError, OSError):
            digest = ""
        if digest != self.content_hash:
            name = self.found.name
            raise OptimizeError(f"model '{name}' has changed meanwhile: run this again")

    def appeared(self) -> tuple[int, ...]:
        """Versions that somebody has published since this one was read."""
        now = Repository((self.repository,)).find(self.found.name).versions
        return tuple(sorted(set(now).difference(self.found.versions)))

    def threads(self) -> int:
        """What its instances compute with, unless the caller says otherwise."""
        return serving_threads(self.config, self.parameters, self.runtime)


def serving_threads(config: ModelConfig, parameters: ModelParameters, runtime: RuntimeKind) -> int:
    """Intra-op threads of each instance, when this model has the machine to itself."""
    if runtime == "eager":
        return parameters.num_threads
    from deployments.planner import available_cpus  # it brings Ray, which --help needs not

    instances = sum(g.count for g in config.instance_group if g.kind == "KIND_CPU")
    given = parameters.intra_op_thread_count
    return given or max(1, available_cpus() // max(1, instances))


def read(repository: Path, model: str, version: int | None, has_gpu: bool) -> Source:
    """Raises OptimizeError, which names what is missing or cannot be optimised."""
    try:
        return _read(repository, model, version, has_gpu)
    except (ConfigError, MantaError) as error:
        raise OptimizeError(str(error)) from None


def _read(root: Path, model: str, version: int | None, has_gpu: bool) -> Source:
    repository = Repository((root,))
    repository.check()
    if not repository.contains(model):
        raise OptimizeError(f"there is no model '{model}' in {root}")
    found = repository.find(model)
    if found.error:
        raise OptimizeError(found.error)
    if not found.versions:
        raise OptimizeError(f"model '{model}' has no version directory")
    number = found.versions[-1] if version is None else version
    files = repository.version_files(found, number)
    config = repository.read_config(found)
    config = repository.version_config(found, number, config, has_gpu)
    artifact = repository.artifact(found, number, config)
    kind = runtime_kind(config, files)
    if kind == "python":
        raise OptimizeError(
            f"'{model}' is a model of the Python backend: there is no module that could be compiled"
        )
    if kind == "aoti":
        older = [v for v in found.versions if v < number]
        hint = (
            f"; name the version it was made from, such as --version {older[-1]}" if older else ""
        )
        raise OptimizeError(f"version {number} of '{model}' is a compiled package already{hint}")
    if kind == "exported":
        raise OptimizeError(
            f"version {number} of '{model}' is a program of torch.export: the parameter "
            "COMPILE_ON_LOAD has the server compile it"
        )
    parameters, _ = parse_parameters(config, (artifact.name,))
    group = config.instance_group[0].kind
    digest = repository.content_hash(found, number, config, with_config=True)
    return Source(
        root, found, number, config, parameters, artifact, kind, group, digest, version is not None
    )


@dataclass(frozen=True)
class Destination:
    """Where the result goes: the next version of the model, or version 1 of a new one."""

    source: Source
    output: str | None = None

    def check(self) -> None:
        """Before any work is done. Raises OptimizeError."""
        given = self.source.config.default_model_filename
        if self.output is None:
            if given not in ("", *DEFAULT_FILES.values()):
                raise OptimizeError(
                    f'config.pbtxt says default_model_filename: "{given}", so that no version can '
                    "hold a file of another name: take the line out, or write a model of its own "
                    "with --output NAME"
                )
            return
        try:
            check_model_name(self.output)
        except MantaError as error:
            raise OptimizeError(str(error)) from None
        if (self.source.repository / self.output).exists():
            raise OptimizeError(f"'{self.output}' exists in {self.source.repository} already")

    def version_config(self, filename: str) -> ModelConfig:
        """How the server will see the new version, whose only file is `filename`."""
        if self.output is None:
            return of_version(self.source.config, (filename,))
        platform = "torch_aoti" if filename == DEFAULT_FILES["aoti"] else "pytorch_libtorch"
        changes = {"platform": platform, "runtime": "", "default_model_filename": filename}
        return self.source.config.model_copy(update=changes)

    @contextmanager
    def workshop(self) -> Iterator[Path]:
        """A folder on the same disk that no server takes for a model or a version."""
        parent = self.source.repository if self.output else self.source.folder
        try:
            path = tempfile.mkdtemp(prefix=".optimizing.", dir=parent)
        except OSError as error:
            raise OptimizeError(f"cannot write to {parent}: {error.strerror}") from None
        try:
            yield Path(path)
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def publish(self, made: Path, workshop: Path) -> Path:
        """Moves `made` in, whole or not at all; returns the new version's folder."""
        self.source.check_unchanged()
        if self.output is None:
            self._check_newest()
        staged = workshop / "publish"
        version = staged / "1" if self.output else staged
        version.mkdir(parents=True)
        made.rename(version / made.name)
        if self.output is not None:
            self._write_config(staged, self.output, made.name)
        for folder in {staged, version}:
            folder.chmod(0o755)
        for parent, _, files in os.walk(staged, topdown=False):
            for name in files:
                disk.sync(Path(parent, name))
            disk.sync(Path(parent))
        target = self._target()
        try:
            disk.move_new(staged, target)
            disk.sync(target.parent)
        except OSError as error:  # somebody else was quicker
            raise OptimizeError(f"cannot write {target}: {error.strerror}") from None
        return target if self.output is None else target / "1"

    def _check_newest(self) -> None:
        """By `version_policy: latest`, the highest number is what is served: what was made of the
        newest version must not take the place of one that is newer by now. Who has named the
        version wants it in front of others anyway. Raises OptimizeError."""
        newer = self.source.appeared()
        if newer and not self.source.named:
            raise OptimizeError(
                f"version {self.source.version} is not the newest any more: {_names(newer)} "
                "appeared meanwhile; run this again, or name the version with --version"
            )

    def _target(self) -> Path:
        if self.output is not None:
            return self.source.repository / self.output
        folder = self.source.folder
        taken = (int(name) for name in os.listdir(folder) if name.isdecimal())
        return folder / str(max(taken, default=0) + 1)

    def _write_config(self, staged: Path, name: str, filename: str) -> None:
        config = self.version_config(filename)
        message = pb.ModelConfig()
        text_format.Parse((self.source.folder / CONFIG).read_text(), message)
        message.name, message.backend, message.platform = name, "pytorch", config.platform
        for field in ("runtime", "default_model_filename", "version_policy"):
            message.ClearField(field)
        (staged / CONFIG).write_text(text_format.MessageToString(message))
        files = {o.label_filename for o in self.source.config.output if o.label_filename}
        files.update(relative for _, relative, *_ in warmup.data_files(self.source.config))
        for file in files:
            (staged / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.source.folder / file, staged / file)

    def warning(self, version: int) -> str:
        """What somebody else has published while `version` was made; "" when nobody has."""
        others = [v for v in self.source.appeared() if v != version]
        if self.output or not others:
            return ""
        made = f"{version}, made of version {self.source.version}"
        return f"{_names(others)} appeared meanwhile: {made}, has the higher number"

    def note(self, version: int) -> str:
        """What still keeps the server from serving what was written; "" when nothing does."""
        policy = self.source.config.version_policy
        if self.output or policy is None or policy.specific is None or version in policy.specific:
            return ""
        return f"version_policy in config.pbtxt lists versions: add {version} to serve it"


def _names(versions: Sequence[int]) -> str:
    word = "version" if len(versions) == 1 else "versions"
    return f"{word} {', '.join(map(str, versions))}"
