"""The same request over HTTP and over gRPC has the same answer: by stock clients, good and bad."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc as grpcio
import httpx
import numpy as np
import pytest
from google.protobuf import json_format
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from tests.serve.clients import infer, inputs, module_of, rows
from tests.serve.server import Server, wait_for

X = rows(3, 8)
LEAKS = ("Traceback", "/site-packages", "/tmp", "ray::", 'File "')
Call = Callable[[Any], Any]


# --- what goes well ------------------------------------------------------------------------------

DATA: dict[str, Any] = {
    "mlp": {"INPUT__0": X},
    "eager_mlp": {"x": X},
    "shared": {"INPUT__0": X},
    "big": {"x": rows(2, 300)},
    "strings": {"words": np.array([[b"a\0b"], ["Grüße".encode()], [b""]], np.object_)},
}


def seen(reply: Any) -> Any:
    """What a client is told, but for its tensors."""
    response = reply.get_response()
    if not isinstance(response, dict):
        response = json_format.MessageToDict(response, preserving_proto_field_name=True)
    keys = ("name", "datatype", "shape")
    told = [{key: entry[key] for key in keys} for entry in response["outputs"]]
    for entry in told:
        entry["shape"] = [int(size) for size in entry["shape"]]
    return [response.get(key, "") for key in ("id", "model_name", "model_version")], told


@pytest.mark.parametrize("model", DATA)
@pytest.mark.parametrize("more", [{}, {"request_id": "7", "model_version": "1"}])
def test_tensors_to_the_bit(http: Any, grpc: Any, model: str, more: Any) -> None:
    replies = [infer(client, model, DATA[model], **more) for client in (http, grpc)]
    assert seen(replies[0]) == seen(replies[1])
    one, other = (reply.as_numpy(seen(replies[0])[1][0]["name"]) for reply in replies)
    assert one.dtype == other.dtype and one.shape == other.shape
    assert one.tolist() == other.tolist()


TOLD: dict[str, Call] = {
    "server metadata": lambda client: client.get_server_metadata(),
    "metadata": lambda client: client.get_model_metadata("mlp"),
    "metadata of a version": lambda client: client.get_model_metadata("seed", "1"),
    "configuration": lambda client: client.get_model_config("mlp"),
    "configuration of a version": lambda client: client.get_model_config("eager_mlp", "1"),
    "statistics": lambda client: client.get_inference_statistics("mlp"),
    "statistics of a version": lambda client: client.get_inference_statistics("mlp", "1"),
    "statistics of all": lambda client: client.get_inference_statistics(),
    "index": lambda client: client.get_model_repository_index(),
    "log settings": lambda client: client.get_log_settings(),
    "regions": lambda client: client.get_system_shared_memory_status(),
}


@pytest.mark.parametrize("what", TOLD)
def test_what_is_told_of_server_and_models(http: Any, grpc: Any, what: str) -> None:
    """Statistics are told by the Controller, which hears of the last requests a moment later."""

    def equal() -> bool:
        shown, message = TOLD[what](http), TOLD[what](grpc)
        assert type(message)() != message or what == "regions"  # or it would say nothing
        return bool(as_message(shown, message) == message)

    wait_for(equal, 60, f"{what}: both protocols tell the same")


def as_message(shown: Any, like: Any) -> Any:
    """JSON that HTTP tells, in the form of the message that gRPC tells."""
    made = type(like)()
    if isinstance(made, service_pb2.ModelConfigResponse):
        shown = {"config": shown}
    elif isinstance(made, service_pb2.RepositoryIndexResponse):
        shown = {"models": shown}
    elif isinstance(made, service_pb2.SystemSharedMemoryStatusResponse):
        shown = {"regions": {entry["name"]: entry for entry in shown}}
    elif isinstance(made, service_pb2.LogSettingsResponse):
        for name, setting in like.settings.items():
            field = setting.WhichOneof("parameter_choice")
            setattr(made.settings[name], field, shown.pop(name))
        assert shown == {}
        return made
    return json_format.ParseDict(shown, made)


# --- what does not -------------------------------------------------------------------------------


def asked(model: str = "mlp", arrays: Any = None, **more: Any) -> Call:
    arrays = {"INPUT__0": X} if arrays is None else arrays
    return lambda client: infer(client, model, arrays, **more)


def twice(client: Any) -> Any:
    given = inputs(module_of(client), {"INPUT__0": X})
    return client.infer("mlp", given * 2)


def outputs(*names: str, **more: Any) -> Call:
    def call(client: Any) -> Any:
        module = module_of(client)
        wanted = [module.InferRequestedOutput(name, **more) for name in names]
        return infer(client, "mlp", {"INPUT__0": X}, outputs=wanted)

    return call


def classes(model: str, arrays: Any, name: str) -> Call:
    def call(client: Any) -> Any:
        wanted = [module_of(client).InferRequestedOutput(name, class_count=1)]
        return infer(client, model, arrays, outputs=wanted)

    return call


WORDS = {"words": np.array([[b"a"]], np.object_)}
STATUSES = {
    "INVALID_ARGUMENT": "400",
    "NOT_FOUND": "404",
    "INTERNAL": "500",
    "UNIMPLEMENTED": "501",
    "UNAVAILABLE": "503",
}
REFUSED: list[tuple[str, Call, str, str]] = [
    ("infer, unknown model", asked("nobody"), "NOT_FOUND", "unknown model: 'nobody'"),
    ("infer, unknown version", asked(model_version="9"), "NOT_FOUND", "version 9 is not found"),
    ("infer, none loaded", asked("pickled"), "NOT_FOUND", "has no available versions"),
    ("infer, not ready", asked("pickled", model_version="1"), "UNAVAILABLE", "not at ready state"),
    ("infer, width", asked(arrays={"INPUT__0": rows(1, 9)}), "INVALID_ARGUMENT",
     "unexpected shape for input 'INPUT__0' for model 'mlp'. Expected [-1,8], got [1,9]"),
    ("infer, datatype", asked(arrays={"INPUT__0": np.ones((1, 8), np.int32)}), "INVALID_ARGUMENT",
     "data-type is 'INT32'"),
    ("infer, name", asked(arrays={"z": X}), "INVALID_ARGUMENT", "unexpected inference input 'z'"),
    ("infer, none", asked(arrays={}), "INVALID_ARGUMENT", "expected 1 inputs but got 0 inputs"),
    ("infer, twice", twice, "INVALID_ARGUMENT", "input 'INPUT__0' already exists in request"),
    ("infer, rows", asked(arrays={"INPUT__0": rows(33, 8)}), "INVALID_ARGUMENT", "must be <= 32"),
    ("infer, with an id", asked(arrays={"INPUT__0": rows(33, 8)}, request_id="mine"),
     "INVALID_ARGUMENT", "[request id: mine] "),
    ("infer, output", outputs("z"), "INVALID_ARGUMENT", "unexpected inference output 'z'"),
    ("infer, output twice", outputs("OUTPUT__0", "OUTPUT__0"), "INVALID_ARGUMENT",
     "output 'OUTPUT__0' already exists in request"),
    ("infer, classes of strings", classes("strings", WORDS, "OUTPUT__0"), "INVALID_ARGUMENT",
     "class result not available for output due to unsupported type 'BYTES'"),
    ("infer, sequence", asked(sequence_id=7, sequence_start=True), "UNIMPLEMENTED",
     "'sequence_id' is not supported"),
    ("infer, priority", asked(priority=1), "UNIMPLEMENTED", "'priority' is not supported"),
    ("infer, timeout", asked(timeout=5), "UNIMPLEMENTED", "'timeout' is not supported"),
    ("infer, model raises", asked("picky", {"x": -np.ones((1, 2), np.float32)}), "INTERNAL",
     "PyTorch execute failure"),
    ("metadata, unknown model", lambda c: c.get_model_metadata("nobody"), "NOT_FOUND", "'nobody'"),
    ("metadata, version", lambda c: c.get_model_metadata("mlp", "9"), "NOT_FOUND", "version 9"),
    ("metadata, not ready", lambda c: c.get_model_metadata("pickled", "1"), "UNAVAILABLE",
     "version 1 is not at ready state"),
    ("config, unknown model", lambda c: c.get_model_config("nobody"), "NOT_FOUND", "'nobody'"),
    ("config, version", lambda c: c.get_model_config("mlp", "9"), "NOT_FOUND", "version 9"),
    ("config, not ready", lambda c: c.get_model_config("pickled", "1"), "UNAVAILABLE",
     "version 1 is not at ready state"),
    ("statistics, unknown model", lambda c: c.get_inference_statistics("nobody"),
     "INVALID_ARGUMENT", "requested model 'nobody' is not available"),
    ("statistics, version", lambda c: c.get_inference_statistics("mlp", "9"),
     "INVALID_ARGUMENT", "requested model version is not available for model 'mlp'"),
    ("load, unknown model", lambda c: c.load_model("nobody"), "INTERNAL",
     "failed to load 'nobody'"),
    ("load, broken", lambda c: c.load_model("pickled"), "INVALID_ARGUMENT", "torch.save"),
    ("load, bad name", lambda c: c.load_model("a b/.."), "INVALID_ARGUMENT", "odel name"),
    ("load, parameter", lambda c: c.load_model("mlp", config="{"), "INVALID_ARGUMENT", "config"),
    ("unload, bad name", lambda c: c.unload_model("a b/.."), "INVALID_ARGUMENT", "odel name"),
    ("log settings", lambda c: c.update_log_settings({"log_nonsense": True}), "INVALID_ARGUMENT",
     "log_nonsense"),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=[case[0] for case in REFUSED])
def test_the_same_refusal_in_the_same_words(http: Any, grpc: Any, case: Any) -> None:
    _, call, code, text = case
    told = []
    for client in (http, grpc):
        with pytest.raises(InferenceServerException) as caught:
            call(client)
        told.append((str(caught.value.status()), caught.value.message()))
    assert [status for status, _ in told] == [STATUSES[code], f"StatusCode.{code}"], told
    assert told[0][1] == told[1][1] and text in told[0][1]
    assert not [leak for leak in LEAKS if leak in told[0][1]]


def test_models_that_are_not_there_are_no_error(http: Any, grpc: Any) -> None:
    for client in (http, grpc):
        for names in (("nobody",), ("mlp", "9"), ("pickled",), ("pickled", "1")):
            assert client.is_model_ready(*names) is False
        client.unload_model("nobody")


@pytest.fixture
def stub(server: Server) -> Any:
    with grpcio.insecure_channel(server.grpc) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def test_one_of_several_repositories_cannot_be_named(server: Server, stub: Any) -> None:
    """Stock clients have no word for it."""
    calls = {
        "index": (stub.RepositoryIndex, service_pb2.RepositoryIndexRequest, {}),
        "models/mlp/load": (
            stub.RepositoryModelLoad,
            service_pb2.RepositoryModelLoadRequest,
            {"model_name": "mlp"},
        ),
        "models/mlp/unload": (
            stub.RepositoryModelUnload,
            service_pb2.RepositoryModelUnloadRequest,
            {"model_name": "mlp"},
        ),
    }
    for path, (call, request, fields) in calls.items():
        reply = httpx.post(f"http://{server.http}/v2/repository/other/{path}", timeout=60)
        with pytest.raises(grpcio.RpcError) as caught:
            call(request(repository_name="other", **fields))
        assert (reply.status_code, caught.value.code().name) == (501, "UNIMPLEMENTED")
        assert reply.json()["error"] == caught.value.details()
        assert "'repository_name' specification is not supported" in caught.value.details()
    assert server.get("/v2/models/mlp/ready").status_code == 200


def test_a_version_that_is_no_number(server: Server, grpc: Any) -> None:
    """A path of HTTP's has digits or is none; a message of gRPC's has any text."""
    for version in ("x", "-1", "1.0", " 1", "1 "):
        for call in (
            lambda v=version: grpc.get_model_metadata("mlp", v),
            lambda v=version: grpc.get_model_config("mlp", v),
            lambda v=version: grpc.get_inference_statistics("mlp", v),
            lambda v=version: grpc.is_model_ready("mlp", v),
            lambda v=version: infer(grpc, "mlp", {"INPUT__0": X}, model_version=v),
        ):
            with pytest.raises(InferenceServerException) as caught:
                call()
            assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
        for path in ("", "/config", "/stats", "/ready"):
            reply = server.get(f"/v2/models/mlp/versions/{version}{path}")
            assert (reply.status_code, reply.json()) == (404, {"error": "Not Found"})
