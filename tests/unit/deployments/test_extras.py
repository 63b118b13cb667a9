from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from configs.server import ServerSettings
from deployments import extras
from deployments.errors import Internal, InvalidArgument
from deployments.regions import Regions
from deployments.tensors import decode_bytes, encode_bytes
from deployments.types import InferRequest, LentInput, MemoryRange, RequestedOutput, Tensor

from .memories import objects

SETTINGS = ServerSettings(model_repository=("m",), max_body_bytes=1 << 26, allow_client_shm=True)
SMALL = 64
LARGE = 1 << 20


@pytest.fixture(params=[SMALL, LARGE])
def region(request):
    """Regions with `r`, of that many bytes, 8 bytes into its object; and the object's file."""
    size = request.param
    with objects() as make:
        made = Regions()
        file = make(np.random.default_rng(0).bytes(size + 8))
        made.register("r", file.name, 8, size)
        yield made, file, size


def tensor(name, array):
    return Tensor(name, "FP32", array.shape, array)


def lent(position, name, shape, size, offset=0, datatype="FP32"):
    return LentInput(position, name, datatype, shape, MemoryRange("r", size, offset))


def fetch(regions, *lent_inputs, inputs=(), settings=SETTINGS):
    request = InferRequest("m", "", "", inputs, lent=lent_inputs)

    async def one():
        with regions.held(extras.ranges(request)) as held:
            extras.copied_bytes(request, settings)
            return await extras.fetch(request, held, settings.max_tensor_rank)

    return asyncio.run(one())


def finish(regions, outputs, *tensors, labels=None, batched=True):
    request = InferRequest("m", "", "", (), outputs)

    async def one():
        with regions.held(extras.ranges(request)) as held:
            return await extras.finish(request, tensors, labels or {}, batched, held)

    return asyncio.run(one())


# --- inputs ----------------------------------------


def test_inputs_come_from_memory_in_the_order_of_the_request(region):
    regions, file, size = region
    x = np.ones((1, 4), np.float32)
    request = fetch(
        regions,
        lent(0, "a", (1, size // 4), size),
        lent(2, "c", (2,), 8, 16),
        inputs=(tensor("b", x), tensor("d", x)),
    )
    assert [each.name for each in request.inputs] == ["a", "b", "c", "d"]
    assert (request.lent, request.extra) == ((), False)
    assert request.inputs[0].data.tobytes() == file.read_bytes()[8:]
    assert request.inputs[2].data.tobytes() == file.read_bytes()[24:32]


def test_inputs_are_copies(region):
    regions, file, size = region
    request = fetch(regions, lent(0, "a", (size // 4,), size))
    before = request.inputs[0].data.copy()
    file.write_bytes(bytes(size + 8))
    np.testing.assert_array_equal(request.inputs[0].data, before)


def test_strings_in_memory():
    words = encode_bytes([b"a\0", b"", b"xyz"]).tobytes()
    with objects() as make:
        regions = Regions()
        regions.register("r", make(words + bytes(9)).name, 0, len(words) + 9)
        given = lent(0, "w", (3,), len(words), datatype="BYTES")
        (words_of,) = fetch(regions, given).inputs
    assert decode_bytes("w", words_of.data) == [b"a\0", b"", b"xyz"]


def test_an_input_without_bytes(region):
    regions, *_ = region
    (one,) = fetch(regions, lent(0, "a", (0, 4), 0)).inputs
    assert one.data.shape == (0, 4)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            lent(0, "a", (1, 4), 12),
            "input byte size mismatch for input 'a' for model 'm'. Expected 16, got 12",
        ),
        (lent(0, "a", (1, 4), 20), "Expected 16, got 20"),
        (lent(0, "a", (-1, 4), 16), "negative dimension"),
        (lent(0, "a", (2**62, 4), 16), "exceed maximum size"),
        (lent(0, "a", (1,) * 70, 4), "70 dimensions"),
        (lent(0, "a", (4,), 16, datatype="FP8"), "invalid datatype 'FP8'"),
    ],
)
def test_inputs_that_do_not_fit_their_memory(region, given, text):
    regions, *_ = region
    with pytest.raises(InvalidArgument) as caught:
        fetch(regions, given)
    assert text in str(caught.value)


def test_small_requests_cannot_ask_for_endless_copies(region):
    regions, _, size = region
    settings = SETTINGS.model_copy(update={"max_body_bytes": 3 * size})
    inputs = [lent(i, f"x{i}", (size // 4,), size) for i in range(4)]
    assert len(fetch(regions, *inputs[:3], settings=settings).inputs) == 3
    with pytest.raises(InvalidArgument, match=f"inputs of {4 * size} bytes in shared memory"):
        fetch(regions, *inputs, settings=settings)


# --- outputs ----------------------------------------


def placed(name, size, offset=0):
    return RequestedOutput(name, False, 0, MemoryRange("r", size, offset))


def test_outputs_go_into_memory(region):
    regions, file, size = region
    before = file.read_bytes()
    x = np.arange(size // 8, dtype=np.float32).reshape(1, -1)
    y = np.arange(4, dtype=np.float32).reshape(2, 2).T  # strided
    outputs = (placed("x", size // 2), RequestedOutput("z"), placed("y", 24, size // 2))
    first, second, third = finish(regions, outputs, tensor("x", x), tensor("y", y), tensor("z", x))
    assert file.read_bytes() == b"".join(
        (before[:8], x.tobytes(), y.tobytes(), before[8 + size // 2 + 16 :])
    )
    assert [each.placed for each in (first, second, third)] == [True, True, False]
    assert (first.shape, first.datatype, first.data.nbytes) == (x.shape, "FP32", 0)
    assert third.data is x


def test_strings_go_into_memory(region):
    regions, file, _ = region
    words = encode_bytes([b"ab", b""])
    finish(regions, (placed("w", 32),), Tensor("w", "BYTES", (2,), words))
    assert file.read_bytes()[8 : 8 + words.nbytes] == words.tobytes()


def test_nothing_is_written_unless_all_fits(region):
    regions, file, _ = region
    before = file.read_bytes()
    x = np.ones((1, 4), np.float32)
    with pytest.raises(Internal) as caught:
        finish(regions, (placed("x", 16), placed("y", 15, 32)), tensor("x", x), tensor("y", x))
    assert str(caught.value) == (
        "shared memory size specified with the request for output 'y' (15 bytes) should be at "
        "least 16 bytes to hold the results"
    )
    assert file.read_bytes() == before


def test_an_output_that_is_not_asked_for_by_name(region):
    regions, *_ = region
    x = tensor("x", np.ones((1, 4), np.float32))
    assert finish(regions, (), x) == (x,)


def test_classes_beside_tensors(region):
    regions, *_ = region
    x = tensor("x", np.array([[1, 3, 2]], np.float32))
    y = tensor("y", np.array([[4, 5]], np.float32))
    outputs = (RequestedOutput("y"), RequestedOutput("x", classification=2))
    first, second = finish(regions, outputs, x, y, labels={"x": ("a", "b", "c")})
    assert decode_bytes("x", first.data) == [b"3.000000:1:b", b"2.000000:2:c"]
    assert second is y


def test_classes_without_a_batch(region):
    regions, *_ = region
    x = tensor("x", np.array([1, 3], np.float32))
    (first,) = finish(regions, (RequestedOutput("x", classification=9),), x, batched=False)
    assert (first.shape, decode_bytes("x", first.data)) == ((2,), [b"3.000000:1", b"1.000000:0"])


# --- where it is done ----------------------------------------


def test_only_what_is_large_is_done_on_a_thread():
    async def main():
        here = threading.get_ident()
        assert await extras._done(extras.INLINE_BYTES, threading.get_ident) == here
        assert await extras._done(extras.INLINE_BYTES + 1, threading.get_ident) != here

    asyncio.run(main())


def test_a_large_table_is_classified_while_the_loop_goes_on():
    async def main():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0)
                ticks += 1

        ticking = asyncio.ensure_future(tick())
        x = tensor("x", np.random.default_rng(0).random((4, 500_000), np.float32))
        request = InferRequest("m", "", "", (), (RequestedOutput("x", classification=3),))
        await extras.finish(request, (x,), {}, True, {})
        ticking.cancel()
        return ticks

    assert asyncio.run(main()) > 1


def test_a_cancelled_copy_is_waited_for():
    """The memory is the client's again only when nobody writes there any more."""

    async def main():
        started, go, ended = threading.Event(), threading.Event(), []

        def work():
            started.set()
            go.wait(10)
            ended.append(True)

        task = asyncio.ensure_future(extras._done(LARGE, work))
        while not started.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.sleep(0.01)
        assert not task.done()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended

    asyncio.run(main())
