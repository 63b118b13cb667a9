from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from deployments.errors import (
    Code,
    InvalidArgument,
    MantaError,
    NotFound,
    ShuttingDown,
    UnknownModel,
    Unsupported,
)
from deployments.inference import EXTENSIONS
from deployments.tensors import decode_bytes, encode_bytes
from deployments.types import InferRequest, RequestedOutput, Tensor

from .serving import Server, linear


def given(name, array, datatype="FP32", shape=None):
    return Tensor(name, datatype, array.shape if shape is None else shape, array)


def floats(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def infer(server, model, *inputs, outputs=(), version="", request_id="", parameters=None):
    request = InferRequest(
        model,
        version,
        request_id,
        inputs,
        tuple(RequestedOutput(name) for name in outputs),
        parameters or {},
    )

    async def one():
        return await server.inference.infer(request)

    return asyncio.run(one())


@pytest.fixture(scope="module")
def server():
    return Server()


def ints(*shape):
    return np.arange(np.prod(shape), dtype=np.int32).reshape(shape)


# --- right answers ----------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_answer_is_the_models(server, rows):
    x = floats(rows, 4)
    response = infer(server, "linear", given("INPUT__0", x), request_id="7")
    (output,) = response.outputs
    assert (response.model_name, response.model_version, response.id) == ("linear", "1", "7")
    assert (output.name, output.datatype, output.shape) == ("OUTPUT__0", "FP32", (rows, 3))
    np.testing.assert_array_equal(output.data, linear(x)[0])


def test_outputs_come_by_name_and_inputs_in_any_order(server):
    a, b = ints(2, 4), ints(2, 4) * 10
    inputs = given("INPUT1", b, "INT32"), given("INPUT0", a, "INT32")
    response = infer(server, "add_sub", *inputs)
    assert [output.name for output in response.outputs] == ["OUTPUT0", "OUTPUT1"]
    np.testing.assert_array_equal(response.outputs[0].data, a + b)
    np.testing.assert_array_equal(response.outputs[1].data, a - b)
    response = infer(server, "add_sub", *inputs, outputs=["OUTPUT1"])
    assert [output.name for output in response.outputs] == ["OUTPUT1"]
    assert server.gates["add_sub"].submitted[-1].outputs == ("OUTPUT1",)


def test_reshape_is_the_models_business_only(server):
    x = floats(2, 6, 2)
    response = infer(server, "reshaped", given("X", x))
    seen = server.gates["reshaped"].submitted[-1]
    assert (seen.rows, seen.inputs[0].shape, seen.key) == (2, (2, 2, 6), ((6, 2),))
    assert response.outputs[0].shape == (2, 2, 6)
    expected = np.swapaxes(x.reshape(2, 2, 6), 1, 2).reshape(2, 2, 6)
    np.testing.assert_array_equal(response.outputs[0].data, expected)


def test_an_output_that_cannot_have_the_configured_dims_is_told(server):
    gate = server.gates["reshaped"]
    model, gate.model = gate.model, lambda x: (np.zeros((2, 5), np.float32),)
    with pytest.raises(MantaError, match=r"output 'Y' of model 'reshaped' has shape \[2,5\]"):
        infer(server, "reshaped", given("X", floats(2, 6, 2)))
    gate.model = model


def test_strings_keep_their_rows(server):
    wire = encode_bytes([b"a\0b", b"", b"\xff"])
    response = infer(server, "echo_BYTES", given("X", wire, "BYTES", (3, 1)))
    assert response.outputs[0].shape == (3, 1)
    assert decode_bytes("Y", response.outputs[0].data) == [b"a\0b", b"", b"\xff"]
    response = infer(server, "strings", given("X", wire, "BYTES", (3,)))
    assert response.outputs[0].shape == (3,)
    assert server.gates["strings"].submitted[-1].rows == 1


def test_zero_sized_dims_pass(server):
    response = infer(server, "echo_FP32", given("X", floats(2, 0)))
    assert response.outputs[0].shape == (2, 0)


def test_only_requests_of_one_shape_share_a_key(server):
    keys = []
    for shape in ((1, 3), (2, 3), (1, 4)):
        infer(server, "echo_FP32", given("X", floats(*shape)))
        keys.append(server.gates["echo_FP32"].submitted[-1].key)
    assert keys[0] == keys[1] != keys[2]
    infer(server, "linear", given("INPUT__0", floats(1, 4)))
    assert server.gates["linear"].submitted[-1].key == ()


# --- refusals ----------------------------------------

X = given("INPUT__0", floats(1, 4))
A, B = given("INPUT0", ints(1, 4), "INT32"), given("INPUT1", ints(1, 4), "INT32")
NOTE = "NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension"

REFUSED = [
    (
        "add_sub",
        (A,),
        "expected 2 inputs but got 1 inputs for model 'add_sub'. Got input(s) ['INPUT0'], but "
        "missing required input(s) ['INPUT1']. Please provide all required input(s).",
    ),
    ("add_sub", (), "Got input(s) [], but missing required input(s) ['INPUT0','INPUT1']."),
    (
        "add_sub",
        (A, given("Z", ints(1, 4), "INT32")),
        "unexpected inference input 'Z' for model 'add_sub'",
    ),
    ("add_sub", (A, A), "input 'INPUT0' already exists in request"),
    (
        "add_sub",
        (A, given("INPUT1", ints(2, 4), "INT32")),
        "input 'INPUT1' batch size does not match other inputs for 'add_sub'",
    ),
    (
        "linear",
        (given("INPUT__0", ints(1, 4), "INT32"),),
        "inference input 'INPUT__0' data-type is 'INT32', but model 'linear' expects 'FP32'",
    ),
    (
        "linear",
        (given("INPUT__0", floats(1, 8)),),
        "unexpected shape for input 'INPUT__0' for model 'linear'. Expected [-1,4], got [1,8]. "
        + NOTE,
    ),
    ("linear", (given("INPUT__0", floats(4)),), "Expected [-1,4], got [4]. " + NOTE),
    ("linear", (given("INPUT__0", floats(1, 1, 4)),), "Expected [-1,4], got [1,1,4]"),
    ("linear", (given("INPUT__0", floats(1).reshape(())),), "requires batch dimension"),
    ("linear", (given("INPUT__0", floats(0, 4)),), "batch-size must be >= 1 for 'linear'"),
    (
        "linear",
        (given("INPUT__0", floats(9, 4)),),
        "inference request batch-size must be <= 8 for 'linear'",
    ),
    ("unbatched", (given("X", floats(2, 3)),), "Expected [-1,2], got [2,3]"),
    (
        "strings",
        (given("X", encode_bytes([b"a"]), "BYTES", (2,)),),
        "expected 2 string elements for inference input 'X' for model 'strings', got 1",
    ),
    (
        "strings",
        (given("X", encode_bytes([b"a"] * 3), "BYTES", (2,)),),
        "unexpected number of string elements 3 for inference input 'X' for model 'strings', "
        "expecting 2",
    ),
]


@pytest.mark.parametrize(("model", "inputs", "text"), REFUSED)
@pytest.mark.parametrize(("request_id", "shown"), [("", "<id_unknown>"), ("r7", "r7")])
def test_a_bad_request_is_refused_before_it_queues(server, model, inputs, text, request_id, shown):
    before = len(server.gates[model].submitted)
    with pytest.raises(InvalidArgument) as error:
        infer(server, model, *inputs, request_id=request_id)
    assert str(error.value).startswith(f"[request id: {shown}] ")
    assert text in str(error.value)
    assert len(server.gates[model].submitted) == before


def test_an_unbatched_shape_gets_no_note(server):
    with pytest.raises(InvalidArgument) as error:
        infer(server, "unbatched", given("X", floats(2, 3)))
    assert "NOTE" not in str(error.value)


def test_outputs_are_checked_before_inputs(server):
    with pytest.raises(InvalidArgument, match="unexpected inference output 'Z' for model 'linear'"):
        infer(server, "linear", outputs=["Z"])
    with pytest.raises(InvalidArgument, match="output 'OUTPUT__0' already exists in request"):
        infer(server, "linear", X, outputs=["OUTPUT__0", "OUTPUT__0"])


@pytest.mark.parametrize("key", ["sequence_id", "sequence_start", "priority", "timeout"])
def test_what_is_not_done_here_is_refused_by_name(server, key):
    with pytest.raises(MantaError, match=f"'{key}' is not supported") as error:
        infer(server, "linear", X, parameters={key: 1})
    assert error.value.code is Code.UNSUPPORTED
    infer(server, "linear", X, parameters={key: 0, "my_own": "x"})


def test_parameters_with_triton_names_are_reserved(server):
    with pytest.raises(InvalidArgument, match="reserved for Triton usage"):
        infer(server, "linear", X, parameters={"triton_x": 1})


def test_of_several_the_same_one_is_named_in_any_order(server):
    """A map of gRPC's has no order."""
    keys = ["timeout", "sequence_end", "sequence_id", "sequence_start"]
    for order in (keys, keys[::-1]):
        with pytest.raises(MantaError, match="'sequence_id' is not supported"):
            infer(server, "linear", X, parameters=dict.fromkeys(order, 1))
        order = [*order, *(f"triton_{key}" for key in order)]
        for each in (order, order[::-1]):
            with pytest.raises(InvalidArgument, match="'triton_sequence_end' is reserved"):
                infer(server, "linear", X, parameters=dict.fromkeys(each, 1))


def test_classes_are_awaited_as_tensors_are(server):
    """By `infer`, and by a ticket's future."""
    classes = (RequestedOutput("OUTPUT__0", classification=9),)
    request = InferRequest("linear", "", "7", (X,), classes)

    async def both():
        ticket = server.inference.submit(request)
        await ticket.future
        return server.inference.answer(ticket), await server.inference.infer(request)

    for response in asyncio.run(both()):
        (output,) = response.outputs
        assert (response.id, output.datatype, output.shape) == ("7", "BYTES", (1, 3))
        scores = linear(X.data)[0][0]
        expected = [f"{scores[i]:.6f}:{i}".encode() for i in np.argsort(-scores)]
        assert decode_bytes("OUTPUT__0", output.data) == expected


def test_what_a_request_with_extras_is_refused_for(server):
    """An unknown model at once, the rest by its future; it is run no more than others are."""
    classes = (RequestedOutput("Y", classification=1),)
    with pytest.raises(UnknownModel):
        infer_extra(server, "nobody", classes)
    before = len(server.gates["strings"].submitted)
    words = given("X", encode_bytes([b"a"]), "BYTES", (1,))
    with pytest.raises(InvalidArgument, match="^.request id: <id_unknown>. class result not"):
        infer_extra(server, "strings", classes, words)
    assert len(server.gates["strings"].submitted) == before
    with pytest.raises(MantaError, match="shapes do not agree"):
        infer_extra(server, "failing", classes, given("X", floats(1, 1)))


def infer_extra(server, model, outputs, *inputs):
    async def one():
        return await server.inference.infer(InferRequest(model, "", "", inputs, outputs))

    return asyncio.run(one())


def test_shared_memory_is_off_by_default(server):
    with pytest.raises(Unsupported, match="Client shared memory is disabled"):
        server.inference.memory.status("system", "")


def test_cancelling_a_request_with_extras_withdraws_it():
    server = Server()
    gate = server.gates["linear"]
    gate.hold = []
    classes = (RequestedOutput("OUTPUT__0", classification=1),)
    request = InferRequest("linear", "", "", (X,), classes)

    async def leave():
        ticket = server.inference.submit(request)
        while not gate.hold:
            await asyncio.sleep(0)
        ticket.future.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ticket.future

    asyncio.run(leave())
    assert gate.cancelled == 1


@pytest.mark.parametrize(
    ("model", "code", "text"),
    [
        ("failing", Code.INTERNAL, "[request id: r] PyTorch execute failure: shapes do not agree"),
        ("full", Code.UNAVAILABLE, "[request id: r] Exceeds maximum queue size"),
    ],
)
def test_errors_of_gate_and_model_keep_their_code(server, model, code, text):
    with pytest.raises(MantaError) as error:
        infer(server, model, given("X", floats(1, 1)), request_id="r")
    assert error.value.code is code
    assert str(error.value).startswith(text)


def test_an_unknown_model_has_no_request_yet(server):
    with pytest.raises(UnknownModel, match="^Request for unknown model: 'nobody' is not found$"):
        infer(server, "nobody", X, request_id="7")


def test_cancelling_the_call_withdraws_the_request():
    server = Server()
    gate = server.gates["linear"]
    gate.hold = []

    async def leave():
        task = asyncio.ensure_future(server.inference.infer(InferRequest("linear", "", "", (X,))))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    assert gate.cancelled == 1


# --- metadata, health, control ----------------------------------------


def test_metadata(server):
    metadata = server.inference.server_metadata()
    assert (metadata["name"], metadata["extensions"]) == ("triton", list(EXTENSIONS))
    assert server.inference.model_metadata("linear", "") == {
        "name": "linear",
        "versions": ["1"],
        "platform": "pytorch_libtorch",
        "inputs": [{"name": "INPUT__0", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [{"name": "OUTPUT__0", "datatype": "FP32", "shape": [-1, 3]}],
    }
    unbatched = server.inference.model_metadata("unbatched", "1")
    assert (unbatched["platform"], unbatched["inputs"][0]["shape"]) == ("pytorch", [-1, 2])
    assert server.inference.model_metadata("reshaped", "")["inputs"][0]["shape"] == [-1, -1, 2]


def test_readiness_follows_the_snapshot():
    server = Server()
    inference = server.inference
    assert inference.live() and inference.ready()
    assert inference.model_ready("linear", "") and inference.model_ready("linear", "1")
    assert not inference.model_ready("linear", "2") and not inference.model_ready("nobody", "")
    server.publish(ready=False)
    assert inference.live() and not inference.ready()
    server.publish(started=False)
    assert not inference.ready()


def test_a_version_without_replicas_is_ready_only_if_it_rests():
    server = Server()
    for resting in (True, False):
        server.versions = [replace(v, targets=(), resting=resting) for v in server.versions]
        server.publish()
        assert server.inference.model_ready("linear", "") is resting


def test_a_model_without_a_live_instance_is_not_ready():
    server = Server()
    server.versions = [
        type(each)(
            *(
                getattr(each, field)
                for field in ("model_name", "version", "state", "reason", "config")
            )
        )
        for each in server.versions
    ]
    server.publish()
    assert not server.inference.model_ready("linear", "")


def test_a_router_that_leaves_is_not_ready_and_answers():
    server = Server()
    server.inference.leave()
    with pytest.raises(ShuttingDown):
        server.inference.ready()
    assert server.inference.live() and server.inference.model_ready("linear", "")


def test_while_closing_everything_new_is_refused():
    server = Server()
    server.publish(closing=True)
    for verb in (
        server.inference.live,
        server.inference.ready,
        lambda: server.inference.model_ready("linear", ""),
        lambda: infer(server, "linear", X),
    ):
        with pytest.raises(ShuttingDown, match="^Server exiting$"):
            verb()


TRAVERSAL = ["..", "../x", "a/../b", "/etc/passwd", "m/", " .. ", "", " ", "%2e%2e%2f", "a\r\nb"]


@pytest.mark.parametrize("name", [*TRAVERSAL, "x" * 256, "\0"])
def test_a_name_that_can_be_no_models_is_refused_by_every_verb(name):
    server = Server(model_control_mode="explicit")
    inference = server.inference
    for verb in (inference.model_ready, inference.model_metadata, inference.model_config):
        with pytest.raises(InvalidArgument, match="(?i)^model name must|^model name cannot"):
            verb(name, "")
    for change in (inference.administration.load, inference.administration.unload):
        with pytest.raises(InvalidArgument, match="(?i)^model name"):
            asyncio.run(change(name, {}))
    with pytest.raises(InvalidArgument, match="(?i)model name"):
        infer(server, name, X)
    if name:  # without one, all are meant
        with pytest.raises(InvalidArgument):
            asyncio.run(inference.administration.statistics(name, ""))
    assert server.controller.calls == []


def test_config_of_a_model_that_is_not_there(server):
    with pytest.raises(NotFound):
        server.inference.model_config("nobody", "")
