"""What is on disk: models, versions, configurations, labels. Loads nothing, remembers nothing.

Every path is resolved and must stay inside its repository. Texts name
paths relative to the repository. Called by the Controller, and by replicas to check their files.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs import pbtxt, warmup
from configs.complete import (
    artifact_filename,
    artifact_filenames,
    normalise_version,
    of_content,
)
from configs.errors import ConfigError
from configs.model import ModelConfig

from . import archives
from .errors import Internal, InvalidArgument, Unavailable

logger = logging.getLogger("manta.repository")

CONFIG = "config.pbtxt"
SAMPLE = "sample_input.npz"  # what a model takes, to complete its configuration from
DUPLICATE = "model appears in two or more repositories"
MAX_CONFIG_BYTES = 4 << 20
MAX_LABEL_BYTES = 64 << 20
MAX_NAME_BYTES = 255

_NAME = re.compile(r"[\w.+@~=:,-]+")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")  # fits the proto's int64
# Where `manta optimize` keeps a model until it is whole.
WORKSHOP = ".optimizing."
_OTHER_FOLDERS = {"configs", "warmup", "initial_state", "__pycache__"}
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Found:
    """A model directory. `path` is absolute; with an `error` the model cannot be loaded."""

    name: str
    path: str
    versions: tuple[int, ...] = ()
    error: str = ""


def check_model_name(name: str) -> None:
    """Raises InvalidArgument unless a client's model name can name a model directory."""
    if not name.strip():
        raise InvalidArgument("Model name cannot be empty or blank")
    if "/" in name or "\\" in name or name.strip() in (".", ".."):
        raise InvalidArgument("model name must not contain path traversal characters")
    if not _NAME.fullmatch(name):
        raise InvalidArgument("model name must consist of letters, digits and . _ + - @ ~ = : ,")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise InvalidArgument(f"model name must not be longer than {MAX_NAME_BYTES} bytes")


class Repository:
    """The model repositories of one server, in the order given."""

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        self._roots = tuple(Path(path) for path in paths)

    def check(self) -> None:
        """For start-up: ConfigError, naming the path, unless every repository is a directory."""
        for root in self._roots:
            if not root.is_dir():
                raise ConfigError(f"model repository '{root}' is not a directory")

    def scan(self) -> tuple[Found, ...]:
        """Every model directory, sorted by name; what is wrong with one is its `error`."""
        names: set[str] = set()
        for root in self._roots:
            names.update(entry for entry in _folders(root) if _is_model(root / entry))
        return tuple(self._look_up(name) for name in sorted(names))

    def find(self, name: str) -> Found:
        """One model directory; InvalidArgument for a bad name, Internal where there is none."""
        if not self.contains(name):
            raise Internal(f"failed to load '{name}', failed to poll from model repository")
        return self._look_up(name)

    def _look_up(self, name: str) -> Found:
        paths = [root / name for root in self._roots if os.path.isdir(root / name)]
        path = str(paths[0].absolute())
        if len(paths) > 1:
            return Found(name, path, error=DUPLICATE)
        try:
            check_model_name(name)
            _contained(Path(path), "")
        except (InvalidArgument, ConfigError) as error:
            return Found(name, path, error=str(error))
        return Found(name, path, _versions(Path(path)))

    def contains(self, name: str) -> bool:
        """Whether some repository has a directory of this name; InvalidArgument for a bad one."""
        check_model_name(name)
        return any(os.path.isdir(root / name) for root in self._roots)

    # --- one model ------------------------------------------------------------------------------

    def read_config(self, found: Found, partial: bool = False) -> ModelConfig:
        """config.pbtxt, parsed and checked; ConfigError names file, line and field.

        `partial`: the file, or what the model can tell, may be missing.
        """
        file = f"{found.name}/{CONFIG}"
        text = self._config_text(found)
        if text is None:
            try:
                return pbtxt.parse("", file, found.name, partial)
            except ConfigError as error:
                sniffed = self.version_files(found, found.versions[0]) if found.versions else ()
                lies = f"version {found.versions[0]} has {', '.join(sniffed)}; " if sniffed else ""
                reason = f"the file is missing: {lies}{error.reason}"
                raise ConfigError(reason, file=file) from None
        return pbtxt.parse(text, file, found.name, partial)

    def version_config(
        self, found: Found, version: int, config: ModelConfig, has_gpu: bool, partial: bool = False
    ) -> ModelConfig:
        """What `read_config` gave, normalised and as this version has it. A .pt2 file is looked
        into, and nothing is loaded; raises ConfigError."""
        files = self.version_files(found, version)
        normal = normalise_version(config, self.first_files(found), files, has_gpu, partial)
        for name in artifact_filenames(normal, files):
            if name.endswith(".pt2") and name in files:
                path = _contained(Path(found.path), f"{version}/{name}")
                stated = config.platform == normal.platform
                return of_content(normal, stated, archives.inspect(path).kind)
        return normal

    def config_errors(self, found: Found, partial: bool = False) -> list[ConfigError]:
        """All that is wrong with config.pbtxt by itself; none where the file is missing.
        `partial`: it may lack what the model can tell."""
        try:
            text = self._config_text(found)
        except ConfigError as error:
            return [error]
        if text is None:
            return []
        return pbtxt.examine(text, f"{found.name}/{CONFIG}", found.name, partial)[1]

    def explain(self, found: Found, error: ConfigError) -> ConfigError:
        """An error raised later than parsing (complete, parameters, placement), told its line."""
        text = self._config_text(found)
        file = f"{found.name}/{CONFIG}"
        return error.located(file) if text is None else pbtxt.locate(error, text, file)

    def _config_text(self, found: Found) -> str | None:
        file = f"{found.name}/{CONFIG}"
        data = _read(Path(found.path), CONFIG, MAX_CONFIG_BYTES)
        try:
            return None if data is None else data.decode()
        except UnicodeDecodeError as error:
            line = (data or b"")[: error.start].count(b"\n") + 1
            raise ConfigError("the file is not UTF-8 text", file=file, line=line) from None

    def select_versions(
        self, config: ModelConfig, versions: Sequence[int]
    ) -> tuple[tuple[int, ...], dict[int, str]]:
        """The versions that the policy asks for, ascending, and those that are missing, with why.

        Raises ConfigError where it asks for none.
        """
        policy = config.version_policy
        ordered, missing = sorted(versions), dict[int, str]()
        if policy is not None and policy.specific is not None:
            wanted = set(policy.specific)
            missing = {v: _no_version(config.name, v) for v in sorted(wanted.difference(versions))}
            ordered = [v for v in ordered if v in wanted]
        elif policy is None or not policy.all:
            latest = 1 if policy is None or policy.latest is None else policy.latest
            ordered = ordered[-latest:]
        if not ordered and not missing:
            raise ConfigError(
                "at least one version must be available under the version policy of model "
                f"'{config.name}'"
            )
        return tuple(ordered), missing

    def version_files(self, found: Found, version: int) -> tuple[str, ...]:
        """The regular files of a version directory, sorted; Unavailable if there is none."""
        folder = self._version_folder(found, version)
        return tuple(sorted(e.name for e in os.scandir(folder) if e.is_file()))

    def first_files(self, found: Found) -> tuple[str, ...]:
        """The files that sniffing looks at: of the lexicographically first version directory."""
        if not found.versions:
            return ()
        return self.version_files(found, int(min(str(version) for version in found.versions)))

    def artifact(
        self, found: Found, version: int, config: ModelConfig, capability: str = ""
    ) -> Path:
        """The file that a runtime loads; Unavailable, naming it, where there is none.

        `capability` is that of the GPU that it is for. Not resolved: a link keeps its own name,
        whose suffix says what it is, and its neighbours.
        """
        files = self.version_files(found, version)
        return self._first(found, version, [artifact_filename(config, files, capability)])

    def check_artifacts(self, found: Found, version: int, config: ModelConfig) -> None:
        """Unavailable, naming them, where no instance could find the file that it loads."""
        files = self.version_files(found, version)
        self._first(found, version, artifact_filenames(config, files))

    def _first(self, found: Found, version: int, filenames: Sequence[str]) -> Path:
        folder = self._version_folder(found, version)
        for filename in filenames:
            if _contained(Path(found.path), f"{version}/{filename}").is_file():
                return folder / filename
        wanted = "' or '".join(f"{found.name}/{folder.name}/{name}" for name in filenames)
        raise Unavailable(f"unable to find '{wanted}' for model '{found.name}' version {version}")

    def _version_folder(self, found: Found, version: int) -> Path:
        path = _contained(Path(found.path), str(version))
        if not path.is_dir():
            raise Unavailable(_no_version(found.name, version))
        return Path(found.path) / str(version)

    def labels(self, found: Found, config: ModelConfig) -> Mapping[str, tuple[str, ...]]:
        """Output name -> labels, one per line of its label file; ConfigError if one is missing."""
        labels: dict[str, tuple[str, ...]] = {}
        for index, output in enumerate(config.output):
            if not output.label_filename:
                continue
            field = f"output[{index}].label_filename"
            data = _read(Path(found.path), output.label_filename, MAX_LABEL_BYTES)
            if data is None:
                raise ConfigError(
                    f"unable to find '{found.name}/{output.label_filename}'",
                    file=f"{found.name}/{CONFIG}",
                    field=field,
                )
            labels[output.name] = tuple(data.decode(errors="replace").splitlines())
        return labels

    def warmup_files(self, found: Found, config: ModelConfig) -> Mapping[str, Path]:
        """Path in the model's folder -> where it is, for the data of warmup samples.

        Raises ConfigError, naming it, for a file that is missing or too short.
        """
        files: dict[str, Path] = {}
        for field, relative, name, given in warmup.data_files(config):
            path = files[relative] = _contained(Path(found.path), relative)
            reason = ""
            if not path.is_file():
                reason = f"unable to find '{found.name}/{relative}'"
            elif path.stat().st_size < warmup.size_bytes(given):
                reason = warmup.too_short(name, given, path.stat().st_size)
            if reason:
                raise ConfigError(reason, file=f"{found.name}/{CONFIG}", field=field)
        return files

    def content_hash(self, found: Found, version: int, config: ModelConfig) -> str:
        """sha256 over config.pbtxt, the sample, the files that the configuration names beside them,
        all files of the version directory, and those that it names behind a link to a directory."""
        total = hashlib.sha256()
        model = Path(found.path)
        folder = self._version_folder(found, version)
        labels = {output.label_filename for output in config.output if output.label_filename}
        data = {file for _, file, *_ in warmup.data_files(config)}
        named = [CONFIG, SAMPLE, *sorted(labels | data)]
        files = {config.default_model_filename, *config.cc_model_filenames.values()} - {""}
        artifacts = {os.path.normpath(f"{version}/{name}") for name in files}
        for relative in [*named, *sorted(artifacts.union(_walk(folder, model)))]:
            path = _contained(model, relative)
            if path.is_file():
                total.update(
                    f"{relative}\0{path.stat().st_size}\0".encode(errors="surrogateescape")
                )
                with path.open("rb") as file:
                    while chunk := file.read(_CHUNK_BYTES):
                        total.update(chunk)
        return total.hexdigest()


# --- the file system, carefully ------------------------------------------------------------------


def _no_version(name: str, version: int) -> str:
    return f"unable to find '{name}/{version}' for model '{name}' version {version}"


def _contained(model: Path, relative: str) -> Path:
    """The resolved path of something in a model directory; ConfigError if it is elsewhere.

    A link may point anywhere inside the same repository: config maps are mounted so.
    """
    root = os.path.realpath(model.parent)
    path = os.path.realpath(model / relative)
    if os.path.commonpath([root, path]) != root or path == root:
        shown = f"{model.name}/{relative}".rstrip("/")
        raise ConfigError(f"'{shown}' leads out of the model repository")
    return Path(path)


def _read(model: Path, relative: str, limit_bytes: int) -> bytes | None:
    path = _contained(model, relative)
    shown = f"{model.name}/{relative}"
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
    except OSError as error:
        raise ConfigError(f"unable to read the file: {error.strerror}", file=shown) from None
    if len(data) > limit_bytes:
        raise ConfigError(f"the file is larger than {limit_bytes} bytes", file=shown)
    return data


def _folders(root: Path) -> Iterator[str]:
    try:
        with os.scandir(root) as entries:
            yield from [entry.name for entry in entries if entry.is_dir()]
    except OSError as error:
        logger.error("model repository '%s' cannot be read: %s", root, error.strerror)
        raise Internal("a model repository cannot be read") from None


def _is_model(path: Path) -> bool:
    """Folders of other programs, such as .git, are no models unless they look like one; what
    `manta optimize` is making is none yet."""
    if path.name.startswith(WORKSHOP):
        return False
    if not path.name.startswith(".") and path.name not in _OTHER_FOLDERS:
        return True
    return (path / CONFIG).is_file() or any(_VERSION.fullmatch(name) for name in _folders(path))


def _versions(model: Path) -> tuple[int, ...]:
    versions = []
    for name in _folders(model):
        if _VERSION.fullmatch(name):
            versions.append(int(name))
        elif not name.startswith(".") and name not in _OTHER_FOLDERS:
            logger.warning(
                "model %r: ignoring version directory %r: not a positive integer "
                "without leading zeros",
                model.name,
                name,
            )
    return tuple(sorted(versions))


def _walk(folder: Path, model: Path) -> list[str]:
    """Files below a version directory, relative to the model, sorted.

    Compiled Python is left out: importing a model.py writes it.
    """
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        found += [os.path.relpath(os.path.join(parent, name), model) for name in files]
    return sorted(found)
