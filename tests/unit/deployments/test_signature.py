from __future__ import annotations

import pytest

from configs.errors import ConfigError
from configs.model import ModelInput, ModelOutput
from deployments.signature import Signature, Slot, accessors, bind, ordinal
from tests.models import config, string_input, string_output


def script(*arguments: str, strings: bool = False) -> Signature:
    return Signature(
        tuple(Slot(i, f"ARGS[{i}]", ("ARGS", i), a, strings) for i, a in enumerate(arguments))
    )


def positions(signature: Signature, *names: str) -> list[int]:
    made = config({name: (4,) for name in names}, {"O": (4,)})
    return [slot.position for slot in bind(made, signature).inputs]


@pytest.mark.parametrize(
    ("name", "number"),
    [("INPUT__0", 0), ("x__", 0), ("x__12", 12), ("a__1__2", None), ("x", None), ("x__-1", None)],
)
def test_ordinal(name, number):
    assert ordinal(name) == number


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("ARGS[2][keyA]", ("ARGS", 2, "keyA")),
        ("RESULT", ("RESULT",)),
        ("KWARGS[k]", ("KWARGS", "k")),
        ("RESULT[]", None),
        ("RESULT[a", None),
        ("RESULT[a]x", None),
        ('RESULT["a"]', None),
        ("RESULTS[0]", None),
    ],
)
def test_accessors(name, path):
    assert accessors(name) == path


def test_forward_names_in_any_order():
    assert positions(script("a", "b"), "b", "a") == [1, 0]


def test_ordinals_in_any_order():
    assert positions(script("a", "b"), "x__1", "y__0") == [1, 0]


def test_mixed_styles_fall_back_to_config_order():
    assert positions(script("a", "b"), "b", "x__0") == [0, 1]
    assert positions(script("a", "b"), "q", "r") == [0, 1]


def test_accessors_and_ordinals_mix():
    assert positions(script("a", "b"), "KWARGS[b]", "x__0") == [1, 0]
    assert positions(script("a", "b"), "ARGS[1]", "ARGS[0]") == [1, 0]


@pytest.mark.parametrize(
    ("names", "field", "text"),
    [
        (("x__0", "x__7"), "input[1].name", "ARGS[0] (a), ARGS[1] (b)"),
        (("x__0", "y__0"), "input[1].name", "same input"),
        (("ARGS[0]", "q"), "input[1].name", "'q' is not an input"),
        (("x__0",), "input", "configuration expects 1 inputs, model provides 2"),
        ((), "input", "configuration expects 0 inputs, model provides 2"),
    ],
)
def test_wrong_inputs_are_load_errors(names, field, text):
    with pytest.raises(ConfigError) as caught:
        positions(script("a", "b"), *names)
    assert caught.value.args[2] == field
    assert text in str(caught.value)


def test_dictionary_keys():
    binding = bind(
        config({"A": (4,), "ARGS[0][B]": (4,)}, {"O": (4,)}), Signature(None, dict_input=True)
    )
    assert [slot.path for slot in binding.inputs] == [("ARGS", 0, "A"), ("ARGS", 0, "B")]


def test_outputs_by_ordinal_result_or_order():
    def slots(*names: str):
        made = config({"a": (4,)}, {name: (4,) for name in names})
        return [(s.position, s.path) for s in bind(made, script("a")).outputs]

    assert slots("O__1", "O__0", "P__1") == [(1, ()), (0, ()), (1, ())]
    assert slots("sum", "O__0") == [(0, ()), (1, ())]
    assert slots("RESULT[a][0]", "O__1") == [(-1, ("a", 0)), (1, ())]
    with pytest.raises(ConfigError, match="neither RESULT"):
        slots("RESULT[a]", "sum")


def test_eager_goes_by_config_order_unless_told():
    eager = Signature(None)
    made = config({"INPUT__1": (4,), "INPUT__0": (4,)}, {"O__1": (4,)})
    binding = bind(made, eager)
    assert [slot.path for slot in binding.inputs] == [("ARGS", 0), ("ARGS", 1)]
    assert binding.outputs[0].position == 0
    with pytest.raises(ConfigError, match=r"no input is named ARGS\[0\]"):
        bind(config({"ARGS[1]": (4,)}, {"O": (4,)}), eager)
    with pytest.raises(ConfigError, match="same input"):
        bind(config({"ARGS[0]": (4,), "ARGS[0][a]": (4,)}, {"O": (4,)}), eager)


def test_no_output():
    with pytest.raises(ConfigError, match="must contain at least one output, none were specified"):
        bind(config({"a": (4,)}, {}), script("a"))


def test_optional_input_is_refused():
    optional = ModelInput(name="a", data_type="TYPE_FP32", dims=(4,), optional=True)
    with pytest.raises(ConfigError, match="does not support optional input"):
        bind(config([optional], {"O": (4,)}), script("a"))


def test_strings_meet_lists_of_strings_only():
    strings = script("a", strings=True)
    bind(config([string_input("a")], [string_output("O")]), strings)
    with pytest.raises(ConfigError, match=r"the model takes Tensor for ARGS\[0\]"):
        bind(config([string_input("a")], {"O": (4,)}), script("a"))
    with pytest.raises(ConfigError, match=r"takes List\[str\]"):
        bind(config({"a": (4,)}, {"O": (4,)}), strings)
    with pytest.raises(ConfigError, match="has only tensors"):
        bind(config([string_input("a")], {"O": (4,)}), Signature(None, strings=False))
    flat = ModelOutput(name="O", data_type="TYPE_STRING", dims=(2,))
    with pytest.raises(ConfigError, match="only 1-dimensional List of String .* as output for 'O'"):
        bind(config([string_input("a")], [flat]), strings)
