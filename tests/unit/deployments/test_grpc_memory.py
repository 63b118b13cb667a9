"""Shared memory and classes over gRPC, by the lane and by grpc.aio: clients must not see which."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import grpc
import numpy as np
import pytest

from deployments.grpc_stubs import service_pb2 as pb
from deployments.tensors import decode_bytes, encode_bytes

from .grpc_lanes import needs_haproxy, run
from .memories import objects
from .serving import Server, linear
from .test_grpc import OUTPUT, RAW, X, entry, over_grpc, parameter, request, typed

Y = linear(X)[0]


@pytest.fixture
def memory():
    with objects() as make:
        yield make


def refused(call):
    async def ask():
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        return caught.value.code().name, caught.value.details()

    return ask()


# --- regions ----------------------------------------


def test_the_stock_client_registers_and_unregisters(memory):
    file = memory(bytes(64))

    async def use(server, triton, stub):
        await triton.register_system_shared_memory("a", f"/{file.name}", 56, offset=8)
        await triton.register_system_shared_memory("b", file.name, 64)
        status = await triton.get_system_shared_memory_status()
        found = {
            name: (one.name, one.key, one.offset, one.byte_size)
            for name, one in status.regions.items()
        }
        assert found == {"a": ("a", f"/{file.name}", 8, 56), "b": ("b", file.name, 0, 64)}
        assert list((await triton.get_system_shared_memory_status("b")).regions) == ["b"]
        assert not (await triton.get_cuda_shared_memory_status()).regions
        await triton.unregister_cuda_shared_memory()
        await triton.unregister_cuda_shared_memory("a")
        await triton.unregister_system_shared_memory("nobody")
        await triton.unregister_system_shared_memory("a")
        assert list((await triton.get_system_shared_memory_status()).regions) == ["b"]
        await triton.unregister_system_shared_memory()
        assert not (await triton.get_system_shared_memory_status()).regions

    over_grpc(use, Server(allow_client_shm=True))


def test_refusals(memory):
    file = memory(bytes(64))
    register = pb.SystemSharedMemoryRegisterRequest

    async def use(server, triton, stub):
        server.inference.memory.register("r", file.name, 0, 64)
        for call, code, text in (
            (
                stub.SystemSharedMemoryRegister(register(name="r", key=file.name, byte_size=64)),
                "ALREADY_EXISTS",
                "shared memory region 'r' already in manager",
            ),
            (
                stub.SystemSharedMemoryRegister(
                    register(name="q", key=file.name, offset=2**64 - 1, byte_size=64)
                ),
                "INVALID_ARGUMENT",
                "failed to register shared memory region 'q': invalid args",
            ),
            (
                stub.SystemSharedMemoryRegister(register(key=file.name, byte_size=64)),
                "INVALID_ARGUMENT",
                "'region name' is necessary",
            ),
            (
                stub.SystemSharedMemoryRegister(register(name="q", key="a/b", byte_size=64)),
                "INVALID_ARGUMENT",
                "is not the name of a shared memory object",
            ),
            (
                stub.SystemSharedMemoryStatus(pb.SystemSharedMemoryStatusRequest(name="q")),
                "NOT_FOUND",
                "Unable to find system shared memory region: 'q'",
            ),
            (
                stub.CudaSharedMemoryStatus(pb.CudaSharedMemoryStatusRequest(name="r")),
                "NOT_FOUND",
                "is registered as system shared memory, not CUDA shared memory",
            ),
            (
                stub.CudaSharedMemoryRegister(pb.CudaSharedMemoryRegisterRequest(name="q")),
                "INVALID_ARGUMENT",
                "failed to register CUDA shared memory region: 'q', GPUs not supported",
            ),
        ):
            found, details = await refused(call)
            assert (found, text in details) == (code, True), details

    over_grpc(use, Server(allow_client_shm=True))


def test_all_is_off_by_default():
    async def use(server, triton, stub):
        for kind in ("System", "Cuda"):
            for verb in ("Status", "Register", "Unregister"):
                name = f"{kind}SharedMemory{verb}"
                message = getattr(pb, f"{name}Request")(name="r")
                code, details = await refused(getattr(stub, name)(message))
                assert code == "UNIMPLEMENTED"
                assert details.startswith("Client shared memory is disabled. Start the server")

    over_grpc(use)


# --- tensors in memory ----------------------------------------


def number(value):
    return parameter(int64_param=value)


def in_memory(region, size, offset=None):
    given = {
        "shared_memory_region": parameter(string_param=region),
        "shared_memory_byte_size": number(size),
    }
    return given if offset is None else {**given, "shared_memory_offset": number(offset)}


def output(name="OUTPUT__0", **parameters):
    return OUTPUT(name=name, parameters=parameters)


def with_memory(use, size=64):
    """`await use(server, file)` over both roads; region `r` of that many bytes, `s` of 4."""
    with objects() as make:
        file = make(RAW + bytes(size - len(RAW)))

        async def main(server):
            server.inference.memory.register("r", file.name, 0, size)
            server.inference.memory.register("s", file.name, 8, 4)
            await use(server, file)

        run(main, allow_client_shm=True)


async def good(server, message):
    code, details, answer, _ = await server.same(message.SerializeToString(), times=2)
    assert code == "OK", details
    return pb.ModelInferResponse.FromString(answer)


@needs_haproxy
def test_in_and_out_of_memory():
    async def use(server, file):
        message = request(
            entry(parameters=in_memory("r", 16)), outputs=[output(**in_memory("r", 12, 32))], id="7"
        )
        reply = await good(server, message)
        assert (reply.id, list(reply.raw_output_contents)) == ("7", [b""])
        assert (reply.outputs[0].datatype, list(reply.outputs[0].shape)) == ("FP32", [1, 3])
        assert file.read_bytes() == RAW + bytes(16) + Y.tobytes() + bytes(20)
        reply = await good(server, request(entry(parameters=in_memory("r", 16))))
        assert list(reply.raw_output_contents) == [Y.tobytes()]

    with_memory(use)


@needs_haproxy
def test_memory_beside_other_inputs():
    four = np.arange(4, dtype=np.int32)
    ten = (10 * four).tobytes()

    async def use(server, file):
        file.write_bytes(four.tobytes() + bytes(48))
        shared = entry("INPUT1", "INT32", parameters=in_memory("r", 16))
        contents = typed(int_contents=(10 * four).tolist())
        for message in (
            request(shared, entry("INPUT0", "INT32"), raw=[ten], model="add_sub"),
            request(entry("INPUT0", "INT32"), shared, raw=[ten], model="add_sub"),
            request(shared, entry("INPUT0", "INT32", contents=contents), model="add_sub"),
        ):
            first, second = (await good(server, message)).raw_output_contents
            assert first == (11 * four).tobytes() and second == (9 * four).tobytes()
            message.outputs.extend([output("OUTPUT1"), output("OUTPUT0", **in_memory("r", 16, 32))])
            first, second = (await good(server, message)).raw_output_contents
            assert first == b"" and second == (9 * four).tobytes()
            assert file.read_bytes()[32:48] == (11 * four).tobytes()

    with_memory(use)


@needs_haproxy
def test_strings_and_large_tensors_in_memory():
    words = encode_bytes([b"a\0b", b""]).tobytes()
    count = 400_000
    values = np.random.default_rng(0).random(count, np.float32).tobytes()

    async def use(server, file):
        file.write_bytes(words + bytes(8 * count - len(words)))
        message = request(
            entry("X", "BYTES", (2,), parameters=in_memory("r", len(words))),
            model="strings",
            outputs=[output("Y", **in_memory("r", 24, 32))],
        )
        assert list((await good(server, message)).outputs[0].shape) == [2]
        assert file.read_bytes()[32 : 32 + len(words)] == words
        file.write_bytes(values + bytes(4 * count))
        message = request(
            entry("X", shape=(1, count), parameters=in_memory("r", 4 * count)),
            model="echo_FP32",
            outputs=[output("Y", **in_memory("r", 4 * count, 4 * count))],
        )
        await good(server, message)
        assert file.read_bytes()[4 * count :] == values

    with_memory(use, 8 * count)


def bad_input(parameters, **more):
    return request(entry(parameters=parameters, **more))


def bad_output(**parameters):
    return request(entry(), raw=[RAW], outputs=[output(**parameters)])


REGION = {"shared_memory_region": parameter(string_param="r")}
BAD = [
    (bad_input(in_memory("q", 16)), "NOT_FOUND", "Unable to find shared memory region: 'q'"),
    (bad_input(in_memory("s", 16)), "INVALID_ARGUMENT", "Invalid offset + byte size for shared"),
    (bad_input(in_memory("r", 16, 64)), "INVALID_ARGUMENT", "Invalid offset for shared memory"),
    (bad_input(in_memory("r", 16, -16)), "INVALID_ARGUMENT", "Invalid offset for shared memory"),
    (bad_input(in_memory("r", -16)), "INVALID_ARGUMENT", "Invalid offset + byte size for shared"),
    (bad_input(in_memory("r", 20)), "INVALID_ARGUMENT", "Expected 16, got 20"),
    (bad_input(REGION), "INVALID_ARGUMENT", "'shared_memory_byte_size' must be specified along"),
    (
        bad_input({"shared_memory_offset": number(1)}),
        "INVALID_ARGUMENT",
        "'shared_memory_offset' can not be specified without 'shared_memory_region' parameter for "
        "tensor 'INPUT__0'",
    ),
    (
        bad_input({**REGION, "shared_memory_byte_size": parameter(string_param="16")}),
        "INVALID_ARGUMENT",
        "invalid value type for 'shared_memory_byte_size' parameter for tensor 'INPUT__0', "
        "expected int64_param.",
    ),
    (
        bad_input({**in_memory("r", 16), "shared_memory_region": number(1)}),
        "INVALID_ARGUMENT",
        "expected string_param.",
    ),
    (
        bad_input(in_memory("r", 16), contents=typed(fp32_contents=[1, 2, 3, 4])),
        "INVALID_ARGUMENT",
        "contents field must not be specified when using shared memory for 'INPUT__0'",
    ),
    (
        request(entry(parameters=in_memory("r", 16)), raw=[RAW]),
        "INVALID_ARGUMENT",
        "expected 0 entries in raw_input_contents, got 1",
    ),
    (bad_output(**in_memory("q", 12)), "NOT_FOUND", "Unable to find shared memory region: 'q'"),
    (bad_output(**in_memory("r", 64, 60)), "INVALID_ARGUMENT", "Invalid offset + byte size for"),
    (bad_output(**in_memory("r", 11)), "INTERNAL", "(11 bytes) should be at least 12 bytes to"),
    (
        bad_output(**in_memory("r", 12), classification=number(1)),
        "INVALID_ARGUMENT",
        "Output can't set both 'shared_memory_region' and 'classification'",
    ),
    (bad_output(classification=number(0)), "INVALID_ARGUMENT", "invalid value for 'class"),
    (bad_output(classification=number(-1)), "INVALID_ARGUMENT", "invalid value for 'class"),
    (
        bad_output(classification=parameter(double_param=1)),
        "INVALID_ARGUMENT",
        "invalid value type for 'classification' parameter, expected int64_param",
    ),
]


@needs_haproxy
def test_bad_requests_are_the_same_on_both_roads():
    async def use(server, file):
        before = file.read_bytes()
        for message, code, text in BAD:
            found, details, _, _ = await server.same(message.SerializeToString(), times=2)
            assert (found, text in details) == (code, True), details
            assert file.read_bytes() == before
        assert (await good(server, request(entry(parameters=in_memory("r", 16))))).outputs
        server.inference.memory.unregister("system", "")
        assert len(server.inference.memory) == 0

    with_memory(use)


@needs_haproxy
def test_calls_that_end_early_free_their_regions():
    """Cancelled, and too late."""

    async def use(server, file):
        model, memory = server.models["linear"], server.inference.memory
        message = request(entry(parameters=in_memory("r", 16))).SerializeToString()
        for road in ("lane", "ordinary"):
            for limit_s in (None, 0.2):
                model.held, model.groups[:] = asyncio.Event(), []
                calling = asyncio.ensure_future(server.call(road, message, timeout=limit_s))
                while not model.groups:
                    await asyncio.sleep(0.001)
                memory.unregister("system", "r")
                assert memory.status("system", "r")
                if limit_s is None:
                    calling.cancel()
                else:
                    assert (await calling)[0] == "DEADLINE_EXCEEDED"
                while any(each["name"] == "r" for each in memory.status("system", "")):
                    await asyncio.sleep(0.001)
                memory.register("r", file.name, 0, 64)
                model.held.set()
                await asyncio.sleep(0.02)
        model.held = None
        assert (await good(server, request(entry(parameters=in_memory("r", 16))))).outputs

    with_memory(use)


# --- classes ----------------------------------------


@needs_haproxy
def test_classes_are_the_same_on_both_roads():
    async def use(server):
        server.versions = [
            replace(each, labels={"OUTPUT__0": ("a", "b", "c")}) for each in server.versions
        ]
        server.publish()
        message = request(entry(), raw=[RAW], outputs=[output(classification=number(2))], id="7")
        reply = await good(server, message)
        assert (reply.outputs[0].datatype, list(reply.outputs[0].shape)) == ("BYTES", [1, 2])
        order = np.argsort(-Y[0])[:2]
        raw = np.frombuffer(reply.raw_output_contents[0], np.uint8)
        assert decode_bytes("OUTPUT__0", raw) == [
            f"{Y[0][i]:.6f}:{i}:{'abc'[i]}".encode() for i in order
        ]
        message = request(
            entry("X", "FP16", (1, 2)),
            raw=[bytes(4)],
            model="echo_FP16",
            outputs=[output("Y", classification=number(2))],
        )
        code, details, _, _ = await server.same(message.SerializeToString())
        assert code == "INVALID_ARGUMENT"
        assert "class result not available for output due to unsupported type 'FP16'" in details

    run(use)
