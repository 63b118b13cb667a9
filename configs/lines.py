"""Where each field of a config.pbtxt stands: a small tolerant scan of protobuf text format.

Owns only positions; values and grammar are `text_format`'s business. Called by `pbtxt.py`, on
valid text and on the part of invalid text that leads up to the error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from google.protobuf.descriptor import Descriptor, FieldDescriptor

_TOKEN = re.compile(
    r"""(?P<blank>\s+|\#[^\n]*)
      | (?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
      | (?P<name>[A-Za-z_]\w*)
      | (?P<other>[-+]?[\w.]+|.)""",
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Token:
    kind: str
    text: str
    start: int
    line: int


def tokens(text: str) -> Iterator[Token]:
    """The tokens of protobuf text, comments and blanks left out; lines count from 1."""
    line = 1
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup or "other"
        if kind != "blank":
            yield Token(kind, match.group(), match.start(), line)
        line += match.group().count("\n")


@dataclass(slots=True)
class _Scope:
    """A message that is open, or with `listed` the list of one field's values."""

    prefix: str
    descriptor: Descriptor | None
    listed: str | None = None
    counts: Counter[str] = field(default_factory=Counter)
    line: int = 1

    def member(self, name: str) -> FieldDescriptor | None:
        return None if self.descriptor is None else self.descriptor.fields_by_name.get(name)


def field_lines(text: str, descriptor: Descriptor) -> dict[str, int]:
    """Field path -> line: `input`, `input[0]`, `input[0].dims[1]`, `parameters["KEY"]`."""
    lines: dict[str, int] = {}
    stack = [_Scope("", descriptor)]
    name, previous = "", ""

    def element(scope: _Scope, line: int) -> str:
        """The path of the next value of `name`, which is what an index counts."""
        if scope.descriptor is None:  # inside a field that the proto does not have
            return ""
        member = scope.member(name)
        path = scope.prefix + name
        lines.setdefault(path, line)
        if member is not None and member.is_repeated:
            path = f"{path}[{scope.counts[name]}]"
            scope.counts[name] += 1
            lines.setdefault(path, line)
        return path

    for token in tokens(text):
        scope = stack[-1]
        owner = stack[-2] if scope.listed is not None else scope
        if token.text in ("{", "<"):
            name = scope.listed or name
            path, member = element(owner, token.line), owner.member(name)
            inner = None if member is None else member.message_type
            stack.append(_Scope(f"{path}.", inner, line=token.line))
        elif token.text == "[":
            stack.append(_Scope("", None, listed=name))
        elif token.text in ("}", ">", "]"):
            if len(stack) > 1:
                stack.pop()
        elif scope.listed is not None and token.text not in (",", "-"):
            name = scope.listed
            element(owner, token.line)
        elif token.kind == "name" and previous != ":":
            name = token.text
            if scope.descriptor is not None:
                lines.setdefault(scope.prefix + name, token.line)
        elif previous == ":":
            element(scope, token.line)
            _note_map_key(lines, scope, name, token)
        previous = token.text
    return lines


def _note_map_key(lines: dict[str, int], scope: _Scope, name: str, token: Token) -> None:
    if name == "key" and scope.descriptor and scope.descriptor.GetOptions().map_entry:
        map_path = scope.prefix[: scope.prefix.rindex("[")]
        lines.setdefault(f'{map_path}["{token.text[1:-1]}"]', token.line)


def line_of(lines: dict[str, int], path: str | None) -> int | None:
    """The line of a field, or of the nearest field around it that is written down."""
    while path:
        if path in lines:
            return lines[path]
        if path.endswith("]"):
            path = path[: path.rindex("[")]
        else:
            path = path.rpartition(".")[0]
    return None


def field_before(text: str, descriptor: Descriptor, line: int, column: int) -> str | None:
    """The field that was being written at a place: the last to begin up to its token."""
    above = text.split("\n")[: line - 1]
    place = sum(len(one) + 1 for one in above) + column - 1
    end = next((t.start + len(t.text) for t in tokens(text) if t.start >= place), len(text))
    return next(reversed(field_lines(text[:end], descriptor)), None)
