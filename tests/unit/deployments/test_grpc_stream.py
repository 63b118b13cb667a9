"""A stream: order, what it holds, errors in the band, and what becomes of its work at its end."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress

import numpy as np
import pytest

from deployments import grpc_stream
from deployments.errors import MantaError, ShuttingDown, UnknownModel
from deployments.grpc_stream import FINAL, MAX_BYTES, OVERHEAD_BYTES, Ahead, Stream

from .lanes import LaneServer
from .serving import linear
from .test_grpc import RAW, entry, parameter, request


def ask(name, model="linear", **more):
    inputs = {"linear": [entry()], "add_sub": [entry("INPUT0", "INT32"), entry("INPUT1", "INT32")]}
    of = inputs.get(model, [entry("X", shape=(1, 1))])
    raw = [RAW[:4]] if model not in inputs else [RAW] * len(of)
    return request(*of, raw=raw, model=model, id=str(name), **more)


class Client:
    """Sends one by one, and counts what has been taken of it."""

    def __init__(self):
        self.queue: asyncio.Queue = asyncio.Queue()
        self.taken = 0

    def send(self, *messages):
        for message in messages:
            self.queue.put_nowait(message)

    def close(self):
        self.queue.put_nowait(None)

    async def requests(self):
        while (message := await self.queue.get()) is not None:
            self.taken += 1
            if isinstance(message, Exception):
                raise message
            yield message


async def settle():
    for _ in range(50):
        await asyncio.sleep(0)


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def run(use, most=64, **settings):
    """`await use(server, client, stream)`; nothing may be left of it."""

    async def main():
        server, client = LaneServer(**settings), Client()
        stream = Stream(server.inference, most)
        await asyncio.wait_for(use(server, client, stream), 30)
        for model in server.models.values():
            if model.held is not None:
                model.held.set()
        await settle()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def told(answer):
    return answer.infer_response.id, answer.error_message


async def everything(stream, client):
    async with aclosing(stream.answers(client.requests())) as answers:
        return [answer async for answer in answers]


# --- order ----------------------------------------


def test_requests_run_side_by_side_and_are_answered_in_their_order():
    async def use(server, client, stream):
        slow, fast = server.models["linear"], server.models["add_sub"]
        slow.held = asyncio.Event()
        client.send(ask(1), ask(2, "add_sub"), ask(3, "add_sub"))
        client.close()
        task = asyncio.ensure_future(everything(stream, client))
        await until(lambda: len(fast.ran) == 2)
        await settle()
        assert not task.done() and not slow.ran
        slow.held.set()
        answers = await task
        assert [answer.infer_response.id for answer in answers] == ["1", "2", "3"]
        expected = linear(np.frombuffer(RAW, np.float32)[None])[0].tobytes()
        assert answers[0].infer_response.raw_output_contents[0] == expected
        assert all(answer.infer_response.parameters[FINAL].bool_param for answer in answers)

    run(use)


def test_an_answer_does_not_wait_for_more_requests():
    async def use(server, client, stream):
        async with aclosing(stream.answers(client.requests())) as answers:
            for number in range(3):
                client.send(ask(number))
                assert told(await anext(answers)) == (str(number), "")

    run(use)


def test_a_stream_without_requests_ends():
    async def use(server, client, stream):
        client.close()
        assert await everything(stream, client) == []

    run(use)


def test_an_empty_final_response_is_understood_and_not_needed():
    async def use(server, client, stream):
        wanted = {"triton_enable_empty_final_response": parameter(bool_param=True)}
        client.send(ask(1, parameters=wanted))
        client.close()
        assert [told(answer) for answer in await everything(stream, client)] == [("1", "")]

    run(use)


# --- errors ----------------------------------------


def test_errors_are_answers_and_the_stream_goes_on():
    async def use(server, client, stream):
        client.send(
            *(ask(1, "nobody"), ask(2), ask(3, "failing"), ask(4, "full"), ask(5, "crashing")),
            *(request(entry(), raw=[RAW[:-1]], id="6"), ask(7, model_version="-1")),
            ask(8),
        )
        client.close()
        answers = await everything(stream, client)
        texts = dict(map(told, answers))
        assert list(texts) == list("12345678")
        assert "unknown model: 'nobody' is not found" in texts["1"]
        assert texts["2"] == texts["8"] == ""
        assert texts["3"].startswith("[request id: 3] PyTorch execute failure")
        assert "queue size" in texts["4"]
        assert texts["5"] and "/secret" not in texts["5"]
        assert "Expected 16, got 15" in texts["6"]
        assert "integer > 0" in texts["7"]
        assert all(answer.infer_response.parameters[FINAL].bool_param for answer in answers)

    run(use)


def test_the_first_error_ends_a_stream_that_wants_it_so():
    async def use(server, client, _):
        stream = Stream(server.inference, 64, errors_end=True)
        slow = server.models["add_sub"]
        slow.held = asyncio.Event()
        client.send(ask(1), ask(2, "nobody"), ask(3, "add_sub"), ask(4, "add_sub"))
        answers = stream.answers(client.requests())
        assert told(await anext(answers)) == ("1", "")
        with pytest.raises(UnknownModel):
            await anext(answers)
        assert server.gates["add_sub"].pending == 0
        slow.held.set()
        await settle()
        assert len(slow.ran) == 1  # that had begun

    run(use)


def test_what_reading_raises_comes_after_the_answers():
    async def use(server, client, stream):
        client.send(ask(1), ValueError("no message"))
        answers = stream.answers(client.requests())
        assert told(await anext(answers)) == ("1", "")
        with pytest.raises(ValueError, match="no message"):
            await anext(answers)

    run(use)


# --- what it holds ----------------------------------------


def test_so_many_are_in_work_at_a_time():
    async def use(server, client, stream):
        model, gate = server.models["linear"], server.gates["linear"]
        model.held = asyncio.Event()
        client.send(*map(ask, range(10)))
        client.close()
        task = asyncio.ensure_future(everything(stream, client))
        await settle()
        assert (stream.in_work, gate.pending + gate.in_flight) == (3, 3)
        model.held.set()
        assert [told(answer)[0] for answer in await task] == list("0123456789")

    run(use, most=3)


def test_work_is_bounded_in_bytes_too(monkeypatch):
    monkeypatch.setattr(grpc_stream, "MAX_BYTES", 40)

    async def use(server, client, stream):
        server.models["linear"].held = asyncio.Event()
        client.send(*map(ask, range(10)))
        async with aclosing(stream.answers(client.requests())) as answers:
            task = asyncio.ensure_future(anext(answers))
            await settle()
            assert stream.in_work == 3  # of 16 bytes each: the last goes beyond
            server.models["linear"].held.set()
            await task

    run(use)


def test_a_client_that_is_too_far_ahead_has_to_wait(monkeypatch):
    monkeypatch.setattr(grpc_stream, "MAX_BYTES", 3 * OVERHEAD_BYTES)

    async def use(server, client, stream):
        model = server.models["linear"]
        model.held = asyncio.Event()
        client.send(*map(ask, range(100)))
        client.close()
        task = asyncio.ensure_future(everything(stream, client))
        await settle()
        assert client.taken == 2 + 3  # in work, and ahead
        model.held.set()
        assert [told(answer)[0] for answer in await task] == [str(at) for at in range(100)]
        assert client.taken == 100

    run(use, most=2)


def test_while_an_answer_does_not_get_away_more_is_read(monkeypatch):
    """What would let it get away may be behind requests on the client's connection."""
    monkeypatch.setattr(grpc_stream, "MAX_BYTES", 3 * OVERHEAD_BYTES)
    limit = 20 * OVERHEAD_BYTES

    async def use(server, client, stream):
        client.send(*map(ask, range(100)))
        async with aclosing(stream.answers(client.requests())) as answers:
            await anext(answers)  # and is not done with it
            await settle()
            assert 15 < client.taken < 30
            assert stream.in_work == 2

    run(use, most=2, max_body_bytes=limit, http_max_input_size_bytes=limit)


def test_all_streams_together_read_no_more_ahead_than_one_may(monkeypatch):
    monkeypatch.setattr(grpc_stream, "MAX_BYTES", 3 * OVERHEAD_BYTES)
    limit = 20 * OVERHEAD_BYTES
    ahead = Ahead()

    async def use(server, client, stream):
        ahead.bytes = limit  # others'
        first = Stream(server.inference, 2, ahead=ahead)
        client.send(*map(ask, range(100)))
        async with aclosing(first.answers(client.requests())) as answers:
            await anext(answers)  # and is not done with it
            await settle()
            assert client.taken <= 1 + 2 + 3
            assert ahead.bytes > limit
        assert ahead.bytes == limit, "what it had is given back"

    run(use, max_body_bytes=limit, http_max_input_size_bytes=limit)


def test_the_bounds():
    assert MAX_BYTES == 64 << 20


# --- the end ----------------------------------------


@pytest.mark.parametrize("cancelled", [True, False])
def test_what_waits_is_not_run_when_nobody_waits_for_it(cancelled):
    async def use(server, client, stream):
        model, gate = server.models["linear"], server.gates["linear"]
        model.held = asyncio.Event()
        client.send(ask(1), ask(2), ask(3), ask(4, "nobody"))
        if cancelled:
            task = asyncio.ensure_future(everything(stream, client))
            await until(lambda: gate.pending == 2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            client.send(ask(5, "add_sub"))
            async with aclosing(stream.answers(client.requests())) as answers:
                waiting = asyncio.ensure_future(anext(answers))
                await until(lambda: gate.pending == 2)
                waiting.cancel()
                with suppress(asyncio.CancelledError):
                    await waiting
        assert gate.pending == 0
        model.held.set()
        await settle()
        assert len(model.ran) == 1  # that had begun

    run(use)


def test_control_what_is_waited_for_is_run():
    async def use(server, client, stream):
        model = server.models["linear"]
        client.send(ask(1), ask(2), ask(3))
        client.close()
        assert len(await everything(stream, client)) == 3
        assert len(model.ran) == 3

    run(use)


def test_failures_that_nobody_asks_for_are_no_news(caplog):
    """asyncio would log a future whose exception nobody has seen."""

    async def use(server, client, stream):
        server.models["linear"].held = asyncio.Event()
        client.send(ask(1), ask(2, "failing"))
        task = asyncio.ensure_future(everything(stream, client))
        await until(lambda: server.models["failing"].ran)
        await settle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(use)
    assert caplog.text == ""


def test_leaving_it_answers_what_it_has_in_work_and_ends():
    async def use(server, client, stream):
        model = server.models["linear"]
        model.held = asyncio.Event()
        client.send(ask(1), ask(2), ask(3))
        answers = stream.answers(client.requests())
        first = asyncio.ensure_future(anext(answers))
        await until(lambda: stream.in_work == 2)
        stream.leave()
        client.send(ask(4))
        await settle()
        model.held.set()
        assert told(await first)[0] == "1"
        assert told(await anext(answers))[0] == "2"
        with pytest.raises(ShuttingDown):
            await anext(answers)
        assert len(model.ran) == 2

    run(use, most=2)


def test_leaving_an_idle_stream_ends_at_once():
    async def use(server, client, stream):
        task = asyncio.ensure_future(everything(stream, client))
        await settle()
        stream.leave()
        with pytest.raises(ShuttingDown):
            await task
        with pytest.raises(ShuttingDown):
            await everything(stream, client)

    run(use)


def test_leaving_one_that_was_closed_is_a_good_end():
    async def use(server, client, stream):
        model = server.models["linear"]
        model.held = asyncio.Event()
        client.send(ask(1))
        client.close()
        task = asyncio.ensure_future(everything(stream, client))
        await until(lambda: stream.in_work)
        await settle()
        stream.leave()
        model.held.set()
        assert [told(answer) for answer in await task] == [("1", "")]

    run(use)


def test_while_the_server_ends_requests_are_told():
    async def use(server, client, stream):
        server.publish(closing=True)
        client.send(ask(1))
        client.close()
        (answer,) = await everything(stream, client)
        assert told(answer)[1].startswith("GRPC server is shutting down")

    run(use)


def test_refusals_do_not_keep_their_requests():
    """A traceback would hold the message until its turn comes."""

    async def use(server, client, stream):
        server.models["linear"].held = asyncio.Event()
        client.send(ask(1), ask(2, "nobody"), ask(3, "nobody"))
        task = asyncio.ensure_future(everything(stream, client))
        await until(lambda: stream.in_work == 3)
        for turn in list(stream._turns)[1:]:
            error = turn.what
            assert isinstance(error, MantaError)
            assert error.__traceback__ is None and error.__context__ is None
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    run(use)
