"""What an AOTI package tells of its inputs without being run: the C++ source that lies in it.

The compiler writes a check of each input's datatype and sizes into that source, whether or not the
checks are switched on. Pure text, no torch; a package without its source tells nothing. Called by
`aoti.py` and `autocomplete.py`.
"""

from __future__ import annotations

import contextlib
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from deployments import archives

from .leaves import Leaf, Size

_SOURCE_LIMIT_BYTES = 256 << 20
_CHECK = re.compile(r"static void check_input_(\d+)\((.*?)^}", re.DOTALL | re.MULTILINE)
_TYPE = re.compile(r"(\w+)_expected_dtype = aoti_torch_dtype_(\w+)\(\)")
_FIXED = re.compile(r"if \((\d+)L* != \w+_size\[(\d+)\]\)")
_LOW = re.compile(r"if \(\w+_size\[(\d+)\] < (-?\d+)L*\)")
_HIGH = re.compile(r"if \(\w+_size\[(\d+)\] > (\d+)L*\)")
_SPEC = re.compile(r'^\s*(?:in|out)_spec_ = R"\((.*?)\)";$', re.MULTILINE)
_STRIDE = re.compile(r"\w+_stride\[(\d+)\]")
_ASSERTED = re.compile(r"assert_size_stride\((\w+), \{([^}]*)\}")


@dataclass(frozen=True, slots=True)
class Package:
    """`inputs` by position and the call spec of inputs and outputs; empty where the package does
    not tell."""

    inputs: Mapping[int, Leaf]
    specs: tuple[str, ...] = ()


def read(path: Path) -> Package:
    for source in _readable(path):
        inputs = _inputs(source)
        specs = tuple(_SPEC.findall(source))
        if inputs or specs:
            return Package(inputs, specs if len(specs) == 2 else ())
    return Package({})


def _readable(path: Path) -> list[str]:
    with contextlib.suppress(*archives.UNREADABLE):
        return list(_sources(path))
    return []


def _sources(path: Path) -> Iterator[str]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            folder, _, name = info.filename.rpartition("/")
            if not folder.endswith("data/aotinductor/model") or not name.endswith(".cpp"):
                continue
            if not name.endswith(".kernel.cpp") and info.file_size <= _SOURCE_LIMIT_BYTES:
                yield archive.read(info).decode(errors="replace")


def _inputs(source: str) -> dict[int, Leaf]:
    asserted = _asserted(source)
    found: dict[int, Leaf] = {}
    for position, body in _CHECK.findall(source):
        kind = _TYPE.search(body)
        if kind is not None:
            found[int(position)] = Leaf(kind.group(2), _sizes(body, asserted.get(kind.group(1))))
    return found


def _sizes(body: str, asserted: int | None) -> tuple[Size, ...]:
    fixed = {int(axis): int(size) for size, axis in _FIXED.findall(body)}
    low = {int(axis): int(size) for axis, size in _LOW.findall(body)}
    high = {int(axis): int(size) for axis, size in _HIGH.findall(body)}
    strides = {int(axis) for axis in _STRIDE.findall(body)}
    # A size without any bound is not looked at; the last stride always is.
    rank = max([-1, *fixed, *low, *high, *strides]) + 1
    rank = asserted if asserted is not None else rank
    sizes = []
    for axis in range(rank):
        if axis in fixed:
            sizes.append(Size(fixed[axis], fixed[axis]))
            continue
        bounds = max(0, low.get(axis, 0)), high.get(axis)
        # Its own names for sizes are those of the arguments that it happens to assert: what has the
        # same bounds is taken to be the same.
        sizes.append(Size(*bounds, f"{bounds[0]}..{bounds[1]}"))
    return tuple(sizes)


def _asserted(source: str) -> dict[str, int]:
    """Ranks by argument, as the compiled code names them, where it asserts them."""
    return {
        name: len([size for size in listed.split(",") if size.strip()])
        for name, listed in _ASSERTED.findall(source)
    }
