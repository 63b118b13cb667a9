"""Names into nested, keyword and optional inputs and nested outputs, against direct torch calls."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.torch as safetensors
import torch
from tritonclient.utils import InferenceServerException

from tests import models
from tests.serve import repository
from tests.serve.clients import Arrays, aio_client, infer, infer_aio, loading, rows, statistics
from tests.serve.repository import EAGER, tensor
from tests.serve.server import Server, wait_for
from tests.structures import Point, Structured

OPTIONAL = "optional: true"
WORDS = tensor("words", "1", "TYPE_STRING", "reshape { shape: [] }")
SCRIPT = repository.config(
    [
        *(tensor(n, "4") for n in ("ARGS[0]", "ARGS[1][1]", "ARGS[1][0]", "KWARGS[named][k][0]")),
        *(tensor(n, "4") for n in ("ARGS[3][right]", "KWARGS[point][left]")),
        WORDS,
        tensor("bias", "4", more=OPTIONAL),
        tensor("KWARGS[last]", "4", more=OPTIONAL),
    ],
    [
        *(tensor(n, "4") for n in ("RESULT[0][left]", "RESULT[0][1]", "RESULT[1][rest][0]")),
        *(tensor(n, "4") for n in ("RESULT[1][rest][1]", "OUTPUT__3")),
        tensor("RESULT[2]", "1", "TYPE_STRING", "reshape { shape: [] }"),
    ],
)
NET = """
import torch
from typing import List, NamedTuple
from torch import Tensor

class Pair(NamedTuple):
    left: Tensor
    right: Tensor

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(4))

    def forward(self, x, pair, xs: List[Tensor], mask=None, *, options, bias=None):
        assert type(pair) is tuple and type(xs) is list
        total = x * self.scale + options["deep"][0]
        if mask is not None:
            total = total * mask
        if bias is not None:
            total = total - bias
        return {"total": total, "all": [xs[1], {"pair": Pair(pair[1]["a"], pair[0])}]}
"""
NET_REQUIRED = ("ARGS[0]", "ARGS[1][0]", "ARGS[1][1][a]", "ARGS[2][1]", "KWARGS[xs][0]")
NET_CONFIG = repository.config(
    [
        *(tensor(name, "4") for name in (*NET_REQUIRED, "KWARGS[options][deep][0]")),
        tensor("KWARGS[bias]", "4", more=OPTIONAL),
        tensor("ARGS[3]", "4", more=OPTIONAL),
    ],
    [
        tensor(name, "4")
        for name in (
            "RESULT[total]",
            "RESULT[all][0]",
            "RESULT[all][1][pair][left]",
            "RESULT[all][1][pair][1]",
        )
    ],
    engine='backend: "pytorch"\nruntime: "model.py"',
    more="dynamic_batching { }\n" + EAGER,
)


def simple(inputs: list[str], outputs: list[str], **options: Any) -> str:
    return repository.config(
        [tensor(n, "4") for n in inputs], [tensor(n, "4") for n in outputs], **options
    )


BROKEN = {
    "named_twice": simple(["x__0", "y__0"], ["OUTPUT__0"]),
    "no_output": simple(["a", "b"], ["OUTPUT__2"]),
    "no_result": simple(["a", "b"], ["RESULT[total]"]),
}
REASONS = {
    "named_twice": r"'y__0' and input 'x__0' are the same input of the model, ARGS\[0\]",
    "no_output": "The output OUTPUT__2 in the model configuration refers to an output index which "
    r"doesn't exist. This model has 2 outputs; it offers RESULT\[0\], RESULT\[1\]",
    "no_result": r"The output RESULT\[total\] .* refers to an output which doesn't exist",
}


def write(root: Path) -> list[str]:
    """Names of the good ones."""
    models.save_torchscript(Structured().eval(), root, "nested_script")
    repository.write_config(root, "nested_script", SCRIPT)
    path = models.save_eager(NET, root, "nested_eager")
    safetensors.save_file({"scale": torch.full((4,), 3.0)}, path.with_suffix(".safetensors"))
    repository.write_config(root, "nested_eager", NET_CONFIG)
    for name, text in BROKEN.items():
        models.save_torchscript(models.add_sub(), root, name)
        repository.write_config(root, name, text)
    return ["nested_script", "nested_eager"]


@pytest.fixture(scope="module", autouse=True)
def loaded(server: Server, models_root: Path) -> Iterator[None]:
    with loading(server, write(models_root)):
        yield


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


# --- what was asked for, and what torch itself says -----------------------------------------------


def script_case(seed: int) -> tuple[Arrays, dict[str, Any]]:
    """A request to `nested_script` of one to three rows, with or without its optional inputs: five
    in a row leave out the same ones, and so may share a batch."""
    count = 1 + seed % 3
    columns = [rows(count, 4, 100 * seed + k) for k in range(8)]
    x, second, first, k, right, left, bias, last = columns
    words = np.array([f"w{seed}-{i}" for i in range(count)], object).reshape(-1, 1)
    given = dict(zip(("ARGS[0]", "ARGS[1][1]", "ARGS[1][0]"), (x, second, first), strict=True))
    given |= {"KWARGS[named][k][0]": k, "ARGS[3][right]": right, "KWARGS[point][left]": left}
    given["words"] = words
    if seed // 5 & 1:
        given["bias"] = bias
    if seed // 5 & 2:
        given["KWARGS[last]"] = last
    t = {name: torch.from_numpy(a) for name, a in given.items() if name != "words"}
    point, lists, strings, total = Structured()(
        t["ARGS[0]"],
        [t["ARGS[1][0]"], t["ARGS[1][1]"]],
        {"k": [t["KWARGS[named][k][0]"]]},
        Point(t["KWARGS[point][left]"], t["ARGS[3][right]"]),
        [str(word) for word in words.ravel()],
        t.get("bias"),
        last=t.get("KWARGS[last]"),
    )
    return given, {
        "RESULT[0][left]": point.left.numpy(),
        "RESULT[0][1]": point.right.numpy(),
        "RESULT[1][rest][0]": lists["rest"][0].numpy(),
        "RESULT[1][rest][1]": lists["rest"][1].numpy(),
        "OUTPUT__3": total.numpy(),
        "RESULT[2]": np.array([s.encode() for s in strings], object).reshape(-1, 1),
    }


def eager_case(seed: int) -> tuple[Arrays, dict[str, Any]]:
    count = 1 + seed % 3
    columns = [rows(count, 4, 100 * seed + k) for k in range(8)]
    given = dict(zip((*NET_REQUIRED, "KWARGS[options][deep][0]"), columns, strict=False))
    if seed // 5 & 1:
        given["KWARGS[bias]"] = columns[6]
    if seed // 5 & 2:
        given["ARGS[3]"] = columns[7]
    t = {name: torch.from_numpy(array) for name, array in given.items()}
    net = direct_net()
    with torch.inference_mode():
        result = net(
            t["ARGS[0]"],
            (t["ARGS[1][0]"], {"a": t["ARGS[1][1][a]"]}),
            [t["KWARGS[xs][0]"], t["ARGS[2][1]"]],
            t.get("ARGS[3]"),
            options={"deep": (t["KWARGS[options][deep][0]"],)},
            bias=t.get("KWARGS[bias]"),
        )
    pair = result["all"][1]["pair"]
    return given, {
        "RESULT[total]": result["total"].numpy(),
        "RESULT[all][0]": result["all"][0].numpy(),
        "RESULT[all][1][pair][left]": pair.left.numpy(),
        "RESULT[all][1][pair][1]": pair.right.numpy(),
    }


def direct_net() -> Any:
    space: dict[str, Any] = {"__name__": "direct_net"}
    exec(NET, space)
    net = space["Net"]()
    net.load_state_dict({"scale": torch.full((4,), 3.0)})
    return net


CASES = {"nested_script": script_case, "nested_eager": eager_case}


def check(reply: Any, wanted: dict[str, Any]) -> None:
    for name, array in wanted.items():
        got = reply.as_numpy(name)
        if array.dtype == object:
            assert got.tolist() == array.tolist()
        else:
            np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("model", CASES)
def test_optional_inputs_present_and_absent_in_one_load(
    server: Server, http: Any, model: str, protocol: str
) -> None:
    """All four sets of present inputs at once: a batch of different ones would fail or answer
    wrongly. Names reach nested, keyword and named places in and out (A18)."""
    cases = [CASES[model](seed) for seed in range(120)]
    before = statistics(http, model)

    async def run() -> list[Any]:
        async with aio_client(server, protocol) as one:
            return await asyncio.gather(*(infer_aio(one, model, given) for given, _ in cases))

    for reply, (_, wanted) in zip(asyncio.run(run()), cases, strict=True):
        check(reply, wanted)
    after = statistics(http, model)
    assert after["success"] - before["success"] == len(cases)
    assert after["execution_count"] - before["execution_count"] < len(cases)


@pytest.mark.parametrize("seed", [0, 5, 10, 15])
def test_the_same_in_json(server: Server, seed: int) -> None:
    given, wanted = script_case(seed)
    inputs = [
        {
            "name": name,
            "shape": list(array.shape),
            "datatype": "BYTES" if array.dtype == object else "FP32",
            "data": array.ravel().tolist(),
        }
        for name, array in given.items()
    ]
    address = f"http://{server.http}/v2/models/nested_script/infer"
    reply = httpx.post(address, json={"inputs": inputs}, timeout=120)
    assert reply.status_code == 200, reply.text
    outputs = {one["name"]: one["data"] for one in reply.json()["outputs"]}
    for name, array in wanted.items():
        expected = array.ravel().tolist()
        if array.dtype == object:
            expected = [one.decode() for one in expected]
        np.testing.assert_array_equal(np.array(outputs[name], array.dtype), expected)


def test_a_required_input_is_still_required(client: Any) -> None:
    given, _ = script_case(15)
    del given["ARGS[0]"]
    text = (
        r"expected number of inputs between 7 and 9 but got 8 inputs for model 'nested_script'.*"
        r"missing required input\(s\) \['ARGS\[0\]'\]"
    )
    with pytest.raises(InferenceServerException, match=text) as caught:
        infer(client, "nested_script", given)
    assert "400" in str(caught.value.status()) or "INVALID_ARGUMENT" in str(caught.value.status())
    given, wanted = script_case(15)
    check(infer(client, "nested_script", given), wanted)


def test_the_configuration_tells_what_is_optional(http: Any, grpc: Any) -> None:
    wanted = {"bias", "KWARGS[last]"}
    entries = http.get_model_config("nested_script")["input"]
    assert {one["name"] for one in entries if one["optional"]} == wanted
    entries = grpc.get_model_config("nested_script").config.input
    assert {one.name for one in entries if one.optional} == wanted


@pytest.mark.parametrize(
    ("name", "protocol"), [*zip(BROKEN, ("http", "grpc", "http"), strict=True)]
)
def test_names_that_meet_or_lead_nowhere_are_load_errors(
    request: pytest.FixtureRequest, http: Any, name: str, protocol: str
) -> None:
    def state() -> str:
        (entry,) = [e for e in http.get_model_repository_index() if e["name"] == name]
        return str(entry.get("state"))  # it has none before it was touched

    with pytest.raises(InferenceServerException, match=REASONS[name]):
        request.getfixturevalue(protocol).load_model(name)
    wait_for(lambda: state() == "UNAVAILABLE", 30, f"{name} is unavailable")
    assert http.is_server_ready()
