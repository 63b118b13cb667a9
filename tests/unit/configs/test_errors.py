"""ConfigError: its text, and that it survives pickling."""

from __future__ import annotations

import pickle

from configs.errors import ConfigError


def test_text_has_what_is_known():
    assert str(ConfigError("no")) == "no"
    assert str(ConfigError("no", field="name")) == "name: no"
    error = ConfigError("no", field="input[0].dims").located("m/config.pbtxt", 7)
    assert str(error) == "m/config.pbtxt:7: input[0].dims: no"
    assert str(ConfigError("no", file="a", line=1).located("b", 2)) == "a:1: no"


def test_pickles():
    error = ConfigError("no", file="f", field="a", line=3)
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "f:3: a: no"
