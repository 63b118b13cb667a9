from __future__ import annotations

import os

import pytest

from deployments import regions
from deployments.errors import (
    AlreadyExists,
    Internal,
    InvalidArgument,
    MantaError,
    NotFound,
    Unavailable,
    Unsupported,
)
from deployments.regions import RESERVED, Regions, memory_range
from deployments.types import MemoryRange

from .memories import objects

REGION, SIZE, OFFSET = (f"shared_memory_{each}" for each in ("region", "byte_size", "offset"))


@pytest.fixture
def memory():
    with objects() as make:
        yield make


@pytest.fixture
def registered(memory):
    """Regions with one of 60 bytes, from byte 4 on of an object of 64; and that object."""
    made, file = Regions(), memory(bytes(range(64)))
    made.register("r", file.name, 4, 60)
    return made, file


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def read(region, offset, size):
    into = bytearray(size)
    region.read(offset, memoryview(into))
    return bytes(into)


# --- the parameters of a tensor ----------------------------------------


def wrong(tensor, key, kind):
    return Internal(f"{tensor} {key} {kind.__name__}")


@pytest.mark.parametrize("allowed", [True, False])
def test_a_tensor_that_says_nothing_of_memory(allowed):
    assert memory_range("x", {}, allowed, wrong) is None
    assert memory_range("x", {"binary_data": True}, allowed, wrong) is None


@pytest.mark.parametrize("key", [REGION, SIZE, OFFSET])
def test_memory_is_off_by_default(key):
    with pytest.raises(Unsupported, match="^Client shared memory is disabled. Start"):
        memory_range("x", {key: 1}, False, wrong)


def test_a_tensor_in_memory():
    given = {REGION: "r", SIZE: 8}
    assert memory_range("x", given, True, wrong) == MemoryRange("r", 8, 0)
    assert memory_range("x", {**given, OFFSET: 4}, True, wrong) == MemoryRange("r", 8, 4)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({SIZE: 8}, f"'{SIZE}' can not be specified without '{REGION}' parameter for tensor 'x'"),
        ({OFFSET: 8}, f"'{OFFSET}' can not be specified without '{REGION}'"),
        ({REGION: "r"}, f"'{SIZE}' must be specified along with '{REGION}' parameter for tensor"),
        ({REGION: "r", OFFSET: 1}, f"'{SIZE}' must be specified along with"),
        ({REGION: 1, SIZE: 8}, f"x {REGION} str"),
        ({REGION: "r", SIZE: "8"}, f"x {SIZE} int"),
        ({REGION: "r", SIZE: True}, f"x {SIZE} int"),
        ({REGION: "r", SIZE: 8, OFFSET: 1.0}, f"x {OFFSET} int"),
    ],
)
def test_parameters_that_do_not_fit_together(given, text):
    with pytest.raises(MantaError, match=text):
        memory_range("x", given, True, wrong)


# --- registration ----------------------------------------


def test_what_is_registered_has_a_status_until_it_is_unregistered(memory):
    made = Regions()
    first, second = memory(bytes(8)), memory(bytes(8))
    made.register("a", f"/{first.name}", 0, 8)
    made.register("b", second.name, 2, 6)
    one = {"name": "a", "key": f"/{first.name}", "offset": 0, "byte_size": 8}
    other = {"name": "b", "key": second.name, "offset": 2, "byte_size": 6}
    assert made.status("system", "") == [one, other]
    assert made.status("system", "b") == [other]
    assert made.status("cuda", "") == []
    made.unregister("cuda", "")  # another kind of memory
    made.unregister("system", "a")
    assert made.status("system", "") == [other]
    made.register("a", first.name, 0, 8)
    made.unregister("system", "")
    assert made.status("system", "") == []
    made.unregister("system", "a")  # what is not there any more is no error
    made.unregister("cuda", "a")


def test_unknown_regions_and_kinds(registered):
    made, _ = registered
    with pytest.raises(NotFound, match="^Unable to find system shared memory region: 'q'$"):
        made.status("system", "q")
    with pytest.raises(NotFound, match="^Unable to find cuda shared memory region: 'q'$"):
        made.status("cuda", "q")
    with pytest.raises(NotFound, match="'r' is registered as system shared memory, not CUDA"):
        made.status("cuda", "r")
    with pytest.raises(InvalidArgument, match="CUDA shared memory region: 'q', GPUs not supported"):
        made.register_cuda("q")
    with pytest.raises(InvalidArgument, match="'region name' is necessary to register cuda"):
        made.register_cuda("")


def test_a_name_is_taken_once(registered):
    made, file = registered
    with pytest.raises(AlreadyExists, match="^shared memory region 'r' already in manager$"):
        made.register("r", file.name, 0, 8)
    assert made.status("system", "r")[0]["offset"] == 4


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (0, 65),
        (1, 64),
        (64, 1),
        (65, 0),
        (0, 0),
        (64, 0),
        (2**64 - 1, 2),
        (2**64 - 32, 64),
        (2, 2**64 - 1),
        (2**63, 2**63),
        (-1, 8),
        (0, -1),
    ],
)
def test_a_region_lies_within_its_object(memory, offset, size):
    made, file, before = Regions(), memory(bytes(64)), descriptors()
    with pytest.raises(InvalidArgument) as caught:
        made.register("r", file.name, offset, size)
    assert str(caught.value) == "failed to register shared memory region 'r': invalid args"
    assert (len(made), descriptors()) == (0, before)


@pytest.mark.parametrize("slashes", ["", "/", "///"])
def test_the_keys_of_the_python_backend_are_reserved(slashes):
    key = f"{slashes}{RESERVED}_mine"
    with pytest.raises(InvalidArgument) as caught:
        Regions().register("r", key, 0, 8)
    assert str(caught.value) == (
        f"cannot register shared memory region 'r' with key '{key}' as the key contains the "
        "reserved prefix 'triton_python_backend_shm_region_'"
    )


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        ".",
        "..",
        "/..",
        "../etc/passwd",
        "a/b",
        "/a/../b",
        "a/",
        "./triton_python_backend_shm_region_x",
        "a\0b",
        "\ud800",
        "x" * 256,
        "sem.x",
        "/sem.x",
    ],
)
def test_a_key_is_the_name_of_a_shared_memory_object(key):
    with pytest.raises(InvalidArgument, match="is not the name of a shared memory object$"):
        Regions().register("r", key, 0, 8)


def test_only_ordinary_files_are_opened(memory):
    target, before = memory(bytes(8)), descriptors()
    kinds = ("link", "pipe", "folder")
    places = {kind: target.with_name(f"{target.name}-{kind}") for kind in kinds}
    try:
        places["link"].symlink_to(target)
        os.mkfifo(places["pipe"])
        places["folder"].mkdir()
        for key in (*(place.name for place in places.values()), "manta-nowhere"):
            with pytest.raises(InvalidArgument) as caught:
                Regions().register("r", key, 0, 8)
            assert str(caught.value) == f"Unable to open shared memory region: '{key}'"
    finally:
        places["link"].unlink(missing_ok=True)
        places["pipe"].unlink(missing_ok=True)
        places["folder"].rmdir()
    assert descriptors() == before


def test_names_are_there_and_not_endless(memory):
    made, file = Regions(), memory(bytes(8))
    with pytest.raises(InvalidArgument, match="'region name' is necessary to register system"):
        made.register("", file.name, 0, 8)
    with pytest.raises(InvalidArgument, match="at most 1024 characters"):
        made.register("x" * 1025, file.name, 0, 8)
    made.register("x" * 1024, file.name, 0, 8)


def test_regions_are_counted(memory, monkeypatch):
    monkeypatch.setattr(regions, "MAX_REGIONS", 2)
    made, file = Regions(), memory(bytes(8))
    for name in "ab":
        made.register(name, file.name, 0, 8)
    with pytest.raises(InvalidArgument, match="at most 2 shared memory regions"):
        made.register("c", file.name, 0, 8)
    made.unregister("system", "a")
    made.register("c", file.name, 0, 8)


def test_descriptors_are_closed_with_their_regions(memory):
    file, before = memory(bytes(8)), descriptors()
    made = Regions()
    for name in "abc":
        made.register(name, file.name, 0, 8)
    assert descriptors() == before + 3
    made.unregister("system", "b")
    assert descriptors() == before + 2
    with made.held([MemoryRange("a", 8)]) as held:
        made.unregister("system", "")
        assert descriptors() == before + 1
        assert read(held["a"], 0, 8) == bytes(8)
    del held
    assert descriptors() == before


# --- use ----------------------------------------


def test_bytes_come_and_go(registered):
    made, file = registered
    with made.held([MemoryRange("r", 60)]) as held:
        region = held["r"]
        assert read(region, 0, 60) == bytes(range(4, 64))
        assert read(region, 58, 2) == bytes((62, 63))
        assert read(region, 0, 0) == b""
        region.write(56, memoryview(b"abcd"))
        region.write(0, memoryview(b""))
    assert file.read_bytes() == bytes(range(60)) + b"abcd"


def test_an_object_that_is_unlinked_lives_on(registered):
    made, file = registered
    file.unlink()
    file.write_bytes(bytes(64))  # another object by the same name
    with made.held([MemoryRange("r", 60)]) as held:
        assert read(held["r"], 0, 4) == bytes((4, 5, 6, 7))


@pytest.mark.parametrize("left", [0, 3, 4, 63])
def test_an_object_that_is_cut_short_is_an_error_and_no_signal(registered, left):
    made, file = registered
    os.truncate(file, left)
    with made.held([MemoryRange("r", 60)]) as held:
        region, text = held["r"], "Invalid offset . byte size for shared memory region: 'r'$"
        with pytest.raises(InvalidArgument, match=text):
            read(region, 0, 60)
        with pytest.raises(InvalidArgument, match=text):
            region.write(0, memoryview(b"x" * 60))
    assert file.stat().st_size == left  # and a write does not make it whole again
    os.truncate(file, 64)
    with made.held([MemoryRange("r", 60)]) as held:
        held["r"].write(0, memoryview(b"x" * 60))
        assert read(held["r"], 0, 60) == b"x" * 60


@pytest.mark.parametrize(
    ("size", "offset", "text"),
    [
        (8, 60, "Invalid offset for shared memory region: 'r'"),
        (0, 60, "Invalid offset for shared memory region: 'r'"),
        (8, 2**64 - 32, "Invalid offset for shared memory region: 'r'"),
        (8, -1, "Invalid offset for shared memory region: 'r'"),
        (61, 0, "Invalid offset + byte size for shared memory region: 'r'"),
        (60, 1, "Invalid offset + byte size for shared memory region: 'r'"),
        (-1, 0, "Invalid offset + byte size for shared memory region: 'r'"),
        (2**64 - 1, 0, "Invalid offset + byte size for shared memory region: 'r'"),
        (
            2**64 - 32,
            32,
            "Integer overflow detected: byte_size (18446744073709551584) + offset (32) exceeds "
            "maximum value (18446744073709551615) for region 'r'",
        ),
    ],
)
def test_what_lies_outside_of_a_region(registered, size, offset, text):
    made, _ = registered
    good = MemoryRange("r", 4)
    with pytest.raises(InvalidArgument) as caught:
        with made.held([good, MemoryRange("r", size, offset)]):
            pass
    assert str(caught.value) == text
    made.unregister("system", "r")
    assert len(made) == 0  # nobody is left who uses it


def test_a_region_that_nobody_has_registered(registered):
    made, _ = registered
    with pytest.raises(NotFound) as caught:
        with made.held([MemoryRange("r", 4), MemoryRange("q", 4)]):
            pass
    assert str(caught.value) == "Unable to find shared memory region: 'q'"


def test_a_region_in_use_goes_with_its_last_use(registered):
    """And until then it is there for all, as in Triton."""
    made, file = registered
    with made.held([MemoryRange("r", 60)]) as held:
        made.unregister("system", "r")
        assert len(made.status("system", "")) == 1
        with pytest.raises(AlreadyExists):
            made.register("r", file.name, 0, 8)
        with made.held([MemoryRange("r", 4), MemoryRange("r", 4, 8)]):
            made.unregister("system", "")
        assert len(made) == 1
        assert read(held["r"], 0, 1) == b"\4"
    assert len(made) == 0
    with pytest.raises(NotFound):
        made.status("system", "r")
    made.register("r", file.name, 0, 8)
    with made.held([MemoryRange("r", 8)]):
        pass
    assert len(made) == 1  # the new one was never unregistered


def test_a_use_that_fails_is_over_too(registered):
    made, _ = registered
    with pytest.raises(ZeroDivisionError):
        with made.held([MemoryRange("r", 4)]):
            made.unregister("system", "r")
            raise ZeroDivisionError
    assert len(made) == 0


def test_copies_of_running_requests_have_a_limit():
    made = Regions(100)
    with made.copying(60):
        with made.copying(40):
            pass
        with pytest.raises(Unavailable, match="would exceed 100 bytes; try again$"):
            with made.copying(41):
                pass
    with pytest.raises(ZeroDivisionError):
        with made.copying(60):
            raise ZeroDivisionError
    with made.copying(100):  # what has failed keeps no room
        pass
