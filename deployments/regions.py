"""The clients' shared memory: which regions are registered, who uses them, and copies in and out.

Owns Triton's rules and texts for regions. Maps nothing: to touch a mapping behind the end of a file
that its client has cut short would end this process, where a read comes back short and is an error.
Called by `inference` on its loop, for copies by `extras` on threads; the edges read `memory_range`.
"""

from __future__ import annotations

import contextlib
import os
import stat
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NoReturn

from .errors import (
    AlreadyExists,
    Internal,
    InvalidArgument,
    MantaError,
    NotFound,
    Unavailable,
    Unsupported,
)
from .types import MemoryRange

Kind = Literal["system", "cuda"]

FOLDER = "/dev/shm"
RESERVED = "triton_python_backend_shm_region_"
# Named semaphores lie in the same folder, and whoever writes into one breaks another program.
SEMAPHORE = "sem."
MAX_REGIONS = 1024  # each has a file descriptor
MAX_NAME_CHARS = 1024
MAX_KEY_BYTES = 255
MAX_SIZE = 2**64 - 1

DISABLED = (
    "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable."
)

_REGION, _SIZE, _OFFSET = (
    "shared_memory_region",
    "shared_memory_byte_size",
    "shared_memory_offset",
)
_KEYS = frozenset((_REGION, _SIZE, _OFFSET))
_OPEN = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


# --- the parameters of a tensor ------------------------------------------------------------------


def memory_range(
    tensor: str,
    parameters: Mapping[str, Any],
    allowed: bool,
    wrong_type: Callable[[str, str, type], MantaError],
) -> MemoryRange | None:
    """Where `tensor` lies, or None where nothing is said of it. `wrong_type` is the protocol's
    error for tensor, parameter and the type that it wants."""
    if _KEYS.isdisjoint(parameters):
        return None
    if not allowed:
        raise Unsupported(DISABLED)
    if _REGION not in parameters:
        key = _OFFSET if _OFFSET in parameters else _SIZE
        raise InvalidArgument(
            f"'{key}' can not be specified without '{_REGION}' parameter for tensor '{tensor}'"
        )
    if _SIZE not in parameters:
        raise InvalidArgument(
            f"'{_SIZE}' must be specified along with '{_REGION}' parameter for tensor '{tensor}'"
        )
    wanted: tuple[tuple[str, type], ...] = ((_REGION, str), (_SIZE, int), (_OFFSET, int))
    for key, kind in wanted:
        if key in parameters and type(parameters[key]) is not kind:
            raise wrong_type(tensor, key, kind)
    return MemoryRange(parameters[_REGION], parameters[_SIZE], parameters.get(_OFFSET, 0))


# --- regions -------------------------------------------------------------------------------------


class Region:
    """`byte_size` bytes of a shared memory object from `offset` on.

    Its descriptor is closed with the last reference: a copy on another thread has one.
    """

    def __init__(self, name: str, key: str, offset: int, byte_size: int, descriptor: int) -> None:
        self.name, self.key, self.offset, self.byte_size = name, key, offset, byte_size
        self.uses = 0
        self.leaving = False  # unregistered, and in use
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)

    def read(self, offset: int, into: memoryview) -> None:
        """Fills `into` with the bytes from `offset` on."""
        at = self.offset + offset
        while into:
            try:
                count = os.preadv(self._descriptor, [into], at)
            except OSError:
                raise Internal(f"failed to read shared memory region '{self.name}'") from None
            if not count:
                raise _beyond(self.name)
            into, at = into[count:], at + count

    def write(self, offset: int, data: memoryview) -> None:
        at = self.offset + offset
        try:
            # A write would make a file longer that its client has cut short. One that is cut
            # between here and there grows, and no further than it was when it was registered.
            if os.fstat(self._descriptor).st_size < at + len(data):
                raise _beyond(self.name)
            while data:
                count = os.pwrite(self._descriptor, data, at)
                data, at = data[count:], at + count
        except OSError:
            raise Internal(f"failed to write shared memory region '{self.name}'") from None

    def status(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "key": self.key,
            "offset": self.offset,
            "byte_size": self.byte_size,
        }


class Regions:
    """All that clients have registered, by name. There are none in CUDA memory.

    Requests that run hold copies of their inputs, which cost their clients nothing: of up to
    `max_copied_bytes` together.
    """

    def __init__(self, max_copied_bytes: int = MAX_SIZE) -> None:
        self._regions: dict[str, Region] = {}
        self._max_copied_bytes = max_copied_bytes
        self._copied_bytes = 0

    def __len__(self) -> int:
        return len(self._regions)

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        if not name:
            raise InvalidArgument(
                "'region name' is necessary to register system shared memory region"
            )
        if len(name) > MAX_NAME_CHARS:
            raise InvalidArgument(
                f"a shared memory region's name has at most {MAX_NAME_CHARS} characters"
            )
        file = _file_of(name, key)
        if name in self._regions:
            raise AlreadyExists(f"shared memory region '{name}' already in manager")
        if len(self._regions) >= MAX_REGIONS:
            raise InvalidArgument(f"at most {MAX_REGIONS} shared memory regions can be registered")
        descriptor = _open(file, key)
        if not 0 < byte_size <= os.fstat(descriptor).st_size - offset or offset < 0:
            os.close(descriptor)
            raise InvalidArgument(f"failed to register shared memory region '{name}': invalid args")
        self._regions[name] = Region(name, key, offset, byte_size, descriptor)

    def register_cuda(self, name: str) -> NoReturn:
        if not name:
            raise InvalidArgument(
                "'region name' is necessary to register cuda shared memory region"
            )
        raise InvalidArgument(
            f"failed to register CUDA shared memory region: '{name}', GPUs not supported"
        )

    def unregister(self, kind: Kind, name: str) -> None:
        """One, or all with "". One that is not there is no error; one in use goes when the last
        request that uses it is over, and until then is what it was."""
        if kind == "cuda":
            return
        for each in [name] if name else list(self._regions):
            region = self._regions.get(each)
            if region is not None:
                region.leaving = True
                self._drop_unused(region)

    def status(self, kind: Kind, name: str) -> list[dict[str, Any]]:
        """Of one, or of all with ""."""
        if not name:
            return [] if kind == "cuda" else [each.status() for each in self._regions.values()]
        region = self._regions.get(name)
        if region is None:
            raise NotFound(f"Unable to find {kind} shared memory region: '{name}'")
        if kind == "cuda":
            raise NotFound(
                f"The region named '{name}' is registered as system shared memory, not CUDA "
                "shared memory"
            )
        return [region.status()]

    @contextlib.contextmanager
    def held(self, ranges: Iterable[MemoryRange]) -> Iterator[Mapping[str, Region]]:
        """The regions of checked ranges, by name; they stay until this is over."""
        found = {each.region: self._find(each) for each in ranges}
        for region in found.values():
            region.uses += 1
        try:
            yield found
        finally:
            for region in found.values():
                region.uses -= 1
                self._drop_unused(region)

    @contextlib.contextmanager
    def copying(self, size_bytes: int) -> Iterator[None]:
        """Room for copies of so many bytes, until this is over."""
        if size_bytes > self._max_copied_bytes - self._copied_bytes:
            raise Unavailable(
                "the inputs in shared memory of running requests would exceed "
                f"{self._max_copied_bytes} bytes; try again"
            )
        self._copied_bytes += size_bytes
        try:
            yield
        finally:
            self._copied_bytes -= size_bytes

    def _find(self, wanted: MemoryRange) -> Region:
        name, offset, size = wanted.region, wanted.offset, wanted.byte_size
        region = self._regions.get(name)
        if region is None:
            raise NotFound(f"Unable to find shared memory region: '{name}'")
        if not 0 <= offset < region.byte_size:
            raise InvalidArgument(f"Invalid offset for shared memory region: '{name}'")
        if offset + size > MAX_SIZE:
            raise InvalidArgument(
                f"Integer overflow detected: byte_size ({size}) + offset ({offset}) exceeds "
                f"maximum value ({MAX_SIZE}) for region '{name}'"
            )
        if not 0 <= size <= region.byte_size - offset:
            raise _beyond(name)
        return region

    def _drop_unused(self, region: Region) -> None:
        if region.leaving and not region.uses and self._regions.get(region.name) is region:
            del self._regions[region.name]


def _beyond(name: str) -> InvalidArgument:
    return InvalidArgument(f"Invalid offset + byte size for shared memory region: '{name}'")


def _file_of(name: str, key: str) -> bytes:
    """The file of a shared memory object, whose name may stand behind slashes, as in shm_open."""
    bare = key.lstrip("/")
    if bare.startswith(RESERVED):
        raise InvalidArgument(
            f"cannot register shared memory region '{name}' with key '{key}' as the key contains "
            f"the reserved prefix '{RESERVED}'"
        )
    try:
        file = bare.encode()
    except UnicodeEncodeError:  # a lone surrogate
        file = b""
    if (
        not 0 < len(file) <= MAX_KEY_BYTES
        or bare in (".", "..")
        or bare.startswith(SEMAPHORE)
        or any(each in bare for each in "/\0")
    ):
        raise InvalidArgument(
            f"cannot register shared memory region '{name}' with key '{key[:MAX_KEY_BYTES]}' as "
            "the key is not the name of a shared memory object"
        )
    return os.path.join(os.fsencode(FOLDER), file)


def _open(file: bytes, key: str) -> int:
    """A descriptor of what must be an ordinary file: a pipe, say, would be read to nobody's gain.

    Triton says 500 where there is none; but the mistake is the client's.
    """
    try:
        descriptor = os.open(file, _OPEN)
    except OSError:
        raise InvalidArgument(f"Unable to open shared memory region: '{key}'") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InvalidArgument(f"Unable to open shared memory region: '{key}'")
    return descriptor
