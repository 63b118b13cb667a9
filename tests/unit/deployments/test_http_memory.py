"""Shared memory and classes over HTTP, by the lane and by ASGI: clients must not see which."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import zlib
from dataclasses import replace

import numpy as np
import pytest

from deployments.errors import Internal, InvalidArgument, MantaError
from deployments.http_memory import registration
from deployments.tensors import encode_bytes

from .lanes import LENGTH, LINEAR, LaneServer, binary, request, run
from .memories import objects
from .serving import Server, json_input, linear

X = np.array([[1.0, -2.0, 3.0, 0.5]], np.float32)
Y = linear(X)[0]
SYSTEM, CUDA = "/v2/systemsharedmemory", "/v2/cudasharedmemory"
LABELS = ("cat", "dog", "bird")
ADD_SUB = "/v2/models/add_sub/infer"


@pytest.fixture
def memory():
    with objects() as make:
        yield make


@pytest.fixture
def server():
    return Server(allow_client_shm=True)


# --- registration ----------------------------------------


def test_a_registration():
    assert registration({"key": "k", "byte_size": 8}) == ("k", 0, 8)
    assert registration({"key": "k", "byte_size": 8, "offset": 2**64 - 1}) == ("k", 2**64 - 1, 8)


@pytest.mark.parametrize(
    ("document", "kind", "text"),
    [
        ({}, InvalidArgument, "Shared memory register request has no 'key' field"),
        ({"key": "k"}, InvalidArgument, "Shared memory register request has no 'byte_size' field"),
        ({"key": 1, "byte_size": 8}, Internal, "'key'"),
        ({"key": "k", "byte_size": "8"}, Internal, "'byte_size'.*unsigned-integer"),
        ({"key": "k", "byte_size": -8}, Internal, "'byte_size'.*unsigned-integer"),
        ({"key": "k", "byte_size": 8.0}, Internal, "'byte_size'"),
        ({"key": "k", "byte_size": True}, Internal, "'byte_size'"),
        ({"key": "k", "byte_size": 8, "offset": None}, Internal, "'offset'"),
    ],
)
def test_registrations_that_say_too_little_or_nonsense(document, kind, text):
    with pytest.raises(MantaError, match=text) as caught:
        registration(document)
    assert isinstance(caught.value, kind)


def test_the_routes(server, memory):
    file = memory(bytes(64))
    body = {"key": f"/{file.name}", "offset": 8, "byte_size": 56}
    reply = server.ask("POST", f"{SYSTEM}/region/a%20b/register", json=body)
    assert (reply.status_code, reply.content) == (200, b"")
    one = {"name": "a b", **body}
    assert server.ask("GET", f"{SYSTEM}/status").json() == [one]
    assert server.ask("GET", f"{SYSTEM}/region/a%20b/status").json() == [one]
    assert server.ask("GET", f"{CUDA}/status").json() == []
    assert server.ask("POST", f"{CUDA}/unregister").status_code == 200
    reply = server.ask("POST", f"{SYSTEM}/region/a%20b/register", json=body)
    assert (reply.status_code, reply.json()) == (
        400,
        {"error": "shared memory region 'a b' already in manager"},
    )
    for path in (f"{SYSTEM}/region/nobody/unregister", f"{SYSTEM}/region/a%20b/unregister"):
        reply = server.ask("POST", path)
        assert (reply.status_code, reply.content) == (200, b"")
    assert server.ask("GET", f"{SYSTEM}/status").json() == []
    server.ask("POST", f"{SYSTEM}/region/r/register", json=body)
    assert server.ask("POST", f"{SYSTEM}/unregister").status_code == 200
    assert server.ask("GET", f"{SYSTEM}/status").json() == []


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "text"),
    [
        ("GET", f"{SYSTEM}/region/q/status", b"", 404, "Unable to find system shared memory"),
        ("GET", f"{CUDA}/region/q/status", b"", 404, "Unable to find cuda shared memory region"),
        ("POST", f"{SYSTEM}/register", b'{"key":"k","byte_size":1}', 400, "'region name' is"),
        ("POST", f"{SYSTEM}/region/q/register", b"", 400, "has no 'key' field"),
        ("POST", f"{SYSTEM}/region/q/register", b"{", 500, "failed to parse"),
        ("POST", f"{SYSTEM}/region/q/register", b"[]", 500, "not an object"),
        ("POST", f"{SYSTEM}/region/q/register", b'{"key":"k","byte_size":[]}', 500, "byte_size"),
        (
            "POST",
            f"{SYSTEM}/region/q/register",
            b'{"key":"manta-nowhere","byte_size":1}',
            400,
            "Unable to open shared memory region: 'manta-nowhere'",
        ),
        (
            "POST",
            f"{SYSTEM}/region/q/register",
            b'{"key":"//triton_python_backend_shm_region_1","byte_size":1}',
            400,
            "reserved prefix",
        ),
        (
            "POST",
            f"{SYSTEM}/region/q/register",
            b'{"key":"../etc/passwd","byte_size":1}',
            400,
            "is not the name of a shared memory object",
        ),
        (
            "POST",
            f"{CUDA}/region/q/register",
            b'{"raw_handle":{"b64":"x"},"device_id":0,"byte_size":1}',
            400,
            "failed to register CUDA shared memory region: 'q', GPUs not supported",
        ),
        ("POST", f"{SYSTEM}/status", b"", 405, "Method Not Allowed"),
        ("GET", f"{SYSTEM}/region/q/register", b"", 405, "Method Not Allowed"),
        ("GET", f"{SYSTEM}/region/q", b"", 404, "Not Found"),
        ("GET", f"{SYSTEM}/region/a/b/status", b"", 404, "Not Found"),
        ("GET", f"{SYSTEM}/region/a%2fb/status", b"", 404, "Not Found"),
        ("POST", f"{SYSTEM}/region//register", b"", 404, "Not Found"),
        ("GET", "/v2/rocmsharedmemory/status", b"", 404, "Not Found"),
    ],
)
def test_refusals(server, method, path, content, status, text):
    reply = server.ask(method, path, content=content)
    assert (reply.status_code, text in reply.json()["error"]) == (status, True), reply.text


@pytest.mark.parametrize("kind", [SYSTEM, CUDA])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/status"),
        ("GET", "/region/r/status"),
        ("POST", "/register"),
        ("POST", "/region/r/register"),
        ("POST", "/unregister"),
        ("POST", "/region/r/unregister"),
    ],
)
def test_all_is_off_by_default(kind, method, path):
    reply = Server().ask(method, kind + path)
    assert (reply.status_code, reply.json()["error"]) == (
        501,
        "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to "
        "enable.",
    )


def test_the_extension_is_named_where_it_is_allowed(server):
    named, unnamed = (each.inference.server_metadata()["extensions"] for each in (server, Server()))
    assert named[0] == unnamed[0] == "classification"
    assert [each for each in named if each not in unnamed] == ["system_shared_memory"]


# --- tensors in memory ----------------------------------------


def in_memory(region, size, offset=0):
    offset_of = {"shared_memory_offset": offset} if offset else {}
    return {"shared_memory_region": region, "shared_memory_byte_size": size, **offset_of}


def shm_input(name="INPUT__0", datatype="FP32", shape=(1, 4), **parameters):
    return {"name": name, "datatype": datatype, "shape": list(shape), "parameters": parameters}


def shm_output(name="OUTPUT__0", **parameters):
    return {"name": name, "parameters": parameters}


async def both(server, data, times=1):
    """Status and body of the answer on both roads, which must be one and the same."""
    replies = []
    for road in ("ordinary", "lane"):
        client = await server.connect(road)
        replies += [await client.ask(data) for _ in range(times)]
        client.leave()
    assert all(each == replies[0] for each in replies), replies
    head, body = replies[0]
    return int(head.split()[1]), head, body


async def good(server, document, path=LINEAR, times=2):
    status, head, body = await both(server, request(json.dumps(document).encode(), path), times)
    assert status == 200, body
    assert LENGTH.encode() not in head
    return json.loads(body)


def with_memory(use, size=64, **settings):
    """`await use(server, file)`, with region `r` of that many bytes, and `s` of 4 from byte 8."""
    with objects() as make:
        file = make(X.tobytes() + bytes(size - X.nbytes))

        async def main(server: LaneServer):
            server.inference.memory.register("r", file.name, 0, size)
            server.inference.memory.register("s", file.name, 8, 4)
            await use(server, file)

        run(main, allow_client_shm=True, **settings)


def test_in_and_out_of_memory():
    async def use(server, file):
        document = {
            "id": "7",
            "inputs": [shm_input(**in_memory("r", 16))],
            "outputs": [shm_output(**in_memory("r", 12, 32), binary_data=False)],
        }
        assert await good(server, document) == {
            "id": "7",
            "model_name": "linear",
            "model_version": "1",
            "outputs": [{"name": "OUTPUT__0", "datatype": "FP32", "shape": [1, 3]}],
        }
        assert file.read_bytes() == X.tobytes() + bytes(16) + Y.tobytes() + bytes(20)
        file.write_bytes((2 * X).tobytes() + bytes(48))  # the next request finds what is there then
        await good(server, document)
        assert file.read_bytes()[32:44] == linear(2 * X)[0].tobytes()

    with_memory(use)


def test_memory_beside_json_and_bytes():
    async def use(server, file):
        four = np.arange(4, dtype=np.int32)
        file.write_bytes(four.tobytes() + bytes(48))
        document = {
            "inputs": [
                shm_input("INPUT1", "INT32", **in_memory("r", 16)),
                shm_input("INPUT0", "INT32", binary_data_size=16),
            ],
            "outputs": [
                shm_output("OUTPUT1", binary_data=True),
                shm_output("OUTPUT0", **in_memory("r", 16, 16)),
            ],
        }
        data = binary(document, (10 * four).tobytes(), path=ADD_SUB)
        _, head, body = await both(server, data, 2)
        length = int(head.lower().partition(LENGTH.encode() + b": ")[2].split(b"\r\n")[0])
        outputs = json.loads(body[:length])["outputs"]
        assert outputs[0] == {"name": "OUTPUT0", "datatype": "INT32", "shape": [1, 4]}
        assert outputs[1]["parameters"] == {"binary_data_size": 16}
        assert body[length:] == (9 * four).tobytes()
        assert file.read_bytes()[16:32] == (11 * four).tobytes()
        del document["outputs"]
        document["inputs"][1] = json_input("INPUT0", "INT32", [1, 4], (10 * four).tolist())
        outputs = (await good(server, document, ADD_SUB))["outputs"]
        assert [each["data"] for each in outputs] == [(n * four).tolist() for n in (11, 9)]

    with_memory(use)


def test_strings_in_memory():
    words = encode_bytes([b"a\0b", b""]).tobytes()

    async def use(server, file):
        file.write_bytes(words + bytes(64 - len(words)))
        document = {
            "inputs": [shm_input("X", "BYTES", (2,), **in_memory("r", len(words)))],
            "outputs": [shm_output("Y", **in_memory("r", 24, 32))],
        }
        (output,) = (await good(server, document, "/v2/models/strings/infer"))["outputs"]
        assert output == {"name": "Y", "datatype": "BYTES", "shape": [2]}
        assert file.read_bytes()[32 : 32 + len(words)] == words

    with_memory(use)


def test_large_tensors_in_memory():
    """They are copied on threads."""
    count = 400_000
    values = np.random.default_rng(0).random(count, np.float32)

    async def use(server, file):
        file.write_bytes(values.tobytes() + bytes(4 * count))
        document = {
            "inputs": [shm_input("X", shape=(1, count), **in_memory("r", 4 * count))],
            "outputs": [shm_output("Y", **in_memory("r", 4 * count, 4 * count))],
        }
        await good(server, document, "/v2/models/echo_FP32/infer")
        assert file.read_bytes()[4 * count :] == values.tobytes()

    with_memory(use, 8 * count)


OUT = "Output can't set both 'shared_memory_region' and"
ONE = "Input must set only one of the following fields"
BAD = [
    (shm_input(**in_memory("q", 16)), None, 404, "Unable to find shared memory region: 'q'"),
    (shm_input(**in_memory("s", 16)), None, 400, "Invalid offset + byte size for shared memory"),
    (shm_input(**in_memory("s", 4, 4)), None, 400, "Invalid offset for shared memory region: 's'"),
    (
        shm_input(**in_memory("r", 16, 2**64 - 32)),
        None,
        400,
        "Invalid offset for shared memory region: 'r'",
    ),
    (
        shm_input(**in_memory("r", 2**64 - 32, 32)),
        None,
        400,
        "Integer overflow detected: byte_size (18446744073709551584) + offset (32)",
    ),
    (shm_input(**in_memory("r", 20)), None, 400, "input byte size mismatch for input 'INPUT__0'"),
    (shm_input(**in_memory("r", 2**64)), None, 500, "'shared_memory_byte_size'"),
    (shm_input(**in_memory("r", "16")), None, 500, "'shared_memory_byte_size'"),
    (shm_input(**in_memory(7, 16)), None, 500, "'shared_memory_region'"),
    (shm_input(shared_memory_region="r"), None, 400, "'shared_memory_byte_size' must be specified"),
    (shm_input(shared_memory_byte_size=16), None, 400, "without 'shared_memory_region'"),
    (shm_input(shared_memory_offset=16), None, 400, "without 'shared_memory_region'"),
    (shm_input(**in_memory("r", 16), binary_data_size=16), None, 400, ONE),
    ({**shm_input(**in_memory("r", 16)), "data": [1, 2, 3, 4]}, None, 400, ONE),
    (shm_input(shape=(9, 4), **in_memory("r", 16)), None, 400, "Expected 144, got 16"),
    (shm_input(shape=(4, 1), **in_memory("r", 16)), None, 400, "unexpected shape for input"),
    (shm_input("z", **in_memory("r", 16)), None, 400, "unexpected inference input 'z'"),
    (None, shm_output(**in_memory("q", 16)), 404, "Unable to find shared memory region: 'q'"),
    (None, shm_output(**in_memory("r", 16, 64)), 400, "Invalid offset for shared memory region"),
    (None, shm_output(**in_memory("r", 64, 60)), 400, "Invalid offset + byte size for shared"),
    (None, shm_output(**in_memory("r", 11)), 500, "for output 'OUTPUT__0' (11 bytes) should be at"),
    (None, shm_output(**in_memory("s", 4)), 500, "should be at least 12 bytes to hold the results"),
    (None, shm_output(**in_memory("r", 12), binary_data=True), 400, f"{OUT} 'binary_data'"),
    (None, shm_output(**in_memory("r", 12), classification=1), 400, f"{OUT} 'classification'"),
    (None, shm_output("z", **in_memory("r", 12)), 400, "unexpected inference output 'z'"),
    (None, shm_output(shared_memory_byte_size=12), 400, "without 'shared_memory_region'"),
]


def test_bad_requests_are_the_same_on_both_roads():
    """Each gets its status and text, tells of no other region, and writes nothing."""

    async def use(server, file):
        before = file.read_bytes()
        for entry, output, status, text in BAD:
            document = {
                "inputs": [entry or json_input("INPUT__0", "FP32", [1, 4], X.tolist())],
                "outputs": [output] if output else [],
            }
            got, _, body = await both(server, request(json.dumps(document).encode()))
            error = json.loads(body)["error"]
            assert (got, text in error) == (status, True), (entry, output, error)
            for name in "rs":
                assert f"'{name}'" not in error or f'"{name}"' in json.dumps(document)
            assert file.read_bytes() == before
        document = {"inputs": [shm_input(**in_memory("r", 16))]}
        assert (await good(server, document))["outputs"][0]["shape"] == [1, 3]
        server.inference.memory.unregister("system", "")
        assert len(server.inference.memory) == 0  # none of those requests uses one any more

    with_memory(use)


async def running(server, road, document):
    """A client whose request to `linear` runs, until the model is no longer held."""
    model = server.models["linear"]
    model.held, model.groups[:] = asyncio.Event(), []
    client = await server.connect(road)
    client.send(request(json.dumps(document).encode()))
    while not model.groups:
        await asyncio.sleep(0.001)
    return client


def test_an_object_that_is_cut_short_while_its_request_runs():
    async def use(server, file):
        model = server.models["linear"]
        document = {
            "inputs": [shm_input(**in_memory("r", 16))],
            "outputs": [shm_output(**in_memory("r", 12, 32))],
        }
        for road in ("lane", "ordinary"):
            os.truncate(file, 64)
            file.write_bytes(X.tobytes() + bytes(48))
            model.ran.clear()
            client = await running(server, road, document)
            os.truncate(file, 0)
            model.held.set()
            head, body = await client.reply()
            assert head.startswith(b"HTTP/1.1 400")
            assert b"Invalid offset + byte size for shared memory region: 'r'" in body
            # What ran had the input as it was.
            assert model.ran[0][0].tobytes() == X.tobytes()
            model.held = None
            status, _, body = await both(server, request(json.dumps(document).encode()))
            assert status == 400 and b"Invalid offset + byte size" in body
            assert file.stat().st_size == 0

    with_memory(use)


def test_a_region_in_use_goes_when_its_request_is_over():
    async def use(server, file):
        model, memory = server.models["linear"], server.inference.memory
        document = {"inputs": [shm_input(**in_memory("r", 16))]}
        for road in ("lane", "ordinary"):
            client = await running(server, road, document)
            memory.unregister("system", "r")
            assert memory.status("system", "r")
            model.held.set()
            head, _ = await client.reply()
            assert head.startswith(b"HTTP/1.1 200")
            with pytest.raises(MantaError, match="Unable to find system"):
                memory.status("system", "r")
            memory.register("r", file.name, 0, 64)
            model.held = None

    with_memory(use)


def test_a_client_that_leaves_frees_its_regions():
    async def use(server, file):
        model, memory = server.models["linear"], server.inference.memory
        document = {"inputs": [shm_input(**in_memory("r", 16))]}
        for road in ("lane", "ordinary"):
            client = await running(server, road, document)
            memory.unregister("system", "r")
            client.leave()
            while any(each["name"] == "r" for each in memory.status("system", "")):
                await asyncio.sleep(0.001)
            model.held.set()
            memory.register("r", file.name, 0, 64)
            await asyncio.sleep(0.01)
        model.held = None
        assert (await good(server, document))["outputs"]

    with_memory(use)


def test_requests_that_use_no_memory_are_planned_all_the_same():
    async def use(server, file):
        document = {
            "inputs": [shm_input(binary_data_size=16)],
            "parameters": {"binary_data_output": True},
        }
        client = await server.connect()
        for _ in range(3):
            head, _ = await client.ask(binary(document, X.tobytes()))
            assert head.startswith(b"HTTP/1.1 200")
        assert len(server.directory.find("linear", "").http_plans)

    with_memory(use)


# --- classes ----------------------------------------


def classes(name="OUTPUT__0", count=2, **parameters):
    return {"name": name, "parameters": {"classification": count, **parameters}}


def labelled(server):
    server.versions = [
        replace(each, labels={"OUTPUT__0": LABELS}) if each.model_name == "linear" else each
        for each in server.versions
    ]
    server.publish()


def best(row, count, labels=()):
    order = sorted(range(len(row)), key=lambda index: -row[index])[:count]
    return [f"{row[i]:.6f}:{i}" + (f":{labels[i]}" if i < len(labels) else "") for i in order]


def test_classes_are_the_same_on_both_roads():
    async def use(server):
        labelled(server)
        document = {
            "inputs": [json_input("INPUT__0", "FP32", [1, 4], X.tolist())],
            "outputs": [classes()],
        }
        (output,) = (await good(server, document))["outputs"]
        assert output == {
            "name": "OUTPUT__0",
            "datatype": "BYTES",
            "shape": [1, 2],
            "data": best(Y[0].tolist(), 2, LABELS),
        }
        document["outputs"] = [classes(count=2**63, binary_data=True)]
        _, head, body = await both(server, request(json.dumps(document).encode()))
        expected = encode_bytes(text.encode() for text in best(Y[0].tolist(), 3, LABELS)).tobytes()
        assert body.endswith(expected)
        for coding, unpacked in (("gzip", gzip.decompress), ("deflate", zlib.decompress)):
            data = request(json.dumps(document).encode(), accept_encoding=coding)
            _, head, body = await both(server, data)
            assert f"content-encoding: {coding}".encode() in head
            assert unpacked(body).endswith(expected)

    run(use)


def test_classes_beside_tensors_and_of_integers():
    async def use(server):
        document = {
            "inputs": [
                json_input("INPUT0", "INT32", [1, 4], [1, 7, 7, -1]),
                json_input("INPUT1", "INT32", [1, 4], [0, 0, 0, 0]),
            ],
            "outputs": [classes("OUTPUT0", 3), {"name": "OUTPUT1"}],
        }
        first, second = (await good(server, document, ADD_SUB))["outputs"]
        assert (first["shape"], first["data"]) == ([1, 3], ["7:1", "7:2", "1:0"])
        assert (second["datatype"], second["data"]) == ("INT32", [1, 7, 7, -1])

    run(use)


NOT_CLASSES = "class result not available for output due to unsupported type"


def test_what_cannot_be_classified_is_told_the_same_on_both_roads():
    async def use(server):
        strings = json_input("X", "BYTES", [1], ["a"])
        many = 1_000_001
        entry = {**shm_input("X", shape=(1, many)), "parameters": {"binary_data_size": 4 * many}}
        large = binary(
            {"inputs": [entry], "outputs": [classes("Y", 1)]},
            bytes(4 * many),
            path="/v2/models/echo_FP32/infer",
        )
        for data, text in (
            (
                request(
                    json.dumps({"inputs": [strings], "outputs": [classes("Y")]}).encode(),
                    "/v2/models/strings/infer",
                ),
                f"{NOT_CLASSES} 'BYTES'",
            ),
            (
                binary(
                    {
                        "inputs": [shm_input("X", "FP16", (1, 2), binary_data_size=4)],
                        "outputs": [classes("Y")],
                    },
                    bytes(4),
                    path="/v2/models/echo_FP16/infer",
                ),
                f"{NOT_CLASSES} 'FP16'",
            ),
            (large, "classification output tensor too large"),
        ):
            status, _, body = await both(server, data)
            assert (status, text in json.loads(body)["error"]) == (400, True), body

    run(use)


def test_a_client_that_leaves_withdraws_its_request():
    async def use(server):
        model = server.models["linear"]
        model.held = asyncio.Event()
        document = {
            "inputs": [json_input("INPUT__0", "FP32", [1, 4], X.tolist())],
            "outputs": [classes()],
        }
        first, second = await server.connect(), await server.connect()
        first.send(request(json.dumps(document).encode()))
        while not model.groups:
            await asyncio.sleep(0.001)
        second.send(request(json.dumps(document).encode()))
        gate = server.gates["linear"]
        while not gate.pending:
            await asyncio.sleep(0.001)
        second.leave()
        while gate.pending:
            await asyncio.sleep(0.001)
        model.held.set()
        head, _ = await first.reply()
        assert head.startswith(b"HTTP/1.1 200")
        assert len(model.ran) == 1

    run(use)
