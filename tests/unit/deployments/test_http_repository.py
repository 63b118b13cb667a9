"""A load request's parameters as HTTP has them."""

from __future__ import annotations

import base64

import pytest

from deployments.errors import Internal, InvalidArgument
from deployments.http_repository import load_parameters


def test_files_are_decoded_and_the_configuration_stays_text():
    data = bytes(range(256))
    given = {"config": "{}", "file:1/model.pt": base64.b64encode(data).decode(), "file:e": ""}
    assert load_parameters(given) == {"config": "{}", "file:1/model.pt": data, "file:e": b""}
    assert load_parameters({}) == {}


@pytest.mark.parametrize("value", ["a", "a===", "AA AA", "AAA\n", "grüß", "AAAA*"])
def test_what_is_not_base64_is_refused(value):
    with pytest.raises(InvalidArgument, match="'file:1/m' is not base64"):
        load_parameters({"file:1/m": value})


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"x": "1"}, "unrecognized load parameter 'x'"),
        ({"config": {}}, "Unable to parse 'config': attempt to access JSON non-string as string"),
        ({"file:1/m": 1}, "Unable to parse 'file:1/m'"),
    ],
)
def test_what_is_no_such_parameter_is_500_as_in_triton(given, text):
    with pytest.raises(Internal, match=text):
        load_parameters(given)
