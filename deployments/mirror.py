"""A model repository in an object store: what it holds, and a local mirror of what is loaded.

Owns the listing, and which files are fetched anew; the mirror's folder is a repository like any
other. Blocking calls, made by the Repository before it looks at the disk.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.server import ServerSettings
from configs.stores import Store, is_remote, parse

from .disk import Signature
from .errors import Internal, InvalidArgument, MantaError, Unavailable
from .names import check_file_path

logger = logging.getLogger("manta.repository")

_PREFIX = "manta-mirror-"
_PARTS = ".parts"  # files on their way; no model has such a name
# What tells one content of an object from the next, by store.
_MARKS = ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "created")

# Relative path -> size and mark.
Objects = Mapping[str, tuple[int, int]]


class Mirror:
    def __init__(self, store: Store, folder: Path, filesystem: Any = None) -> None:
        self.folder = folder
        self._store = store
        self._filesystem = filesystem
        self._fetched: dict[str, Objects] = {}

    def check(self) -> None:
        """For start-up: ConfigError, naming the repository, unless it can be read."""
        try:
            self._list()
        except ImportError:
            raise ConfigError(
                f"model repository '{self._store.url}' needs the package {self._store.package}: "
                "pip install 'manta-server[cloud]'"
            ) from None
        except Exception as error:
            raise ConfigError(
                f"model repository '{self._store.url}' cannot be read: {error}"
            ) from None

    def names(self) -> list[str]:
        """Folders of the repository that may be models. Raises Internal where it cannot be read."""
        with _telling(self._store.url):
            return [name for name in self._list() if not name.startswith(".")]

    def contains(self, name: str) -> bool:
        with _telling(self._store.url):
            return bool(self._objects(name))

    def signature(self, name: str) -> Signature:
        with _telling(self._store.url):
            found = self._objects(name)
        return tuple((path, size, mark, 0, 0) for path, (size, mark) in sorted(found.items()))

    def fetch(self, name: str) -> None:
        """The mirror has what the store has of this model, and keeps the files that are the same:
        a file is whole or not there, since it is written elsewhere first."""
        with _telling(self._store.url):
            wanted, fetched = self._objects(name), self._fetched.get(name, {})
            for relative, facts in wanted.items():
                target = self.folder / name / relative
                if fetched.get(relative) != facts or not target.is_file():
                    self._download(name, relative, facts[0], target)
            _remove_others(self.folder / name, set(wanted))
            self._fetched[name] = wanted

    def close(self) -> None:
        """For the server's end."""
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- the store -------------------------------------------------------------------------------

    def _open(self) -> Any:
        if self._filesystem is None:
            import fsspec

            self._filesystem = fsspec.filesystem(
                self._store.protocol,
                use_listings_cache=False,
                skip_instance_cache=True,
                **self._store.options,
            )
        return self._filesystem

    def _list(self) -> list[str]:
        filesystem = self._open()
        filesystem.invalidate_cache()
        entries = filesystem.ls(self._store.path, detail=True)
        folders = (one["name"] for one in entries if one["type"] == "directory")
        names = {name.rstrip("/").rpartition("/")[2] for name in folders}
        return sorted(names - {""})

    def _objects(self, name: str) -> Objects:
        filesystem = self._open()
        filesystem.invalidate_cache()
        prefix = f"{self._store.path}/{name}/"
        found: dict[str, tuple[int, int]] = {}
        for path, info in filesystem.find(prefix.rstrip("/"), detail=True).items():
            within, relative = path.lstrip("/").startswith(prefix), path.lstrip("/")[len(prefix) :]
            if not within or info["type"] != "file" or not relative or relative.endswith("/"):
                continue  # a folder's own mark
            try:
                check_file_path(relative)
            except InvalidArgument as error:
                raise ConfigError(str(error), file=name) from None
            found[relative] = (int(info["size"] or 0), _mark(info))
        return found

    def _download(self, name: str, relative: str, size: int, target: Path) -> None:
        parts = self.folder / _PARTS
        parts.mkdir(exist_ok=True)
        handle, part = tempfile.mkstemp(dir=parts)
        os.close(handle)
        try:
            self._open().get_file(f"{self._store.path}/{name}/{relative}", part)
            if os.path.getsize(part) != size:
                raise Unavailable(f"'{name}/{relative}' has changed while it was fetched")
            if target.is_dir():  # it was a folder before
                shutil.rmtree(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(part, target)
        finally:
            if os.path.exists(part):
                os.unlink(part)


def private_folder(directory: str, store: Store, owner: str) -> Path:
    """Where a server keeps its mirror of a store: the same folder each time, of mode 0700, and of
    nobody else. Raises ConfigError where somebody has put something else there."""
    digest = hashlib.sha256(f"{store.url}\0{owner}".encode()).hexdigest()[:16]
    user = os.geteuid() if hasattr(os, "geteuid") else 0
    folder = Path(directory or tempfile.gettempdir(), f"{_PREFIX}{user}-{digest}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise ConfigError(f"no folder for '{store.url}': {error}") from None
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == user and not found.st_mode & 0o077
    if not ours:
        raise ConfigError(f"'{folder}', for the mirror of '{store.url}', is not only ours")
    return folder


@contextmanager
def _telling(url: str) -> Iterator[None]:
    """What goes wrong between here and the store, told without its words: they name hosts."""
    try:
        yield
    except (ConfigError, MantaError):
        raise
    except Exception as error:
        logger.error("model repository '%s' cannot be read: %s", url, error)
        raise Internal("a model repository cannot be read") from None


def _mark(info: Mapping[str, Any]) -> int:
    facts = [str(info[key]) for key in _MARKS if info.get(key)]
    return int.from_bytes(hashlib.sha256("\0".join(facts).encode()).digest()[:7], "big")


def _remove_others(folder: Path, wanted: set[str]) -> None:
    """Files that the store does not have any more, and folders that are empty without them."""
    for parent, _, files in os.walk(folder, topdown=False):
        for file in files:
            path = Path(parent, file)
            if path.relative_to(folder).as_posix() not in wanted:
                path.unlink()
        if not os.listdir(parent):
            os.rmdir(parent)


def mirrors(settings: ServerSettings, owner: str) -> list[Mirror]:
    """One for each repository of the settings that is in a store. Raises ConfigError."""
    stores = [parse(url, os.environ) for url in settings.model_repository if is_remote(url)]
    return [
        Mirror(store, private_folder(settings.remote_directory, store, owner)) for store in stores
    ]
