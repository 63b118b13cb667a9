"""What is on disk: models, versions, configurations, labels. Loads nothing, remembers nothing.

Every path is resolved and must stay inside its repository (`disk`). Texts name
paths relative to the repository. Called by the Controller, and by replicas to check their files.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs import given, pbtxt, warmup
from configs.complete import (
    artifact_filename,
    artifact_filenames,
    normalise_version,
    of_content,
)
from configs.errors import ConfigError
from configs.model import ModelConfig

from . import archives, disk
from .disk import CONFIG, CONFIGS, Signature, contained
from .errors import Internal, InvalidArgument, Unavailable
from .mirror import Mirror
from .names import check_model_name

SAMPLE = "sample_input.npz"  # what a model takes, to complete its configuration from
DUPLICATE = "model appears in two or more repositories"
MAX_CONFIG_BYTES = 4 << 20
MAX_LABEL_BYTES = 64 << 20

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Found:
    """A model directory. `path` is absolute; with an `error` the model cannot be loaded.

    `given` is a configuration in JSON that stands in for the file, None where the file counts.
    """

    name: str
    path: str
    versions: tuple[int, ...] = ()
    error: str = ""
    given: str | None = None


class Repository:
    """The model repositories of one server, in the order given.

    `config_name`: `configs/<name>.pbtxt` stands for config.pbtxt in models that have it. A path
    with a mirror is that of a store, from which a model is fetched before it is looked at.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        config_name: str = "",
        mirrors: Sequence[Mirror] = (),
    ) -> None:
        self._mirrors = {mirror.folder: mirror for mirror in mirrors}
        self._roots = tuple(dict.fromkeys([*map(Path, paths), *self._mirrors]))
        self._config_name = config_name

    def check(self) -> None:
        """For start-up: ConfigError, naming the path, unless every repository can be read."""
        for root in self._roots:
            if (mirror := self._mirrors.get(root)) is not None:
                mirror.check()
            elif not root.is_dir():
                raise ConfigError(f"model repository '{root}' is not a directory")

    def scan(self) -> tuple[Found, ...]:
        """Every model directory, sorted by name; what is wrong with one is its `error`."""
        return tuple(self._look_up(name) for name in self.names())

    def names(self) -> dict[str, str]:
        """Every model directory, sorted, and DUPLICATE for one that is in several repositories."""
        return {
            name: "" if len(roots) == 1 else DUPLICATE for name, roots in self._by_name().items()
        }

    def signatures(self) -> dict[str, tuple[Signature, ...]]:
        """For each model directory, and each repository that has it, what tells a change."""
        return {
            name: tuple(self._signature(root, name) for root in roots)
            for name, roots in self._by_name().items()
        }

    def _signature(self, root: Path, name: str) -> Signature:
        mirror = self._mirrors.get(root)
        return disk.signature(root / name) if mirror is None else mirror.signature(name)

    def _by_name(self) -> dict[str, list[Path]]:
        found: defaultdict[str, list[Path]] = defaultdict(list)
        for root in self._roots:
            mirror = self._mirrors.get(root)
            for name in disk.models(root) if mirror is None else mirror.names():
                found[name].append(root)
        return dict(sorted(found.items()))

    def find(self, name: str) -> Found:
        """One model directory; InvalidArgument for a bad name, Internal where there is none."""
        check_model_name(name)
        return self._look_up(name)

    def _look_up(self, name: str) -> Found:
        roots = [root for root in self._roots if self._has(root, name)]
        if not roots:
            raise Internal(f"failed to load '{name}', failed to poll from model repository")
        path = str((roots[0] / name).absolute())
        if len(roots) > 1:
            return Found(name, path, error=DUPLICATE)
        try:
            check_model_name(name)
            if (mirror := self._mirrors.get(roots[0])) is not None:
                mirror.fetch(name)
            contained(Path(path), "")
        except (InvalidArgument, ConfigError) as error:
            return Found(name, path, error=str(error))
        return Found(name, path, disk.versions(Path(path)))

    def contains(self, name: str) -> bool:
        """Whether some repository has a directory of this name; InvalidArgument for a bad one."""
        check_model_name(name)
        return any(self._has(root, name) for root in self._roots)

    def _has(self, root: Path, name: str) -> bool:
        mirror = self._mirrors.get(root)
        return os.path.isdir(root / name) if mirror is None else mirror.contains(name)

    def close(self) -> None:
        """For the server's end: no mirror stays behind."""
        for mirror in self._mirrors.values():
            mirror.close()

    # --- one model ------------------------------------------------------------------------------

    def read_config(self, found: Found, partial: bool = False) -> ModelConfig:
        """What was given, or config.pbtxt, parsed and checked; ConfigError names file, line and
        field.

        `partial`: the file, or what the model can tell, may be missing.
        """
        if found.given is not None:
            return given.parse(found.given, found.name, partial)
        file = self._config_file(found)
        text = self._config_text(found, file)
        if text is None:
            try:
                return pbtxt.parse("", _shown(found, file), found.name, partial)
            except ConfigError as error:
                sniffed = self.version_files(found, found.versions[0]) if found.versions else ()
                lies = f"version {found.versions[0]} has {', '.join(sniffed)}; " if sniffed else ""
                reason = f"the file is missing: {lies}{error.reason}"
                raise ConfigError(reason, file=_shown(found, file)) from None
        return pbtxt.parse(text, _shown(found, file), found.name, partial)

    def version_config(
        self, found: Found, version: int, config: ModelConfig, has_gpu: bool, partial: bool = False
    ) -> ModelConfig:
        """What `read_config` gave, normalised and as this version has it. A .pt2 file is looked
        into, and nothing is loaded; raises ConfigError."""
        files = self.version_files(found, version)
        normal = normalise_version(config, self.first_files(found), files, has_gpu, partial)
        for name in artifact_filenames(normal, files):
            if name.endswith(".pt2") and name in files:
                path = contained(Path(found.path), f"{version}/{name}")
                stated = config.platform == normal.platform
                return of_content(normal, stated, archives.inspect(path).kind)
        return normal

    def config_errors(self, found: Found, partial: bool = False) -> list[ConfigError]:
        """All that is wrong with config.pbtxt by itself; none where the file is missing.
        `partial`: it may lack what the model can tell."""
        try:
            file = self._config_file(found)
            text = self._config_text(found, file)
        except ConfigError as error:
            return [error]
        if text is None:
            return []
        return pbtxt.examine(text, _shown(found, file), found.name, partial)[1]

    def explain(self, found: Found, error: ConfigError) -> ConfigError:
        """An error raised later than parsing (complete, parameters, placement), told its line."""
        if found.given is not None:
            return error.located(given.PLACE)
        file = self._config_file(found)
        text = self._config_text(found, file)
        shown = _shown(found, file)
        return error.located(shown) if text is None else pbtxt.locate(error, text, shown)

    def _config_file(self, found: Found) -> str:
        """Relative to the model: the one that the server was told to prefer, or config.pbtxt."""
        chosen = f"{CONFIGS}/{self._config_name}.pbtxt"
        if self._config_name and contained(Path(found.path), chosen).is_file():
            return chosen
        return CONFIG

    def _place(self, found: Found) -> str:
        """What errors in the configuration call it."""
        return _shown(found, self._config_file(found)) if found.given is None else given.PLACE

    def _config_text(self, found: Found, file: str) -> str | None:
        data = disk.read(Path(found.path), file, MAX_CONFIG_BYTES)
        try:
            return None if data is None else data.decode()
        except UnicodeDecodeError as error:
            line = (data or b"")[: error.start].count(b"\n") + 1
            raise ConfigError(
                "the file is not UTF-8 text", file=_shown(found, file), line=line
            ) from None

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
            if contained(Path(found.path), f"{version}/{filename}").is_file():
                return folder / filename
        wanted = "' or '".join(f"{found.name}/{folder.name}/{name}" for name in filenames)
        raise Unavailable(f"unable to find '{wanted}' for model '{found.name}' version {version}")

    def _version_folder(self, found: Found, version: int) -> Path:
        path = contained(Path(found.path), str(version))
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
            data = disk.read(Path(found.path), output.label_filename, MAX_LABEL_BYTES)
            if data is None:
                raise ConfigError(
                    f"unable to find '{found.name}/{output.label_filename}'",
                    file=self._place(found),
                    field=field,
                )
            # Not splitlines: a label may hold what only Unicode takes for the end of a line.
            lines = data.decode(errors="replace").removesuffix("\n").split("\n")
            labels[output.name] = tuple(line.removesuffix("\r") for line in lines)
        return labels

    def warmup_files(self, found: Found, config: ModelConfig) -> Mapping[str, Path]:
        """Path in the model's folder -> where it is, for the data of warmup samples.

        Raises ConfigError, naming it, for a file that is missing or too short.
        """
        files: dict[str, Path] = {}
        for field, relative, name, one in warmup.data_files(config):
            path = files[relative] = contained(Path(found.path), relative)
            reason = ""
            if not path.is_file():
                reason = f"unable to find '{found.name}/{relative}'"
            elif path.stat().st_size < warmup.size_bytes(one):
                reason = warmup.too_short(name, one, path.stat().st_size)
            if reason:
                raise ConfigError(reason, file=self._place(found), field=field)
        return files

    def content_hash(
        self, found: Found, version: int, config: ModelConfig, with_config: bool = False
    ) -> str:
        """sha256 over what `content` lists. `with_config`: config.pbtxt, too, whatever of it is in
        `config`."""
        total = hashlib.sha256()
        for relative, path in self.content(found, version, config, with_config):
            total.update(f"{relative}\0{path.stat().st_size}\0".encode(errors="surrogateescape"))
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    total.update(chunk)
        return total.hexdigest()

    def content(
        self, found: Found, version: int, config: ModelConfig, with_config: bool = False
    ) -> list[tuple[str, Path]]:
        """Path in the model's folder, and where it is: of the sample, the files that the
        configuration names beside the versions, all files of the version directory, and those that
        it names behind a link to a directory. Raises what refuses one of them."""
        model = Path(found.path)
        folder = self._version_folder(found, version)
        labels = {output.label_filename for output in config.output if output.label_filename}
        data = {file for _, file, *_ in warmup.data_files(config)}
        named = [*([CONFIG] if with_config else []), SAMPLE, *sorted(labels | data)]
        files = {config.default_model_filename, *config.cc_model_filenames.values()} - {""}
        artifacts = {os.path.normpath(f"{version}/{name}") for name in files}
        relatives = [*named, *sorted(artifacts.union(disk.walk(folder, model)))]
        found_at = ((relative, contained(model, relative)) for relative in relatives)
        content = [(relative, path) for relative, path in found_at if path.is_file()]
        for relative, path in content:
            if not os.access(path, os.R_OK):
                raise Unavailable(f"'{_shown(found, relative)}' cannot be read")
        return content


def _no_version(name: str, version: int) -> str:
    return f"unable to find '{name}/{version}' for model '{name}' version {version}"


def _shown(found: Found, file: str) -> str:
    return f"{found.name}/{file}"
