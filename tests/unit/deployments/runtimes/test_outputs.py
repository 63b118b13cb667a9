from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from configs.errors import ConfigError
from deployments.errors import ExecutionFailed, InvalidArgument, MantaError
from deployments.runtimes.outputs import pick
from deployments.signature import Signature, Slot, bind
from tests.models import config, string_output

T, U = torch.ones(1), torch.zeros(1)
Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Holder:
    inner: torch.Tensor


SIGNATURE = Signature((Slot(0, "ARGS[0]", ("ARGS", 0), "x"),))


def picked(result: Any, *names: str, eager: bool = False) -> list[object]:
    made = config({"x": (1,)}, {name: (1,) for name in names})
    return pick(result, made, bind(made, SIGNATURE), list_is_tuple=eager)


@pytest.mark.parametrize("result", [(T, U), Pair(T, U)])
def test_tuples_have_positions(result):
    assert picked(result, "O__1", "P__0") == [U, T]
    assert picked(result, "only") == [T]


def test_a_bare_tensor_and_a_list_of_strings_are_one_output():
    assert picked(T, "O") == [T]
    assert picked(["a", "b"], "O") == [["a", "b"]]
    assert picked((T, ["a"]), "O", "P") == [T, ["a"]]


def test_nested_lists_of_strings_are_one_output_where_only_one_is_wanted():
    made = config({"x": (1,)}, [string_output("O")])
    nested = [["a", "b"], [b"c", "d"]]
    for result in (nested, ["a", b"b"], (nested,)):
        found = pick(result, made, bind(made, SIGNATURE), list_is_tuple=True)
        assert found == [nested if isinstance(result, tuple) else result]
    made = config({"x": (1,)}, [string_output("O"), string_output("P")])
    assert pick(nested, made, bind(made, SIGNATURE), list_is_tuple=True) == nested


def test_a_list_of_tensors_has_positions_in_eager_models_only():
    assert picked([T, U], "O", "P", eager=True) == [T, U]
    with pytest.raises(ExecutionFailed, match=r"Got type list\(Tensor, Tensor\)"):
        picked([T, U], "O", "P")


@pytest.mark.parametrize("result", [{"a": T}, None, 1.5, (T, (T, U)), (T, [T])])
def test_structures_without_positions(result):
    with pytest.raises(MantaError):
        picked(result, "O__0", "P__1")


def test_result_reaches_inside():
    result = {"a": (T, [U]), "7": T, "b": {"c": U}}
    names = ["RESULT[a][1][0]", "RESULT[7]", "RESULT[b][c]"]
    assert picked(result, *names) == [U, T, U]
    assert picked(T, "RESULT") == [T]
    with pytest.raises(InvalidArgument, match=r"returned dict\(a: tuple\(Tensor, list\(Tensor\)\)"):
        picked(result, "RESULT[a][2]")


def test_fields_of_named_tuples_and_dataclasses():
    names = ["RESULT[two][second]", "RESULT[two][0]", "RESULT[three][inner]"]
    assert picked({"two": Pair(T, U), "three": Holder(U)}, *names) == [U, T, U]
    with pytest.raises(InvalidArgument, match="refers to an output which doesn't exist"):
        picked({"three": Holder(U)}, "RESULT[three][__class__]")


def test_config_mixing_result_and_plain_names_is_refused():
    with pytest.raises(ConfigError):
        picked(T, "RESULT", "plain")
