"""Restricted groups as users write them, and that their values stay where they are."""

from __future__ import annotations

import json
import logging
import pickle
from typing import Any

import pytest
from pydantic import ValidationError

from configs.restricted import APIS
from configs.server import ServerSettings

SECRET = "s3cr3t-v4lue"
FIELDS = ("http_restricted_api", "grpc_restricted_protocol")


def settings(*groups: Any, field: str = FIELDS[0]) -> ServerSettings:
    given: dict[str, Any] = {field: groups}
    return ServerSettings(**given)


@pytest.mark.parametrize("field", FIELDS)
def test_groups(field: str) -> None:
    made = settings(f"health,model-config:X-Key={SECRET}", "inference:k=a=b: c", field=field)
    one, two = getattr(made, field)
    assert (one.apis, one.key) == (("health", "model-config"), "X-Key")
    assert one.value.get_secret_value() == SECRET
    assert (two.apis, two.key, two.value.get_secret_value()) == (("inference",), "k", "a=b: c")
    assert pickle.loads(pickle.dumps(made)) == made


def test_every_api_can_be_named() -> None:
    (group,) = settings(",".join(APIS) + ":k=v").http_restricted_api
    assert group.apis == APIS


def test_in_yaml_a_group_may_also_be_an_object() -> None:
    (group,) = settings({"apis": ["trace"], "key": "k", "value": SECRET}).http_restricted_api
    assert group.value.get_secret_value() == SECRET


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    ("groups", "reason"),
    [
        ([f"health,nonsense:k={SECRET}"], "unknown API in a restricted group; there are health"),
        ([f"{SECRET}:health=k"], "unknown API"),
        ([f":k={SECRET}"], "unknown API"),
        ([f"health,:k={SECRET}"], "unknown API"),
        ([f"Health:k={SECRET}"], "unknown API"),
        ([f"health:k={SECRET}", "trace,health:j=w"], "API 'health' is restricted twice"),
        ([f"health,health:k={SECRET}"], "API 'health' is restricted twice"),
        ([f"health:{SECRET}"], "has the form"),
        ([f"health={SECRET}"], "has the form"),
        ([SECRET], "has the form"),
        ([""], "has the form"),
        (["health:k="], "value for key 'k'"),
        ([f"health:k={SECRET} "], "value for key 'k'"),
        ([f"health:k=\t{SECRET}"], "value for key 'k'"),
        ([f"health:k=é{SECRET}"], "value for key 'k'"),
        ([f"health:k={SECRET}\r\nx: y"], "value for key 'k'"),
        ([f"health:={SECRET}"], "cannot be a header's name"),
        ([f"health:a b={SECRET}"], "cannot be a header's name"),
        ([f"health:a\r\nb={SECRET}"], "cannot be a header's name"),
        ([{"apis": ["health"], "key": "k", "value": SECRET, "more": 1}], "more"),
        ([{"apis": ["health"], "key": "k", "value": 5}], "value"),
    ],
)
def test_refused_without_a_word_of_the_value(field: str, groups: list[Any], reason: str) -> None:
    with pytest.raises(ValidationError) as caught:
        settings(*groups, field=field)
    assert reason in str(caught.value)
    assert SECRET not in str(caught.value) and SECRET not in repr(caught.value)


def test_text_instead_of_a_list_is_refused_without_it_too() -> None:
    with pytest.raises(ValidationError) as caught:
        ServerSettings.model_validate({"http_restricted_api": f"health:k={SECRET}"})
    assert SECRET not in str(caught.value)


def test_a_key_of_metadata_is_no_binary_one() -> None:
    settings("health:x-bin=v")
    with pytest.raises(ValidationError, match="cannot be a header's name"):
        settings("health:x-bin=v", field="grpc_restricted_protocol")


def test_the_value_is_nowhere_to_be_read(caplog: pytest.LogCaptureFixture) -> None:
    made = settings(f"health:k={SECRET}")
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("x").info("%s %r %s", made, made, made.model_dump())
    shown = [caplog.text, repr(made), str(made), made.model_dump_json()]
    shown += [json.dumps(made.model_dump(mode="json")), repr(vars(made))]
    assert all(SECRET not in text for text in shown)
