"""Names of inputs against what `forward` takes; those of flat models are in test_signature."""

from __future__ import annotations

import pytest

from configs.errors import ConfigError
from configs.model import ModelInput
from deployments.arguments import bind_inputs
from deployments.structure import STRINGS, TENSOR, UNKNOWN, Argument, Forward, Structure
from tests.models import config, string_input

TENSORS = Structure("list", "List[Tensor]", (TENSOR,), whole=False)
NAMED = Structure("dict", "Dict[str, Tensor]", (TENSOR,))
PAIR = Structure("tuple", "Tuple[Tensor, Tensor]", (TENSOR, TENSOR), ("left", "right"))
MAYBE = Structure("tensor", "Optional[Tensor]", optional=True)
SCRIPT = Forward(
    (
        Argument("x"),
        Argument("xs", TENSORS),
        Argument("named", NAMED),
        Argument("pair", PAIR),
        Argument("mask", MAYBE, required=False),
        Argument("scale", Structure("other", "float"), required=False, default=2.0),
    )
)
WHOLE = ("ARGS[0]", "ARGS[1][0]", "ARGS[2][a]", "ARGS[3][0]", "ARGS[3][1]")
# forward(self, x, mask=None, *more, scale=None, **options)
EAGER = Forward(
    (
        Argument("x", UNKNOWN),
        Argument("mask", UNKNOWN, required=False),
        Argument("scale", UNKNOWN, required=False, only="keyword"),
    ),
    frozenset(("ARGS", "KWARGS")),
    by_order=True,
)


def bind(forward, *names, optional=()):
    inputs = [
        ModelInput(name=n, data_type="TYPE_FP32", dims=(4,), optional=n in optional) for n in names
    ]
    return bind_inputs(config(inputs, {"O": (4,)}), forward)


def paths(forward, *names, optional=()):
    return [slot.name for slot in bind(forward, *names, optional=optional)]


def test_every_place_of_a_structured_forward():
    assert paths(SCRIPT, *WHOLE) == [*WHOLE]
    by_name = ("pair_right", "x", "KWARGS[xs][1]", "ARGS[1][0]", "KWARGS[named][0]", "KWARGS[mask]")
    renamed = ("KWARGS[pair][right]", "ARGS[3][left]", *by_name[1:])
    assert paths(SCRIPT, *renamed) == [
        "ARGS[3][1]",
        "ARGS[3][0]",
        "ARGS[0]",
        "ARGS[1][1]",
        "ARGS[1][0]",
        "ARGS[2][0]",
        "ARGS[4]",
    ]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (
            (*WHOLE, "ARGS[9]"),
            r"'ARGS\[9\]' is not an input of the model; it offers ARGS\[0\] \(x\)",
        ),
        ((*WHOLE, "ARGS[3][2]"), r"'ARGS\[3\]\[2\]' is not an input of the model"),
        ((*WHOLE, "ARGS[3][middle]"), r"middle\]' is not an input .* ARGS\[1\]\[<n>\] \(xs\)"),
        ((*WHOLE, "KWARGS[other]"), "not an input of the model"),
        ((*WHOLE, "KWARGS[0]"), "not an input of the model"),
        ((*WHOLE, "ARGS"), "not an input of the model"),
        ((*WHOLE, "other"), "'other' is not an input of the model"),
        ((*WHOLE, "ARGS[1][2]"), r"no input is named ARGS\[1\]\[1\], which the model needs; got "),
        (WHOLE[:-1], r"no input is named ARGS\[3\]\[1\]"),
        (WHOLE[1:], r"no input is named ARGS\[0\]"),
        ((*WHOLE[:2], *WHOLE[3:]), r"no input is named ARGS\[2\].*it offers .*ARGS\[2\]\[<key>\]"),
        ((*WHOLE, "KWARGS[x]"), r"'KWARGS\[x\]' and input 'ARGS\[0\]' are the same input"),
        ((*WHOLE, "ARGS[3][left]"), "are the same input of the model, ARGS"),
        ((*WHOLE, "ARGS[5]"), "takes 'scale' of type float"),
        (("x", "xs"), r"the model takes List\[Tensor\] for ARGS\[1\], which is no Tensor"),
        (("a", "b"), r"the model takes List\[Tensor\] for ARGS\[1\]"),
    ],
)
def test_what_leads_nowhere_meets_or_leaves_a_hole(names, text):
    with pytest.raises(ConfigError, match=text):
        bind(SCRIPT, *names)


def test_strings_inside():
    forward = Forward((Argument("x"), Argument("words", Structure("list", "..", (STRINGS,)))))
    inputs = [ModelInput(name="x", data_type="TYPE_FP32", dims=(4,)), string_input("ARGS[1][0]")]
    made = config(inputs, {"O": (4,)})
    with pytest.raises(ConfigError, match=r"'ARGS\[1\]\[0\]\[0\]' is not an input"):
        bind(forward, "ARGS[1][0][0]", "ARGS[0]")
    assert bind_inputs(made, forward)[1].strings is True
    with pytest.raises(ConfigError, match=r"TYPE_FP32, and the model takes List\[str\] for ARGS"):
        bind(forward, "x", "ARGS[1][0]")


def test_optional_inputs_need_a_default():
    assert paths(SCRIPT, *WHOLE, "mask", optional=("mask",))[-1] == "ARGS[4]"
    for name in ("ARGS[0]", "ARGS[1][0]", "ARGS[2][a]"):
        with pytest.raises(ConfigError, match="does not support optional input, and forward") as e:
            bind(SCRIPT, *WHOLE, optional=(name,))
        assert f"'{name}'" in str(e.value) and str(e.value.args[2]).endswith(".optional")


def test_an_argument_with_a_default_may_be_left_out():
    forward = Forward((Argument("x"), Argument("bias", required=False)))
    assert paths(forward, "INPUT__0") == ["ARGS[0]"]
    assert paths(forward, "whatever", "second") == ["ARGS[0]", "ARGS[1]"]
    with pytest.raises(ConfigError, match="configuration expects 3 inputs, model provides 2"):
        bind(forward, "a", "b", "c")
    with pytest.raises(ConfigError, match=r"no input is named ARGS\[0\]"):
        bind(forward, "bias")


def test_optional_items_of_a_tuple_may_be_left_out():
    some = Structure("tuple", "Tuple[Tensor, Optional[Tensor]]", (TENSOR, MAYBE))
    forward = Forward((Argument("pair", some),))
    assert paths(forward, "ARGS[0][0]") == ["ARGS[0][0]"]
    assert paths(forward, "ARGS[0][0]", "ARGS[0][1]", optional=("ARGS[0][1]",))
    with pytest.raises(ConfigError, match="does not support optional input"):
        bind(forward, "ARGS[0][0]", optional=("ARGS[0][0]",))


def test_eager_names():
    assert paths(EAGER, "mask", "x") == ["ARGS[0]", "ARGS[1]"]
    assert paths(EAGER, "KWARGS[x]", "KWARGS[scale]", "KWARGS[z][0]") == [
        "ARGS[0]",
        "KWARGS[scale]",
        "KWARGS[z][0]",
    ]
    assert paths(EAGER, "a", "b", "c", "d")[-1] == "ARGS[3]"
    optional = ("KWARGS[scale]", "KWARGS[z]", "ARGS[1]")
    assert paths(EAGER, "x", *optional, optional=optional)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("ARGS[1]",), r"no input is named ARGS\[0\]"),
        (("ARGS[0]", "ARGS[3]"), r"no input is named ARGS\[2\]"),
        (("ARGS[0]", "ARGS[1][0]", "ARGS[1][a]"), r"ARGS\[1\] has both numbers and keys inside"),
        (("ARGS[0]", "KWARGS[z][0]", "KWARGS[z][2]"), r"no input is named KWARGS\[z\]\[1\]"),
        (("ARGS[0][1]",), r"no input is named ARGS\[0\]\[0\]"),
    ],
)
def test_eager_holes(names, text):
    with pytest.raises(ConfigError, match=text):
        bind(EAGER, *names)


def test_eager_without_rest_takes_no_more_than_it_has():
    forward = Forward((Argument("x", UNKNOWN), Argument("y", UNKNOWN)), by_order=True)
    with pytest.raises(
        ConfigError, match=r"'c' is not an input .* ARGS\[0\] \(x\), ARGS\[1\] \(y\)"
    ):
        bind(forward, "a", "b", "c")
    with pytest.raises(ConfigError, match=r"no input is named ARGS\[1\]"):
        bind(forward, "a")
    only = Forward((Argument("x", UNKNOWN, only="position"),), by_order=True)
    with pytest.raises(ConfigError, match=r"'KWARGS\[x\]' is not an input"):
        bind(only, "KWARGS[x]")
