"""Tensors in system shared memory, as tritonclient's documentation has it, and abuse of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException, serialize_byte_tensor

from tests import models
from tests.serve import repository
from tests.serve.clients import aio_client, infer, loading, module_of, rows
from tests.serve.repository import config, tensor
from tests.serve.server import Server, wait_for

BYTES = 64  # sixteen INT32
SECRET, SECRET_BYTES = "somebody-elses", 4242
RESERVED = "triton_python_backend_shm_region_"


HELD = '''
import os
import time
import torch

HERE = os.path.dirname(os.path.dirname(__file__))

class Held(torch.nn.Module):
    """Doubles. Below 0 it first makes a file in its folder, and waits for one named `go`."""

    def forward(self, s):
        if s.min() < 0:
            open(os.path.join(HERE, f"begun{int(s.min())}"), "w").close()
            while not os.path.exists(os.path.join(HERE, "go")):
                time.sleep(0.01)
        return s * 2
'''


class Simple(torch.nn.Module):
    """Sum and difference, as in Triton's examples."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return a + b, a - b


@pytest.fixture(scope="module", autouse=True)
def loaded(server: Server, models_root: Path) -> Iterator[None]:
    models.save_torchscript(Simple(), models_root, "simple")
    given, taken = (
        [tensor(f"{way}__{i}", "16", "TYPE_INT32") for i in (0, 1)] for way in ("INPUT", "OUTPUT")
    )
    repository.write_config(models_root, "simple", config(given, taken))
    models.save_eager(HELD, models_root, "held")
    eager = 'backend: "pytorch"\nruntime: "model.py"'
    two = "instance_group [ { kind: KIND_CPU count: 2 } ]\n" + repository.EAGER
    text = config([tensor("s", "1")], [tensor("t", "1")], engine=eager, max_batch_size=1, more=two)
    repository.write_config(models_root, "held", text)
    with loading(server, ("simple", "held")):
        yield


@pytest.fixture(params=["http", "grpc"])
def client(server: Server, request: pytest.FixtureRequest) -> Iterator[Any]:
    """With no region registered, before and after."""
    if request.param == "http":
        made = httpclient.InferenceServerClient(server.http, concurrency=4, network_timeout=120)
    else:
        made = grpcclient.InferenceServerClient(server.grpc)
    yield made
    made.unregister_system_shared_memory()
    assert registered(made) == []
    made.close()


def registered(client: Any) -> list[str]:
    status = client.get_system_shared_memory_status()
    names = [each["name"] for each in status] if isinstance(status, list) else status.regions
    return sorted(names)


def key_of(name: str) -> str:
    return f"/manta-test-{os.getpid()}-{name}"


@contextlib.contextmanager
def memory(name: str, size: int = BYTES) -> Iterator[Any]:
    """A handle of tritonclient's; not registered."""
    handle = shm.create_shared_memory_region(name, key_of(name), size, create_only=True)
    try:
        yield handle
    finally:
        shm.destroy_shared_memory_region(handle)


@contextlib.contextmanager
def regions(client: Any, *names: str, size: int = BYTES) -> Iterator[list[Any]]:
    with contextlib.ExitStack() as stack:
        handles = [stack.enter_context(memory(name, size)) for name in names]
        for name in names:
            client.register_system_shared_memory(name, key_of(name), size)
        yield handles


def contents(handle: Any, dtype: Any, shape: Any, offset: int = 0) -> Any:
    """A copy: what tritonclient gives is a view, which would keep the memory mapped."""
    return shm.get_contents_as_numpy(handle, dtype, shape, offset).copy()


def lent(
    client: Any, name: str, shape: Any, datatype: str, region: str, size: int, offset: int = 0
) -> Any:
    one = module_of(client).InferInput(name, list(shape), datatype)
    one.set_shared_memory(region, size, offset)
    return one


def placed(client: Any, name: str, region: str, size: int, offset: int = 0) -> Any:
    one = module_of(client).InferRequestedOutput(name)
    one.set_shared_memory(region, size, offset)
    return one


def described(reply: Any, name: str) -> tuple[list[int], str]:
    """All that is said of an output that was placed."""
    output = reply.get_output(name)
    if isinstance(output, dict):
        assert set(output) == {"name", "datatype", "shape"}
        return output["shape"], output["datatype"]
    assert not output.parameters and not output.HasField("contents")
    return list(output.shape), output.datatype


def status(error: InferenceServerException) -> str:
    return str(error.status()).removeprefix("StatusCode.")


# --- as documented ----------------------------------------


def test_sums_in_shared_memory(client: Any) -> None:
    """simple_http_shm_client.py and simple_grpc_shm_client.py: one region in, one out."""
    a, b = np.arange(16, dtype=np.int32), np.ones(16, np.int32)
    with regions(client, "input_data", "output_data", size=2 * BYTES) as (given, taken):
        shm.set_shared_memory_region(given, [a])
        shm.set_shared_memory_region(given, [b], offset=BYTES)
        sent = [
            lent(client, "INPUT__0", (1, 16), "INT32", "input_data", BYTES),
            lent(client, "INPUT__1", (1, 16), "INT32", "input_data", BYTES, BYTES),
        ]
        outputs = [
            placed(client, "OUTPUT__0", "output_data", BYTES),
            placed(client, "OUTPUT__1", "output_data", BYTES, BYTES),
        ]
        for _ in range(3):
            reply = client.infer("simple", sent, outputs=outputs, request_id="mine")
            for name, offset, expected in (("OUTPUT__0", 0, a + b), ("OUTPUT__1", BYTES, a - b)):
                assert described(reply, name) == ([1, 16], "INT32")
                np.testing.assert_array_equal(contents(taken, np.int32, [16], offset), expected)
            shm.set_shared_memory_region(given, [a := a + 1])
        assert registered(client) == ["input_data", "output_data"]
        client.unregister_system_shared_memory("input_data")
        assert registered(client) == ["output_data"]
        client.unregister_system_shared_memory()
        assert registered(client) == []


def test_strings_in_shared_memory(client: Any) -> None:
    """simple_http_shm_string_client.py."""
    words = np.array([[b"a\0b"], ["Grüße".encode()], [b""]], np.object_)
    wire = serialize_byte_tensor(words)
    size = len(wire.item())
    with regions(client, "words", "answers", size=256) as (given, taken):
        shm.set_shared_memory_region(given, [wire])
        reply = client.infer(
            "strings",
            [lent(client, "words", (3, 1), "BYTES", "words", size)],
            outputs=[placed(client, "OUTPUT__0", "answers", 256)],
        )
        assert reply is not None
        found = contents(taken, np.object_, [3, 1])
        assert found.tolist() == [[word + b"!"] for word in words.ravel()]


def test_the_status_tells_what_was_registered(client: Any) -> None:
    with memory("r"):
        client.register_system_shared_memory("r", key_of("r"), 40, offset=8)
        one = client.get_system_shared_memory_status("r")
        if isinstance(one, list):
            expected = {"name": "r", "key": key_of("r"), "offset": 8, "byte_size": 40}
            assert one == [expected]
        else:
            region = one.regions["r"]
            found = (region.name, region.key, region.offset, region.byte_size)
            assert found == ("r", key_of("r"), 8, 40)
        cuda = client.get_cuda_shared_memory_status()
        assert (cuda if isinstance(cuda, list) else list(cuda.regions)) == []


@pytest.mark.parametrize("megabytes", [0.1, 4])
def test_small_and_large_tensors(client: Any, megabytes: float) -> None:
    x = rows(1, int(megabytes * (1 << 18)))
    with regions(client, "r", size=2 * x.nbytes) as (handle,):
        shm.set_shared_memory_region(handle, [x], offset=x.nbytes)
        client.infer(
            "big",
            [lent(client, "x", x.shape, "FP32", "r", x.nbytes, x.nbytes)],
            outputs=[placed(client, "OUTPUT__0", "r", x.nbytes)],
        )
        assert np.array_equal(contents(handle, np.float32, x.shape), x)


def test_memory_beside_bytes_and_json(client: Any) -> None:
    a, b = np.arange(16, dtype=np.int32)[None], np.full((1, 16), 7, np.int32)
    module = module_of(client)
    options = [{}, {"binary_data": False}] if module is httpclient else [{}]
    for option in options:
        with regions(client, "r") as (handle,):
            shm.set_shared_memory_region(handle, [b])
            brought = module.InferInput("INPUT__0", [1, 16], "INT32")
            brought.set_data_from_numpy(a, **option)
            sent = [brought, lent(client, "INPUT__1", (1, 16), "INT32", "r", BYTES)]
            for each in (sent, sent[::-1]):
                outputs = [
                    placed(client, "OUTPUT__1", "r", BYTES),
                    module.InferRequestedOutput("OUTPUT__0", **option),
                ]
                reply = client.infer("simple", each, outputs=outputs)
                np.testing.assert_array_equal(reply.as_numpy("OUTPUT__0"), a + b)
                np.testing.assert_array_equal(contents(handle, np.int32, [1, 16]), a - b)
                shm.set_shared_memory_region(handle, [b])
        client.unregister_system_shared_memory()


def test_an_object_may_be_destroyed_before_it_is_unregistered(client: Any) -> None:
    with memory("r") as handle:
        shm.set_shared_memory_region(handle, [np.arange(16, dtype=np.float32)])
        client.register_system_shared_memory("r", key_of("r"), BYTES)
    reply = client.infer("big", [lent(client, "x", (1, 16), "FP32", "r", BYTES)])
    assert reply.as_numpy("OUTPUT__0").tolist() == [list(range(16))]


def test_many_at_once(server: Server, client: Any) -> None:
    """Each with a part of the region of its own, in and out."""
    protocol = "http" if module_of(client) is httpclient else "grpc"
    count, x = 24, rows(24, 16)
    with regions(client, "r", size=2 * x.nbytes) as (handle,):
        shm.set_shared_memory_region(handle, [x])

        async def run() -> None:
            async with aio_client(server, protocol) as one:
                await asyncio.gather(
                    *(
                        one.infer(
                            "big",
                            [lent(one, "x", (1, 16), "FP32", "r", BYTES, k * BYTES)],
                            outputs=[placed(one, "OUTPUT__0", "r", BYTES, x.nbytes + k * BYTES)],
                        )
                        for k in range(count)
                    )
                )

        asyncio.run(run())
        np.testing.assert_array_equal(contents(handle, np.float32, x.shape, x.nbytes), x)


# --- registration, abused ----------------------------------------

REGISTER = [
    ("reserved", f"{RESERVED}x", BYTES, 0, "as the key contains the reserved prefix"),
    ("reserved, slash", f"/{RESERVED}x", BYTES, 0, "as the key contains the reserved prefix"),
    ("reserved, slashes", f"///{RESERVED}", BYTES, 0, "as the key contains the reserved prefix"),
    ("elsewhere", "../../etc/passwd", BYTES, 0, "not the name of a shared memory object"),
    ("absolute", "/etc/passwd", BYTES, 0, "not the name of a shared memory object"),
    ("dots", "/..", BYTES, 0, "not the name of a shared memory object"),
    ("round about", f"./{RESERVED}", BYTES, 0, "not the name of a shared memory object"),
    ("nothing", "", BYTES, 0, "not the name of a shared memory object"),
    ("a semaphore", "/sem.x", BYTES, 0, "not the name of a shared memory object"),
    ("nobody's", "/manta-nowhere", BYTES, 0, "Unable to open shared memory region: '/manta-no"),
    ("too long", None, BYTES + 1, 0, "failed to register shared memory region 'q': invalid args"),
    ("shifted", None, BYTES, 1, "failed to register shared memory region 'q': invalid args"),
    ("behind", None, 1, BYTES, "failed to register shared memory region 'q': invalid args"),
    ("empty behind", None, 0, BYTES + 1, "failed to register shared memory region 'q': invalid"),
    ("empty", None, 0, 0, "failed to register shared memory region 'q': invalid args"),
    ("overflow", None, BYTES, 2**64 - 32, "failed to register shared memory region 'q': invalid"),
    ("overflow, size", None, 2**64 - 1, 1, "failed to register shared memory region 'q': invalid"),
]


@pytest.mark.parametrize("case", REGISTER, ids=[case[0] for case in REGISTER])
def test_what_cannot_be_registered(client: Any, case: Any) -> None:
    _, key, size, offset, text = case
    key = key_of("q") if key is None else key
    with regions(client, SECRET, size=SECRET_BYTES), memory("q"):
        with pytest.raises(InferenceServerException) as caught:
            client.register_system_shared_memory("q", key, size, offset)
        check_refusal(caught.value, "400", "INVALID_ARGUMENT", text)
        assert registered(client) == [SECRET]


def check_refusal(error: InferenceServerException, http: str, grpc: str, text: str) -> None:
    assert status(error) in (http, grpc), error
    assert text in error.message()
    for leak in (SECRET, str(SECRET_BYTES), "Traceback", "/dev/shm", "/site-packages", 'File "'):
        assert leak not in error.message()


def test_names_that_are_taken_and_names_that_are_not(client: Any) -> None:
    with regions(client, SECRET, size=SECRET_BYTES), regions(client, "r"):
        with pytest.raises(InferenceServerException) as caught:
            client.register_system_shared_memory("r", key_of("r"), BYTES)
        text = "shared memory region 'r' already in manager"
        check_refusal(caught.value, "400", "ALREADY_EXISTS", text)
        with pytest.raises(InferenceServerException) as caught:
            client.get_system_shared_memory_status("q")
        text = "Unable to find system shared memory region: 'q'"
        check_refusal(caught.value, "404", "NOT_FOUND", text)
        client.unregister_system_shared_memory("q")  # no error, as in Triton
        assert registered(client) == ["r", SECRET]


def test_cuda_regions_are_refused_by_name(client: Any) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.register_cuda_shared_memory("q", "AAAA", 0, 64)
    text = "failed to register CUDA shared memory region: 'q', GPUs not supported"
    check_refusal(caught.value, "400", "INVALID_ARGUMENT", text)
    with pytest.raises(InferenceServerException) as caught:
        client.get_cuda_shared_memory_status("q")
    text = "Unable to find cuda shared memory region: 'q'"
    check_refusal(caught.value, "404", "NOT_FOUND", text)
    client.unregister_cuda_shared_memory()
    client.unregister_cuda_shared_memory("q")


def test_malformed_registrations(server: Server) -> None:
    url = f"http://{server.http}/v2/systemsharedmemory"
    for path, content, code in (
        ("/region/q/register", b"{", 500),
        ("/region/q/register", b"{}", 400),
        ("/region/q/register", b'{"key":"k","byte_size":-1}', 500),
        ("/region/q/register", b'{"key":"k","byte_size":1e400}', 500),
        ("/region/q/register", b'{"key":["k"],"byte_size":1}', 500),
        ("/region/q/register", b"[" * 200 + b"]" * 200, 400),
        ("/register", b'{"key":"k","byte_size":1}', 400),
        ("/region/a/b/register", b'{"key":"k","byte_size":1}', 404),
    ):
        reply = httpx.post(url + path, content=content, timeout=60)
        assert reply.status_code == code and list(reply.json()) == ["error"], reply.text
    assert httpx.post(f"{url}/status", timeout=60).status_code == 405
    assert httpx.get(f"{url}/status", timeout=60).json() == []


# --- inference, abused ----------------------------------------

INFER = [
    ("unknown", "q", BYTES, 0, "404", "NOT_FOUND", "Unable to find shared memory region: 'q'"),
    ("behind", "r", BYTES, BYTES, "400", "INVALID_ARGUMENT", "Invalid offset for shared memory"),
    ("beyond", "r", BYTES, 4, "400", "INVALID_ARGUMENT", "Invalid offset + byte size for shared"),
    ("too long", "r", BYTES + 1, 0, "400", "INVALID_ARGUMENT", "Invalid offset + byte size"),
    ("far behind", "r", BYTES, 2**63 - 1, "400", "INVALID_ARGUMENT", "Invalid offset for shared"),
    ("giant", "r", 2**63 - 1, 8, "400", "INVALID_ARGUMENT", "Invalid offset + byte size"),
]


@pytest.mark.parametrize("case", INFER, ids=[case[0] for case in INFER])
@pytest.mark.parametrize("way", ["in", "out"])
def test_what_lies_outside_of_a_region(client: Any, way: str, case: Any) -> None:
    _, region, size, offset, http, grpc, text = case
    x = np.arange(16, dtype=np.float32)[None]
    with regions(client, SECRET, size=SECRET_BYTES), regions(client, "r") as (handle,):
        shm.set_shared_memory_region(handle, [x])
        with pytest.raises(InferenceServerException) as caught:
            if way == "in":
                client.infer("big", [lent(client, "x", (1, 16), "FP32", region, size, offset)])
            else:
                outputs = [placed(client, "OUTPUT__0", region, size, offset)]
                infer(client, "big", {"x": x}, outputs=outputs)
        check_refusal(caught.value, http, grpc, text)
        assert np.array_equal(contents(handle, np.float32, (1, 16)), x)
        reply = client.infer("big", [lent(client, "x", (1, 16), "FP32", "r", BYTES)])
        assert np.array_equal(reply.as_numpy("OUTPUT__0"), x)


def test_sums_that_overflow(server: Server, client: Any) -> None:
    """Only JSON can carry such numbers; gRPC's client refuses them by itself."""
    url = f"http://{server.http}/v2/models/big/infer"
    with regions(client, "r"):
        for size, offset, text in (
            (2**64 - 32, 32, "Integer overflow detected: byte_size (18446744073709551584)"),
            (BYTES, 2**64 - 32, "Invalid offset for shared memory region: 'r'"),
        ):
            given = {
                "shared_memory_region": "r",
                "shared_memory_byte_size": size,
                "shared_memory_offset": offset,
            }
            one = {"name": "x", "datatype": "FP32", "shape": [1, 16], "parameters": given}
            reply = httpx.post(url, json={"inputs": [one]}, timeout=60)
            assert reply.status_code == 400 and text in reply.json()["error"]


def test_sizes_that_do_not_fit(client: Any) -> None:
    x = np.arange(16, dtype=np.float32)[None]
    with regions(client, "r") as (handle,):
        shm.set_shared_memory_region(handle, [x])
        for size in (BYTES - 4, 0):
            with pytest.raises(InferenceServerException) as caught:
                client.infer("big", [lent(client, "x", (1, 16), "FP32", "r", size)])
            text = f"mismatch for input 'x' for model 'big'. Expected 64, got {size}"
            check_refusal(caught.value, "400", "INVALID_ARGUMENT", text)
            with pytest.raises(InferenceServerException) as caught:
                outputs = [placed(client, "OUTPUT__0", "r", size)]
                infer(client, "big", {"x": x + 1}, outputs=outputs)
            text = (
                f"shared memory size specified with the request for output 'OUTPUT__0' ({size} "
                "bytes) should be at least 64 bytes to hold the results"
            )
            check_refusal(caught.value, "500", "INTERNAL", text)
        assert np.array_equal(contents(handle, np.float32, (1, 16)), x)


def test_strings_that_do_not_fit_their_lengths(client: Any) -> None:
    with regions(client, "r") as (handle,):
        shm.set_shared_memory_region(handle, [np.array([200], np.uint32)])
        for size in (BYTES, 4, 3):
            with pytest.raises(InferenceServerException) as caught:
                client.infer("strings", [lent(client, "words", (1, 1), "BYTES", "r", size)])
            check_refusal(caught.value, "400", "INVALID_ARGUMENT", "incomplete string")


def test_inputs_in_memory_are_limited(client: Any) -> None:
    """A small request does not make the server copy without end."""
    mib = 1 << 20
    with regions(client, "r", size=64 * mib):
        sent = [lent(client, f"x{i}", (1, 16 * mib), "FP32", "r", 64 * mib) for i in range(40)]
        with pytest.raises(InferenceServerException) as caught:
            client.infer("big", sent)
        text = f"inputs of {40 * 64 * mib} bytes in shared memory exceed the maximum allowed value"
        check_refusal(caught.value, "400", "INVALID_ARGUMENT", text)


# --- while a request runs ----------------------------------------


class Call:
    """A request to `held` on a thread, with `number` from byte `offset` of region `r` on, and its
    answer to the four bytes behind."""

    def __init__(self, server: Server, client: Any, handle: Any, number: int, offset: int) -> None:
        shm.set_shared_memory_region(handle, [np.array([number, 0], np.float32)], offset)
        self.begun = server.repository / "held" / f"begun{number}"
        self.begun.unlink(missing_ok=True)
        self.offset = offset
        self.module = module_of(client)
        self.address = server.http if self.module is httpclient else server.grpc
        self.result: Any = None
        self.thread = threading.Thread(target=self.run)
        self.thread.start()
        wait_for(self.begun.exists, 60, "the model runs")

    def run(self) -> None:
        with self.module.InferenceServerClient(self.address) as one:
            sent = [lent(one, "s", (1, 1), "FP32", "r", 4, self.offset)]
            outputs = [placed(one, "t", "r", 4, self.offset + 4)]
            try:
                self.result = one.infer("held", sent, outputs=outputs)
            except InferenceServerException as error:
                self.result = error

    def finish(self) -> Any:
        self.thread.join(60)
        return self.result


def test_a_region_in_use_goes_with_the_last_request_that_uses_it(
    server: Server, client: Any
) -> None:
    with (
        regions(client, "r", "other") as (handle, _),
        repository.holding(server.repository / "held") as go,
    ):
        first = Call(server, client, handle, -1, 0)
        client.unregister_system_shared_memory("r")
        assert registered(client) == ["other", "r"]
        client.unregister_system_shared_memory()
        assert registered(client) == ["r"]
        second = Call(server, client, handle, -2, 16)  # it is still there for others, as in Triton
        with pytest.raises(InferenceServerException, match="already in manager"):
            client.register_system_shared_memory("r", key_of("r"), BYTES)
        go()
        for call in (first, second):
            assert not isinstance(call.finish(), InferenceServerException), call.result
        assert registered(client) == []
        assert contents(handle, np.float32, [2]).tolist() == [-1.0, -2.0]
        assert contents(handle, np.float32, [2], 16).tolist() == [-2.0, -4.0]


def test_a_client_that_writes_while_its_request_runs(server: Server, client: Any) -> None:
    with (
        regions(client, "r") as (handle,),
        repository.holding(server.repository / "held") as go,
    ):
        call = Call(server, client, handle, -1, 0)
        shm.set_shared_memory_region(handle, [np.array([5, 6], np.float32)])
        go()
        assert not isinstance(call.finish(), InferenceServerException)
        # The answer is that to the input as it came.
        assert contents(handle, np.float32, [2]).tolist() == [5.0, -2.0]


@pytest.mark.parametrize("left", [0, 4])
def test_an_object_that_is_cut_short_while_its_request_runs(
    server: Server, client: Any, left: int
) -> None:
    """A mapping would end the Router with SIGBUS."""
    before = server.replica_pids("manta:Router")
    with (
        regions(client, "r") as (handle,),
        repository.holding(server.repository / "held") as go,
    ):
        call = Call(server, client, handle, -1, 0)
        os.truncate(f"/dev/shm{key_of('r')}", left)
        go()
        error = call.finish()
        text = "Invalid offset + byte size for shared memory region: 'r'"
        check_refusal(error, "400", "INVALID_ARGUMENT", text)
        with pytest.raises(InferenceServerException) as caught:
            client.infer("big", [lent(client, "x", (1, 16), "FP32", "r", BYTES)])
        check_refusal(caught.value, "400", "INVALID_ARGUMENT", text)
        assert os.stat(f"/dev/shm{key_of('r')}").st_size == left
    assert server.replica_pids("manta:Router") == before and server.ready()
    x = rows(1, 4)
    np.testing.assert_array_equal(infer(client, "big", {"x": x}).as_numpy("OUTPUT__0"), x)


def test_a_client_that_leaves_frees_its_region(server: Server, client: Any) -> None:
    with (
        regions(client, "r") as (handle,),
        repository.holding(server.repository / "held") as go,
    ):
        begun = server.repository / "held" / "begun-3"
        begun.unlink(missing_ok=True)
        shm.set_shared_memory_region(handle, [np.array([-3], np.float32)])
        module = module_of(client)
        if module is httpclient:
            one = module.InferenceServerClient(server.http, network_timeout=0.5)
        else:
            one = module.InferenceServerClient(server.grpc)
        limit = {} if module is httpclient else {"client_timeout": 0.5}
        with pytest.raises(Exception, match="timed out|Deadline"):
            one.infer("held", [lent(one, "s", (1, 1), "FP32", "r", 4)], **limit)
        one.close()
        client.unregister_system_shared_memory("r")
        wait_for(lambda: registered(client) == [], 60, "the region is free")
        go()


# --- the rest ----------------------------------------


def test_the_server_names_the_extension(client: Any) -> None:
    metadata = client.get_server_metadata()
    extensions = metadata["extensions"] if isinstance(metadata, dict) else metadata.extensions
    assert "system_shared_memory" in extensions and "cuda_shared_memory" not in extensions


def test_classes_do_not_go_into_shared_memory(server: Server, client: Any) -> None:
    """tritonclient refuses that by itself."""
    where = {"shared_memory_region": "r", "shared_memory_byte_size": BYTES}
    output = {"name": "OUTPUT__0", "parameters": {"classification": 1, **where}}
    one = {"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1]}
    with regions(client, "r"):
        url = f"http://{server.http}/v2/models/big/infer"
        reply = httpx.post(url, json={"inputs": [one], "outputs": [output]}, timeout=60)
        assert reply.status_code == 400
        text = "Output can't set both 'shared_memory_region' and 'classification'"
        assert text in reply.json()["error"]
