from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union  # noqa: UP035

import pytest
import torch
from torch import Tensor

from deployments.runtimes.hints import describe, structure_of
from deployments.structure import STRINGS, TENSOR, UNKNOWN


class Point(NamedTuple):
    left: Tensor
    right: List[str]  # noqa: UP006


@pytest.mark.parametrize(
    ("hint", "what", "inside"),
    [
        (Tensor, "tensor", ()),
        (torch.nn.Parameter, "tensor", ()),
        (List[str], "strings", ()),  # noqa: UP006
        (list[Tensor], "list", (TENSOR,)),
        (list, "list", (UNKNOWN,)),
        (Sequence[Tensor], "list", (TENSOR,)),
        (Dict[str, Tensor], "dict", (TENSOR,)),  # noqa: UP006
        (Mapping[str, list[str]], "dict", (STRINGS,)),
        (dict, "dict", (UNKNOWN,)),
        (Tuple[Tensor, List[str]], "tuple", (TENSOR, STRINGS)),  # noqa: UP006
        (tuple[Tensor, ...], "tuple", (TENSOR,)),
        (tuple, "tuple", (UNKNOWN,)),
        (Optional[Tensor], "tensor", ()),  # noqa: UP045
        (Tensor | None, "tensor", ()),
        (Union[Tensor, int], "unknown", ()),  # noqa: UP007
        (int, "unknown", ()),
        (Any, "unknown", ()),
        ("what", "unknown", ()),
        (None, "unknown", ()),
    ],
)
def test_structure_of(hint, what, inside):
    found = structure_of(hint)
    assert (found.what, found.items) == (what, inside)
    assert found.optional == ("None" in str(hint) and hint is not None or "Optional" in str(hint))


def test_named_tuples_are_made_of_their_class():
    found = structure_of(Point)
    assert found.fields == ("left", "right") and found.make is Point


class Net(torch.nn.Module):
    def forward(self, x, mask=None, /, y: Tensor | None = None, *more, bias: list[Tensor], **rest):
        return x


class Odd(torch.nn.Module):
    def forward(self, x: "nothing of that name"):  # type: ignore  # noqa
        return x


def test_describe():
    found = describe(Net())
    told = [(a.name, a.required, a.only, a.structure.optional) for a in found.arguments]
    assert told == [
        ("x", True, "position", False),
        ("mask", False, "position", False),
        ("y", False, "", True),
        ("bias", True, "keyword", False),
    ]
    assert found.rest == {"ARGS", "KWARGS"} and found.by_order
    assert found.offers()[-3:] == ["KWARGS[bias][<n>]", "ARGS[..]", "KWARGS[..]"]


def brings_one(forward):
    @functools.wraps(forward)
    def wrapper(self, *given):
        return forward(self, *given, torch.ones(1))

    return wrapper


class Decorated(torch.nn.Module):
    @torch.no_grad()
    def forward(self, x, y=None):
        return x


class Bringing(torch.nn.Module):
    @torch.no_grad()
    @brings_one
    def forward(self, x, y):
        return x + y


def test_decorators():
    """torch's are looked through; others may bring what forward needs."""
    assert [(a.name, a.required) for a in describe(Decorated()).arguments] == [
        ("x", True),
        ("y", False),
    ]
    found = describe(Bringing())
    assert not found.arguments and found.rest == {"ARGS"}


def test_annotations_that_cannot_be_read_are_none():
    (argument,) = describe(Odd()).arguments
    assert argument.structure == UNKNOWN


def test_a_module_without_forward_takes_anything():
    assert describe(torch.nn.Module()).rest == {"ARGS"}
