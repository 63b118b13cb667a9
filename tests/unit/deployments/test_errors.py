from __future__ import annotations

import pickle

import grpc
import pytest

from deployments import errors
from deployments.errors import GRPC_STATUS, HTTP_STATUS, Code, MantaError

FACTS = ("m", 3, "why")


def tree(root):
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


TREE = list(tree(MantaError))


@pytest.mark.parametrize("table", [HTTP_STATUS, GRPC_STATUS])
def test_tables_are_total(table):
    assert set(table) == set(Code)


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_every_error_has_a_status_and_survives_pickling(kind):
    error = kind(*FACTS)
    assert 400 <= HTTP_STATUS[error.code] <= 599
    assert grpc.StatusCode[GRPC_STATUS[error.code]] is not grpc.StatusCode.OK
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error) != ""
    assert again.args == error.args


def test_the_tree_is_drawn_whole():
    drawn = errors.__doc__ or ""
    assert [kind.__name__ for kind in TREE if kind.__name__ not in drawn] == []


@pytest.mark.parametrize("fact", ["{", "{0}", "{name}", "%s", "a\r\nb"])
def test_facts_are_not_formats(fact):
    assert fact in str(errors.InvalidArgument(fact))
    assert fact in str(errors.UnknownModel(fact))
