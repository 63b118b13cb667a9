"""The acceptance cases A1 to A26 of the PyTorch backend, each by its number, over both protocols.

Where this server goes beyond the case, the test says so and keeps what is still refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import tritonclient.http as httpclient
from tritonclient.utils import InferenceServerException, serialize_byte_tensor

from tests import models
from tests.serve import acceptance
from tests.serve.clients import Arrays, aio_client, infer, infer_aio, module_of, rows, statistics
from tests.serve.server import Server, in_three_tries, wait_for

# The first one that runs waits until all models are loaded.
pytestmark = pytest.mark.timeout(900)

STATUSES = {"400": "INVALID_ARGUMENT", "500": "INTERNAL", "501": "UNIMPLEMENTED"}


@pytest.fixture(scope="module", autouse=True)
def refusals(server: Server, models_root: Path, seed_package: Path) -> Iterator[Mapping[str, str]]:
    """Why each model did not load, "" for those that did. All are gone again at the end."""
    everything = acceptance.build(models_root, seed_package)

    def call(name: str, method: str) -> str:
        with httpclient.InferenceServerClient(server.http, network_timeout=240) as client:
            try:
                getattr(client, method)(name)
            except InferenceServerException as error:
                return error.message() or "no reason"
        return ""

    with ThreadPoolExecutor(4) as pool:
        reasons = pool.map(lambda name: call(name, "load_model"), everything)
        told = dict(zip(everything, reasons, strict=True))
        unexpected = {n: r for n, r in told.items() if r and n not in acceptance.REFUSED}
        assert not unexpected
        yield told
        list(pool.map(lambda name: call(name, "unload_model"), everything))


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["http", "grpc"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def together(server: Server, protocol: str, model: str, each: list[Arrays]) -> list[Any]:
    """Requests at once; answers or errors in their order."""

    async def run() -> list[Any]:
        async with aio_client(server, protocol) as client:
            calls = [infer_aio(client, model, arrays) for arrays in each]
            return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(run())


def in_one_batch(
    server: Server, client: Any, protocol: str, model: str, each: list[Arrays]
) -> list[Any]:
    """The same for requests that have met: those that came too far apart are sent again."""

    def met() -> list[Any] | None:
        before = statistics(client, model)["execution_count"]
        replies = together(server, protocol, model, each)
        return replies if statistics(client, model)["execution_count"] == before + 1 else None

    replies: list[Any] = in_three_tries(met)
    return replies


def check_refused(error: object, code: str, *words: str) -> None:
    assert isinstance(error, InferenceServerException), error
    assert str(error.status()).removeprefix("StatusCode.") in (code, STATUSES[code])
    for word in words:
        assert word in error.message()
    for leak in ("Traceback", "/tmp", "site-packages", "ray::"):
        assert leak not in error.message()


def refused(client: Any, model: str, arrays: Arrays, code: str, *words: str) -> None:
    with pytest.raises(InferenceServerException) as caught:
        infer(client, model, arrays)
    check_refused(caught.value, code, *words)


# --- names ---------------------------------------------------------------------------------------


def test_a01_forward_names_in_reversed_order(client: Any) -> None:
    a, b = rows(3, 4, 1), rows(3, 4, 2)
    reply = infer(client, "a01_reversed", {"a": a, "b": b})
    with torch.inference_mode():
        plus, minus = models.add_sub()(torch.from_numpy(a), torch.from_numpy(b))
    np.testing.assert_array_equal(reply.as_numpy("OUTPUT__0"), plus.numpy())
    np.testing.assert_array_equal(reply.as_numpy("OUTPUT__1"), minus.numpy())


def test_a02_gaps_in_the_indices_are_a_load_error(
    refusals: Mapping[str, str], http: Any, client: Any
) -> None:
    told = refusals["a02_gapped"]
    assert "a02_gapped/config.pbtxt:" in told and "input[1].name" in told
    assert "'INPUT__7'" in told and "ARGS[1]" in told  # what the model offers
    (entry,) = [e for e in http.get_model_repository_index() if e["name"] == "a02_gapped"]
    assert entry["state"] == "UNAVAILABLE" and "INPUT__7" in entry["reason"]
    assert not client.is_model_ready("a02_gapped")


def test_a03_dictionary_input(client: Any) -> None:
    a, b = rows(2, 4, 1), rows(2, 4, 2)
    reply = infer(client, "a03_dict", {"B": b, "A": a})
    np.testing.assert_array_equal(reply.as_numpy("OUTPUT__0"), a - b)


# --- outputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["a04_list", "a04_dict"])
def test_a04_structures_without_result_names_are_a_500(client: Any, model: str) -> None:
    refused(client, model, {"x": rows(2, 2)}, "500", "output must be of type Tensor, List[str]")


def test_a04_beyond_result_names_reach_inside(client: Any) -> None:
    x = rows(2, 2)
    reply = infer(client, "a04_list_result", {"x": x})
    np.testing.assert_array_equal(reply.as_numpy("RESULT[0]"), x)
    np.testing.assert_array_equal(reply.as_numpy("RESULT[1]"), x * 2)
    reply = infer(client, "a04_dict_result", {"x": x})
    np.testing.assert_array_equal(reply.as_numpy("RESULT[same]"), x)
    np.testing.assert_array_equal(reply.as_numpy("RESULT[double]"), x * 2)


def test_a05_a_scalar_output_is_a_400(client: Any) -> None:
    refused(client, "a05_scalar", {"x": rows(2, 2)}, "400", "'OUTPUT__0'", "scalar")


def test_a06_another_output_type_fails_every_member(
    server: Server, http: Any, protocol: str
) -> None:
    before = statistics(http, "a06_integers")
    x = rows(3, 2)
    replies = together(server, protocol, "a06_integers", [{"x": x[i : i + 1]} for i in range(3)])
    for reply in replies:
        check_refused(
            reply,
            "400",
            "configuration expects datatype TYPE_INT32 for output 'OUTPUT__0', "
            "model provides TYPE_FP32",
        )
    after = statistics(http, "a06_integers")
    assert after["fail"] - before["fail"] == 3
    assert after["execution_count"] == before["execution_count"]  # no batch went well


def test_a07_too_few_output_rows_fail_the_tail_only(
    server: Server, http: Any, protocol: str
) -> None:
    x = rows(3, 2)
    each = [{"x": x[i : i + 1]} for i in range(3)]
    replies = in_one_batch(server, http, protocol, "a07_fewer_rows", each)
    failed = [i for i, reply in enumerate(replies) if isinstance(reply, Exception)]
    assert len(failed) == 1  # whichever came last
    check_refused(replies[failed[0]], "501", "failed to split the output tensor 'OUTPUT__0'")
    for i in {0, 1, 2} - set(failed):
        np.testing.assert_array_equal(replies[i].as_numpy("OUTPUT__0"), x[i : i + 1])


def test_a08_surplus_output_rows_are_dropped(server: Server, protocol: str) -> None:
    x = rows(3, 2)
    replies = together(server, protocol, "a08_more_rows", [{"x": x[i : i + 1]} for i in range(3)])
    for i, reply in enumerate(replies):
        np.testing.assert_array_equal(reply.as_numpy("OUTPUT__0"), x[i : i + 1])


def test_output_dims_are_the_models_own_affair(client: Any) -> None:
    x = rows(2, 2)
    reply = infer(client, "a05_dims", {"x": x})  # dims say [7, -1]
    np.testing.assert_array_equal(reply.as_numpy("OUTPUT__0"), x)


def test_outputs_come_by_name_and_only_those_asked_for(client: Any) -> None:
    """The configuration lists OUTPUT__1 first, and so may the request."""
    arrays = {"a": rows(1, 4, 1), "b": rows(1, 4, 2)}

    def order(*asked: str) -> list[str]:
        wanted = [module_of(client).InferRequestedOutput(name) for name in asked] or None
        response = infer(client, "a01_reversed", arrays, outputs=wanted).get_response()
        if isinstance(response, dict):
            return [output["name"] for output in response["outputs"]]
        return [output.name for output in response.outputs]

    assert order() == ["OUTPUT__0", "OUTPUT__1"]
    assert order("OUTPUT__1", "OUTPUT__0") == ["OUTPUT__0", "OUTPUT__1"]
    assert order("OUTPUT__1") == ["OUTPUT__1"]


# --- strings -------------------------------------------------------------------------------------


def words(*texts: bytes) -> Any:
    return np.array([[text] for text in texts], dtype=np.object_)


def test_a09_string_requests_in_one_batch_get_their_own_rows(
    server: Server, http: Any, protocol: str
) -> None:
    each = [words(b"a", b"b\0b"), words("ü".encode()), words(b"", b"d", b"e")]
    replies = in_one_batch(server, http, protocol, "a09_words", [{"words": one} for one in each])
    places = set()
    for sent, reply in zip(each, replies, strict=True):
        got = reply.as_numpy("OUTPUT__0")
        assert got.shape == sent.shape
        for text, answer in zip(sent.ravel(), got.ravel(), strict=True):
            own, _, place = answer.rpartition(b"#")
            assert own == text
            places.add(int(place))
    assert places == set(range(6))  # it was one batch


def test_a10_bad_bytes_in_one_request_leave_the_others_fine(server: Server, protocol: str) -> None:
    each = [words(b"a", b"b"), words(b"\xff"), words(b"c", b"d", b"e", b"f")]
    replies = together(server, protocol, "a09_words", [{"words": one} for one in each])
    check_refused(replies[1], "400", "'words'")
    for i in (0, 2):
        got = [text.rpartition(b"#")[0] for text in replies[i].as_numpy("OUTPUT__0").ravel()]
        assert got == list(each[i].ravel())


def test_a10_an_incomplete_element_is_a_400(server: Server) -> None:
    whole = serialize_byte_tensor(words(b"abc")).item()
    for data in (whole[:-1], whole + b"\1", b"\xff\xff\xff\x7f" + whole[4:]):
        head = (
            '{"inputs":[{"name":"words","datatype":"BYTES","shape":[1,1],'
            f'"parameters":{{"binary_data_size":{len(data)}}}}}]}}'
        ).encode()
        reply = httpx.post(
            f"http://{server.http}/v2/models/a09_words/infer",
            content=head + data,
            headers={"Inference-Header-Content-Length": str(len(head))},
            timeout=60,
        )
        assert reply.status_code == 400 and "words" in reply.json()["error"]
    assert server.live()


# --- parameters ----------------------------------------------------------------------------------


def test_a11_without_inference_mode_gradients_stay_off(client: Any) -> None:
    x = rows(2, 2)
    reply = infer(client, "a11_no_inference", {"x": x})
    assert not reply.as_numpy("OUTPUT__0").any() and not reply.as_numpy("OUTPUT__1").any()
    reply = infer(client, "a11_inference", {"x": x})  # the control: the default is on
    assert not reply.as_numpy("OUTPUT__0").any() and reply.as_numpy("OUTPUT__1").all()


def test_a12_invalid_parameters_are_load_errors(refusals: Mapping[str, str]) -> None:
    told = refusals["a12_bool"]
    assert "failed to convert 'perhaps' to boolean" in told and "INFERENCE_MODE" in told
    told = refusals["a12_int"]
    assert "failed to convert 'many' to integral number" in told
    assert "a12_int/config.pbtxt:" in told and "INTRA_OP_THREAD_COUNT" in told


def is_shown(server: Server, line: str) -> bool:
    """What a replica logs is shown a moment later."""
    return line in server.output()


def test_a13_thread_counts_are_each_models_own(server: Server, client: Any) -> None:
    """Beyond: not the first model's for all, since each replica is a process."""
    for count in (1, 3, 1):
        reply = infer(client, f"a13_threads_{count}", {"x": rows(1, 2)})
        assert set(reply.as_numpy("y").ravel()) == {float(count)}
        line = f"Intra op thread count is set to {count} for model 'a13_intra_{count}'"
        wait_for(partial(is_shown, server, line), 30, line)


# --- arguments -----------------------------------------------------------------------------------


def test_a14_optional_inputs_need_a_default(refusals: Mapping[str, str]) -> None:
    told = refusals["a14_needed"]
    assert "input[1].optional" in told and "'scale'" in told


def test_a14_beyond_an_optional_input_may_be_left_out(client: Any) -> None:
    x = rows(2, 2)
    reply = infer(client, "a14_optional", {"x": x})
    np.testing.assert_array_equal(reply.as_numpy("y"), x)
    reply = infer(client, "a14_optional", {"x": x, "scale": x})
    np.testing.assert_array_equal(reply.as_numpy("y"), x * x)
    refused(client, "a14_optional", {"scale": x}, "400", "x")


def seed_inputs(count: int, width: int = 16) -> Arrays:
    named = ("INPUT__0", "ARGS[1]", "INPUT__2", "ARGS[2][key2]", "KWARGS[kwarg1]", "INPUT__5")
    return {name: rows(count, width, seed) for seed, name in enumerate(named)}


def test_a15_packages_take_ordinals_and_paths_mixed(client: Any) -> None:
    arrays = seed_inputs(3)
    reply = infer(client, "a15_mixed", arrays)
    first, second = arrays["INPUT__0"], arrays["ARGS[1]"]
    np.testing.assert_allclose(reply.as_numpy("OUTPUT__0"), first + second, rtol=1e-6)
    np.testing.assert_allclose(reply.as_numpy("RESULT[ZZZ]"), first - second, rtol=1e-6)


def test_a16_a_wrong_shape_for_a_package_is_a_400_and_no_garbage(client: Any) -> None:
    """The configuration takes any width here, so that only the package can tell."""
    refused(client, "a16_any_width", seed_inputs(2, 15), "400")
    arrays = seed_inputs(2)
    reply = infer(client, "a16_any_width", arrays)
    expected = arrays["INPUT__0"] + arrays["ARGS[1]"]
    np.testing.assert_allclose(reply.as_numpy("OUTPUT__0"), expected, rtol=1e-6)


def test_a17_structures_that_no_name_can_reach_are_load_errors(
    refusals: Mapping[str, str],
) -> None:
    """Those of a program and of a package are read by the same code."""
    assert "a17_empty/1/model.pt2" in refusals["a17_empty"]
    assert "ARGS[1] is an empty list" in refusals["a17_empty"]
    assert "key 'a b' of ARGS[1]" in refusals["a17_key"]
    told = refusals["a17_integer"]
    assert "configuration expects 2 inputs, model provides 1; it offers ARGS[0]" in told


def test_a17_beyond_keywords_alone_ordered_dictionaries_and_constants(client: Any) -> None:
    x, shift = rows(1, 2, 1)[0], rows(1, 2, 2)[0]
    reply = infer(client, "a17_keywords", {"KWARGS[x]": x, "KWARGS[shift]": shift})
    np.testing.assert_array_equal(reply.as_numpy("RESULT[sum]"), x + shift)
    np.testing.assert_array_equal(reply.as_numpy("RESULT[difference]"), x - shift)
    reply = infer(client, "a17_constant", {"ARGS[0]": x})  # exported with a count of 3
    np.testing.assert_array_equal(reply.as_numpy("RESULT"), x * 3)


def test_a18_keyword_inputs_also_nested(client: Any) -> None:
    x, shift, by = rows(2, 2, 1), rows(2, 2, 2), rows(2, 2, 3)
    arrays = {"KWARGS[options][scale][by]": by, "ARGS[0]": x, "KWARGS[shift]": shift}
    reply = infer(client, "a18_nested", arrays)
    np.testing.assert_allclose(reply.as_numpy("RESULT[sum][0]"), x * by + shift, rtol=1e-6)
    np.testing.assert_array_equal(reply.as_numpy("RESULT[plain]"), x)


# --- files ---------------------------------------------------------------------------------------


def test_a19_of_two_classes_the_alphabetically_first_is_served(client: Any) -> None:
    x = rows(2, 2)
    np.testing.assert_array_equal(infer(client, "a19_two_classes", {"x": x}).as_numpy("y"), x + 1)


def test_a20_a_model_py_needs_no_weights(client: Any, models_root: Path) -> None:
    assert not (models_root / "a20_no_weights" / "1" / "model.pt").exists()
    x = rows(2, 2)
    np.testing.assert_array_equal(infer(client, "a20_no_weights", {"x": x}).as_numpy("y"), x)


def test_a21_the_python_runtime_leaves_the_filename_empty(
    http: Any, grpc: Any, client: Any
) -> None:
    assert http.get_model_config("a21_script")["default_model_filename"] == ""
    told = grpc.get_model_config("a21_script").config
    assert told.default_model_filename == "" and told.runtime == "model.py"
    x = rows(2, 2)
    np.testing.assert_array_equal(infer(client, "a21_script", {"x": x}).as_numpy("y"), x)


def test_a22_tensors_without_elements(client: Any) -> None:
    x = np.zeros((3, 0), np.float32)
    got = infer(client, "a22_empty", {"x": x}).as_numpy("OUTPUT__0")
    assert got.shape == (3, 0) and got.dtype == np.float32


# --- sequences: of a later version ---------------------------------------------------------------


def test_a23_sequences_are_refused_by_name(refusals: Mapping[str, str]) -> None:
    told = refusals["a23_sequence"]
    assert "a23_sequence/config.pbtxt:" in told
    assert "sequence_batching: sequence batching is not supported" in told


def test_a24_state_is_refused_by_name(refusals: Mapping[str, str]) -> None:
    assert "sequence batching is not supported" in refusals["a24_state"]


# --- instance groups -----------------------------------------------------------------------------


def test_a25_auto_without_a_gpu_is_one_instance_on_the_cpu(http: Any, server: Server) -> None:
    (group,) = http.get_model_config("a25_auto")["instance_group"]
    assert (group["kind"], group["count"]) == ("KIND_CPU", 1)
    (replica,) = [
        r for r in server.peek()["replicas"] if r["application"].startswith("manta.a25_auto.")
    ]
    assert (replica["instances"], replica["device"]) == (1, "cpu")


def test_a26_weight_sharing_reuses_all_but_one(server: Server, client: Any) -> None:
    def reused(model: str) -> int:
        lines = [line for line in server.output().splitlines() if "Reusing TorchScript" in line]
        return len([line for line in lines if model in line])

    wait_for(lambda: reused("a26_shared") >= 2, 30, "two of three are told of")
    assert reused("a26_shared") == 2
    assert not reused("a26_apart")  # the control
    a, b = rows(2, 4, 1), rows(2, 4, 2)
    for model in ("a26_shared", "a26_apart"):
        np.testing.assert_array_equal(
            infer(client, model, {"a": a, "b": b}).as_numpy("OUTPUT__0"), a + b
        )
