from __future__ import annotations

import pytest

from deployments.structure import (
    STRINGS,
    TENSOR,
    UNKNOWN,
    Structure,
    inside,
    names_inside,
    settled,
    told,
)

TENSORS = Structure("list", "List[Tensor]", (TENSOR,), whole=False)
NAMED = Structure("dict", "Dict[str, Tensor]", (TENSOR,))
POINT = Structure("tuple", "Point", (TENSOR, STRINGS), ("left", "right"))
ALL = Structure("tuple", "Tuple[..]", (TENSORS, NAMED, POINT, UNKNOWN))


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ((), ALL),
        ((0, 7), TENSOR),
        ((0, "a"), None),
        ((1, "a"), TENSOR),
        ((1, "a", 0), None),
        ((2, 1), STRINGS),
        ((2, "right"), STRINGS),
        ((2, "middle"), None),
        ((2, 2), None),
        ((3, "what", 5, "ever"), UNKNOWN),
        ((4,), None),
    ],
)
def test_inside(path, found):
    assert inside(ALL, path) == found


def test_fields_and_keys_have_one_spelling():
    assert settled(ALL, (2, "right")) == (2, 1)
    assert settled(ALL, (1, 0)) == (1, "0")
    numbers = Structure("dict", "Dict[int, Tensor]", (TENSOR,), keys="int")
    assert settled(numbers, (3,)) == (3,) and inside(numbers, ("a",)) is None


def test_names_inside():
    assert [*names_inside(ALL, "RESULT")] == [
        "RESULT[0][<n>]",
        "RESULT[1][<key>]",
        "RESULT[2][0]",
        "RESULT[2][1]",
        "RESULT[3]",
    ]


def test_offers_are_bounded():
    assert told(f"ARGS[{i}]" for i in range(100)).endswith("ARGS[23] and 76 more")
    assert told([]) == "; it offers nothing"
