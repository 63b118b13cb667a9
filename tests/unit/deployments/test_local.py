"""A Router's end and an instance's end of the local channel, with real models between them."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import socket
import sys
from unittest import mock

import numpy as np
import pytest
import torch
import uvloop

from deployments import local
from deployments.channel import ChannelError
from deployments.errors import Internal, InvalidArgument, QueueTimeout, ReplicaLost
from deployments.stream import Stream
from deployments.types import Batch, BatchReply, ChannelAddress
from tests import models
from tests.models import config, string_input, string_output

from .channels import ONE, batch_of, drive, place, rows, until, whole

EIGHT = config({"INPUT__0": (8,)}, {"y": (4,)}, max_batch_size=64)


def only(reply: BatchReply) -> np.ndarray:
    (part,) = reply.parts
    assert part.error is None
    return part.outputs["y"].data


class Add(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x


@drive
async def test_a_batch_equals_the_model_called_directly():
    module = models.mlp()
    async with place(module, EIGHT) as at:
        client = await at.connect()
        assert client.idle and client.open and client.outstanding == 0
        members = [np.random.default_rng(k).random((k + 1, 8), np.float32) for k in range(5)]
        future = client.execute(batch_of(*members))
        assert (client.outstanding, client.idle, client.ahead) == (1, False, True)
        reply = await future
        direct = module(torch.from_numpy(np.concatenate(members))).detach().numpy()
        np.testing.assert_allclose(only(reply), direct, atol=1e-5)
        (part,) = reply.parts
        assert part.members == (0, 1, 2, 3, 4) and min(part.input_ns, part.infer_ns) > 0
        await client.aclose()


def test_it_works_on_the_loop_that_serve_uses():
    async def on_uvloop() -> None:
        async with place(Add()) as at:
            client = await at.connect()
            for count, width in ((1, 16), (32, 512), (4, 400_000)):
                batch = batch_of(*rows(count, width))
                np.testing.assert_array_equal(only(await client.execute(batch)), 2 * whole(batch))
            at.door.close()
            await asyncio.to_thread(at.instance.close)
            await until(lambda: not client.open)

    uvloop.run(asyncio.wait_for(on_uvloop(), 60))


@pytest.mark.parametrize("count", [1, 2, 7, 32])
def test_answers_are_bitwise_those_of_the_ordinary_way(count):
    @drive
    async def both() -> None:
        async with place(models.mlp((8, 256, 4)), EIGHT) as at:
            client = await at.connect()
            batch = batch_of(*rows(count, 8))
            ordinary = await asyncio.wrap_future(at.instance.submit(batch))
            local_reply = await client.execute(batch)
            assert only(local_reply).tobytes() == only(ordinary).tobytes()
            await client.aclose()

    both()


@drive
async def test_inputs_that_do_not_fit_together_run_apart():
    async with place(models.identity()) as at:
        client = await at.connect()
        one, other = rows(1, 3)[0], rows(1, 5)[0]
        reply = await client.execute(batch_of(one, other))
        assert [part.members for part in reply.parts] == [(0,), (1,)]
        np.testing.assert_array_equal(reply.parts[1].outputs["y"].data, other)
        reply = await client.execute(batch_of(one, None))
        assert reply.parts[0].error is None
        assert "is absent" in str(reply.parts[1].error)
        await client.aclose()


@drive
async def test_strings_there_and_back_and_a_bad_one_hurts_nobody():
    def encode(*elements: bytes) -> np.ndarray:
        data = b"".join(len(e).to_bytes(4, "little") + e for e in elements)
        return np.frombuffer(data, np.uint8)

    made = config([string_input("words")], [string_output("y")])
    async with place(models.Strings(), made) as at:
        client = await at.connect()
        members = (encode(b"a", b"b"), encode(b"\xff"), encode(b"c"))
        reply = await client.execute(Batch((2, 1, 1), (members,), ("y",)))
        good, bad = reply.parts
        assert good.outputs["y"].data.tobytes() == encode(b"a!", b"b!", b"c!").tobytes()
        assert good.outputs["y"].offsets is not None
        assert (bad.members, type(bad.error)) == ((1,), InvalidArgument)
        await client.aclose()


@drive
async def test_only_the_culprit_fails():
    async with place(models.RefusesNegative()) as at:
        client = await at.connect()
        members = rows(8)
        members[2] = -members[2]
        reply = await client.execute(batch_of(*members))
        errors = {part.members: part.error for part in reply.parts}
        assert [k for k, error in errors.items() if error is not None] == [(2,)]
        for part in reply.parts:
            if part.error is None:
                (k,) = part.members
                np.testing.assert_array_equal(part.outputs["y"].data, members[k] * 2)
        assert client.idle and at.instance.slots.held == 0
        await client.aclose()


SPOILS = """
import torch
class Net(torch.nn.Module):
    def forward(self, x):
        x.mul_(10)
        if x.shape[0] > {0}:
            raise {1}("CUDA out of memory")
        return x
"""


@pytest.mark.parametrize(
    ("limit", "error", "members"),
    [
        (1, "ValueError", [(0,), (1,), (2,), (3,)]),
        (2, "torch.OutOfMemoryError", [(0, 1), (2, 3)]),
    ],
)
def test_a_run_that_spoiled_its_inputs_is_made_up_for(limit, error, members):
    """The model changes what it is given, and then fails: what runs again must be the original."""

    @drive
    async def again() -> None:
        async with place(SPOILS.format(limit, error)) as at:
            client = await at.connect()
            inputs = rows(4)
            reply = await client.execute(batch_of(*inputs))
            assert [part.members for part in reply.parts] == members
            for part in reply.parts:
                wanted = np.concatenate([inputs[k] for k in part.members]) * np.float32(10)
                np.testing.assert_array_equal(part.outputs["y"].data, wanted)
            assert at.instance.slots.peak_held == 1
            await client.aclose()

    again()


@drive
async def test_an_answer_does_not_change_with_the_next_run():
    """Models that hand out their own memory, or that of their input."""
    source = (
        "import torch\nclass Net(torch.nn.Module):\n    kept = []\n    def forward(self, x):\n"
        "        self.kept.append(x)\n        return torch.from_numpy(x.numpy()[:, ::1])"
    )
    for module in (models.identity(), source):
        async with place(module) as at:
            client = await at.connect()
            batches = [batch_of(*rows(4, seed=seed)) for seed in range(30)]
            replies = [only(await client.execute(batch)) for batch in batches]
            for batch, reply in zip(batches, replies, strict=True):
                np.testing.assert_array_equal(reply, whole(batch))
            await client.aclose()


# --- limits ---------------------------------------------------------------------------------------


@drive
async def test_an_instance_refuses_a_third_batch():
    async with place(models.identity()) as at:
        client = await at.connect()
        for _ in range(2):
            at.instance.slots.admit()
        reply = await client.execute(batch_of(*rows(2)))
        assert reply.refused and reply.parts == ()
        for _ in range(2):
            at.instance.slots.done()
        assert not (await client.execute(batch_of(*rows(2)))).refused
        await client.aclose()


async def load(at, count: int, seconds: float, obey: bool = True) -> list[int]:
    """Several Routers with as much work as they may send; how many batches each got done."""
    done = [0] * count
    batch = batch_of(*rows(4))
    ends = asyncio.get_running_loop().time() + seconds

    def over() -> bool:
        """Not before there is something to compare."""
        return asyncio.get_running_loop().time() >= ends and sum(done) >= 50 * count

    clients: list[local.LocalClient] = []

    def pump(k: int) -> None:
        client = clients[k]
        while not over() and client.open:
            if obey and not (client.idle or client.ahead):
                client.want()
                return
            if client.outstanding > 5:
                return
            client.execute(batch).add_done_callback(lambda future: answered(k, future))
        client.spare()

    def answered(k: int, future: asyncio.Future[BatchReply]) -> None:
        if not future.result().refused:
            np.testing.assert_array_equal(only(future.result())[:1], batch.inputs[0][0])
            done[k] += 1
        pump(k)

    for k in range(count):
        client = await at.connect(lambda k=k: pump(k) if k < len(clients) else None)
        clients.append(client)
    for k in range(count):
        pump(k)
    await until(over)
    await until(lambda: all(client.outstanding == 0 for client in clients))
    for client in clients:
        await client.aclose()
    return done


@pytest.mark.parametrize("count", [2, 4])
def test_several_routers_share_fairly_and_never_overfill(count):
    @drive
    async def share() -> None:
        async with place(models.identity()) as at:
            done = await load(at, count, 0.5)
            assert at.instance.slots.peak_held <= 2
            assert at.instance.slots.held == 0
            assert min(done) > 0.5 * max(done) > 0, done

    share()


@drive
async def test_control_routers_that_ignore_their_limits_are_refused_and_those_of_serve_overfill():
    async with place(models.identity()) as at:
        await load(at, 2, 0.2, obey=False)
        assert at.instance.slots.peak_held <= 2  # the instance keeps it, whoever sends
        futures = [at.instance.submit(batch_of(*rows(1))) for _ in range(20)]
        for future in futures:
            await asyncio.wrap_future(future)
        assert at.instance.slots.peak_held > 2


@drive
async def test_batches_through_serve_take_their_turn_beside_routers():
    async with place(models.identity()) as at:
        sharing = asyncio.create_task(load(at, 2, 0.5))
        await asyncio.sleep(0.05)
        through = 0
        while not sharing.done():
            future = at.instance.offer(batch_of(*rows(1))) or at.instance.queue(batch_of(*rows(1)))
            await asyncio.wrap_future(future)
            through += 1
        assert through > 10 and min(await sharing) > 10
        assert at.instance.slots.peak_held <= 2


@drive
async def test_a_draining_instance_asks_for_no_more_and_answers_what_it_has():
    async with place(models.identity()) as at:
        client = await at.connect()
        first = client.execute(batch_of(*rows(2)))
        at.instance.drain()
        assert only(await first).shape == (2, 16)
        await until(lambda: not client.idle)
        client.want()
        last = client.execute(batch_of(*rows(3)))  # it was on its way
        assert only(await last).shape == (3, 16)
        assert client.open
        await client.aclose()


# --- the end of a connection ----------------------------------------------------------------------

WAITS = (
    "import threading\nimport torch\nGO_ON = threading.Event()\nENTERED = threading.Event()\n"
    "class Net(torch.nn.Module):\n    def forward(self, x):\n"
    "        ENTERED.set()\n        assert GO_ON.wait(10)\n        return x"
)


def events(at):
    """Of the model WAITS."""
    return sys.modules[type(at.instance._runtime.module).__module__]


@drive
async def test_a_lost_connection_fails_what_was_under_way_and_nothing_else():
    async with place(WAITS) as at:
        news: list[bool] = []
        lost = await at.connect(lambda: news.append(True))
        other = await at.connect()
        doomed = [lost.execute(batch_of(*rows(1))), lost.execute(batch_of(*rows(1)))]
        await asyncio.to_thread(events(at).ENTERED.wait, 10)
        lost._stream._sock.shutdown(socket.SHUT_RDWR)
        for future in doomed:
            with pytest.raises(ReplicaLost, match="'model'"):
                await future
        assert not lost.open and not lost.idle and news
        with pytest.raises(ReplicaLost):
            await lost.execute(batch_of(*rows(1)))
        events(at).GO_ON.set()
        await until(lambda: at.instance.slots.held == 0)
        await until(lambda: other.idle)
        assert only(await other.execute(batch_of(*rows(2)))).shape == (2, 16)
        await other.aclose()


@drive
async def test_closing_the_instance_answers_what_it_has_and_ends_the_connections():
    async with place(models.identity()) as at:
        client = await at.connect()
        replies = [client.execute(batch_of(*rows(n))) for n in (1, 2)]
        await asyncio.to_thread(at.instance.close)
        assert [only(await reply).shape[0] for reply in replies] == [1, 2]
        await until(lambda: not client.open)
        late = await local.LocalClient.connect(at.address, 0, "r", "m", lambda: None, 1.0)
        await until(lambda: not late.open)


@drive
async def test_a_call_has_its_time_limit_and_its_answer_is_still_waited_for():
    async with place(WAITS) as at:
        client = await at.connect(limit_s=1.0)
        late = client.execute(batch_of(*rows(1)))
        with pytest.raises(QueueTimeout, match="'model'"):
            await late
        assert client.outstanding == 1 and client.open and not client.idle
        events(at).GO_ON.set()
        await until(lambda: client.idle)
        assert only(await client.execute(batch_of(*rows(2)))).shape == (2, 16)
        await client.aclose()


@drive
async def test_a_call_that_nobody_waits_for_any_more_ends_quietly():
    async with place(models.identity()) as at:
        client = await at.connect()
        client.execute(batch_of(*rows(1))).cancel()
        await until(lambda: client.idle)
        await client.aclose()
        await client.aclose()
        assert not client.open


@drive
async def test_what_cannot_be_sent_is_internal_and_the_connection_lives():
    async with place(models.identity()) as at:
        client = await at.connect()
        with pytest.raises(Internal, match="complex64"):
            await client.execute(batch_of(np.zeros((1, 2), np.complex64)))
        assert client.idle
        await client.aclose()


ONE_FOR_TWO = """
import torch

class One(torch.nn.Module):
    def forward(self, x):
        return x
"""


@drive
async def test_an_error_of_the_whole_batch_comes_as_itself():
    made = ONE.model_copy(update={"output": config({}, {"y": (-1,), "z": (-1,)}).output})
    async with place(ONE_FOR_TWO, made) as at:
        client = await at.connect()
        (part,) = (await client.execute(batch_of(*rows(1)))).parts
        assert type(part.error) is InvalidArgument
        at.instance._execution, kept = None, at.instance._execution
        with pytest.raises(Internal, match="has not loaded its model"):
            await client.execute(batch_of(*rows(1)))
        at.instance._execution = kept
        await client.aclose()


def test_an_address_that_leads_nowhere(tmp_path):
    @drive
    async def nowhere() -> None:
        address = ChannelAddress(str(tmp_path / "none"), "t")
        with pytest.raises(ChannelError, match="no connection"):
            await local.LocalClient.connect(address, 0, "r", "m", lambda: None, 1.0)

    nowhere()


# --- large tensors --------------------------------------------------------------------------------


@pytest.mark.parametrize("megabytes", [1, 20])
def test_large_tensors_go_through_shared_memory_that_is_used_again(megabytes):
    @drive
    async def large() -> None:
        async with place(Add()) as at:
            client = await at.connect()
            width = megabytes * (1 << 20) // 4 // 4
            for seed in range(6):
                batch = batch_of(*rows(4, width, seed))
                reply = await client.execute(batch)
                np.testing.assert_array_equal(only(reply), 2 * whole(batch))
                del reply
            assert len(client._outgoing._arenas) == 1 and len(client._mappings) == 1
            await client.aclose()

    large()


@drive
async def test_answers_in_shared_memory_stay_while_they_are_looked_at():
    async with place(Add()) as at:
        client = await at.connect()
        batches = [batch_of(*rows(2, 100_000, seed)) for seed in range(6)]
        replies = [only(await client.execute(batch)) for batch in batches]
        for batch, reply in zip(batches, replies, strict=True):
            np.testing.assert_array_equal(reply, 2 * whole(batch))
        assert len(client._mappings) == 6
        view = replies[0][0, :5]
        wanted = view.copy()
        await client.aclose()
        del replies
        gc.collect()
        np.testing.assert_array_equal(view, wanted)  # also when the connection is gone


@drive
async def test_a_model_that_keeps_its_input_gets_memory_of_its_own():
    source = (
        "import torch\nclass Net(torch.nn.Module):\n    kept = []\n    def forward(self, x):\n"
        "        self.kept.append((x, x.clone()))\n"
        "        assert all(torch.equal(*pair) for pair in self.kept)\n        return x + 0"
    )
    async with place(source) as at:
        client = await at.connect()
        for seed in range(8):
            batch = batch_of(*rows(2, 100_000, seed))
            np.testing.assert_array_equal(only(await client.execute(batch)), whole(batch))
        assert len(client._outgoing._arenas) <= 1
        await client.aclose()


@drive
async def test_without_shared_memory_large_tensors_go_through_the_socket():
    async with place(Add()) as at:
        client = await at.connect()
        client._outgoing._arenas._max_count = 0
        batch = batch_of(*rows(4, 500_000))
        reply = await client.execute(batch)
        np.testing.assert_array_equal(only(reply), 2 * whole(batch))
        assert len(client._outgoing._arenas) == 0
        await client.aclose()


@drive
async def test_large_batches_that_fail_are_sent_again_in_pieces():
    async with place(models.RefusesNegative()) as at:
        client = await at.connect()
        members = rows(3, 200_000)
        members[1] = -members[1]
        reply = await client.execute(batch_of(*members))
        assert [part.error is None for part in reply.parts] == [True, False, True]
        np.testing.assert_array_equal(reply.parts[2].outputs["y"].data, members[2] * 2)
        await client.aclose()


# --- mistakes of our own --------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["send", "receive", "flush", "executor"])
def test_an_error_that_nobody_foresaw_ends_the_connection(method):
    """And not only this call: one that is left waiting would keep its place for ever."""

    @drive
    async def unforeseen() -> None:
        async with place(models.identity()) as at:
            news: list[bool] = []
            client = await at.connect(lambda: news.append(True))
            news.clear()
            place_of = {"executor": (asyncio.get_running_loop(), "run_in_executor")}
            target, name = place_of.get(method, (client._stream, method))
            with mock.patch.object(target, name, side_effect=OSError(24, "too many")):
                call = client.execute(batch_of(*rows(2, 200_000 if method == "executor" else 16)))
                if method == "flush":
                    client._writable()
                with pytest.raises(ReplicaLost):
                    await call
            assert (client.outstanding, client.open, client.idle) == (0, False, False)
            assert news

    unforeseen()


@drive
async def test_what_cannot_be_sent_again_and_nobody_waits_for_is_news_all_the_same():
    async with place(models.RefusesNegative()) as at:
        news: list[bool] = []
        client = await at.connect(lambda: news.append(True))
        news.clear()
        call = client.execute(batch_of(*rows(1), -rows(1)[0]))
        with mock.patch.object(client._codec, "batch", side_effect=Internal("too large")):
            call.cancel()
            await until(lambda: not client.outstanding)
        assert client.open and news
        assert only(await client.execute(batch_of(*rows(2)))).shape == (2, 16)
        await client.aclose()


@drive
async def test_a_connection_that_cannot_say_its_name_leaves_nothing_behind():
    heard: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context))
    async with place(models.identity()) as at:
        for error in (ChannelError("gone"), OSError(24, "too many")):
            with mock.patch.object(Stream, "send", side_effect=error):
                with pytest.raises(type(error)):
                    await local.LocalClient.connect(
                        at.address, 0, "r", "m", lambda: heard.append("changed"), 1.0
                    )
        gc.collect()
        await asyncio.sleep(0)
    assert heard == []


@drive
async def test_no_descriptors_left_is_no_connection():
    with mock.patch.object(socket, "socket", side_effect=OSError(24, "too many")):
        with pytest.raises(ChannelError, match="too many"):
            await local.LocalClient.connect(
                ChannelAddress("/tmp/none", "t"), 0, "r", "m", lambda: None, 1.0
            )


@drive
async def test_an_answer_to_a_member_that_was_not_sent_ends_the_connection():
    async with place(models.identity()) as at:
        client = await at.connect()
        execute = at.instance.execute

        def shifted(batch, how):
            (part,) = execute(batch, how).parts
            return BatchReply((dataclasses.replace(part, members=(2,)),))

        with mock.patch.object(at.instance, "execute", shifted):
            with pytest.raises(ReplicaLost):
                await client.execute(batch_of(*rows(1)))
        assert not client.open
