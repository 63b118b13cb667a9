from __future__ import annotations

import json
from typing import Any

import pytest

from configs.errors import ConfigError
from deployments.runtimes.callspec import parse_call_spec

LEAF: dict[str, Any] = {"type": None, "context": None, "children_spec": []}


def node(kind: str, *children, keys=None):
    return {"type": kind, "context": json.dumps(keys), "children_spec": list(children)}


def spec(arguments, keywords=None, result=LEAF):
    keywords = keywords or node("builtins.dict", keys=[])
    root = node("builtins.tuple", node("builtins.tuple", *arguments), keywords)
    return parse_call_spec(json.dumps([1, root]), json.dumps([1, result]))


def test_bare_and_one_element_results():
    assert [s.name for s in spec([LEAF]).outputs or ()] == ["RESULT"]
    one = spec([LEAF], result=node("builtins.tuple", LEAF))
    assert [s.name for s in one.outputs or ()] == ["RESULT[0]"]


def test_keywords_alone_and_ordered_dictionaries():
    ordered = node("collections.OrderedDict", LEAF, LEAF, keys=["z", "a"])
    made = spec([], node("builtins.dict", LEAF, keys=["k"]), result=ordered)
    assert [s.name for s in made.inputs or ()] == ["KWARGS[k]"]
    assert [s.name for s in made.outputs or ()] == ["RESULT[z]", "RESULT[a]"]


def test_nested_keywords_keep_their_order():
    inner = node("builtins.dict", LEAF, LEAF, keys=["z", "a"])
    made = spec([LEAF], node("builtins.dict", inner, LEAF, keys=["k2", "k1"]))
    assert [s.name for s in made.inputs or ()] == [
        "ARGS[0]",
        "KWARGS[k2][z]",
        "KWARGS[k2][a]",
        "KWARGS[k1]",
    ]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "the model has no inputs"),
        ([node("builtins.list")], "empty list"),
        ([node("collections.namedtuple", LEAF)], r"ARGS\[0\] is a collections.namedtuple"),
        ([node("builtins.dict", LEAF, keys=["a b"])], "key 'a b'"),
        ([node("builtins.dict", LEAF, keys=['a"'])], "key"),
        ([node("builtins.dict", LEAF, keys=["a[0]"])], "key"),
        ([node("builtins.dict", LEAF, keys=[""])], "key"),
        ([node("builtins.dict", LEAF, keys=[1])], "not a string"),
        ([node("builtins.dict", LEAF, keys=["a", "b"])], "2 keys and 1 values"),
    ],
)
def test_structures_that_are_refused(arguments, text):
    with pytest.raises(ConfigError, match="failed to parse input call spec: .*" + text):
        spec(arguments)


@pytest.mark.parametrize("text", ["", "[]", "[1, 2]", "{}"])
def test_a_spec_that_is_none(text):
    with pytest.raises(ConfigError, match="failed to parse input call spec"):
        parse_call_spec(text, text)
