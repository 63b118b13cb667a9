"""Mode opentelemetry against a real collector: spans for every member of a batch, under the traces
that clients send along; and a collector that has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests import models
from tests.collector import Collector
from tests.serve import repository
from tests.serve.clients import aio_client, infer_aio
from tests.serve.server import Server, manta_serve, wait_for

MEMBERS = 12


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    one = Collector()
    yield one
    one.close()


@pytest.fixture(scope="module")
def spanned(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Server]:
    """Only requests with a trace of their own are traced."""
    root = tmp_path_factory.mktemp("spanned")
    models.save_eager(repository.NAP, root, "nap")
    text = repository.config(
        [repository.tensor("x", "2")],
        [repository.tensor("y", "2")],
        engine='backend: "pytorch"\nruntime: "model.py"',
        max_batch_size=4,
        more="dynamic_batching { }\ninstance_group [ { kind: KIND_CPU } ]\n" + repository.EAGER,
    )
    repository.write_config(root, "nap", text)
    entries = ["mode=opentelemetry", "level=TIMESTAMPS", "rate=0"]
    entries += [f"opentelemetry,url={collector.url}", "opentelemetry,resource=service.name=mine"]
    entries += ["opentelemetry,resource=zone=a", "opentelemetry,bsp_schedule_delay=200"]
    with manta_serve(root, *(f"--trace-config={entry}" for entry in entries)) as one:
        one.wait_ready()
        yield one


def trace_of(protocol: str, number: int) -> str:
    return f"{(1 if protocol == 'http' else 2) << 64 | number:032x}"


async def ask(server: Server, protocol: str) -> None:
    """All at the same time, each with a trace of its own but the last, which has none."""
    client = aio_client(server, protocol)
    row = {"x": np.ones((1, 2), np.float32)}
    try:
        tasks = []
        for number in range(1, MEMBERS + 2):
            parent = f"00-{trace_of(protocol, number)}-{number:016x}-01"
            headers = {"traceparent": parent} if number <= MEMBERS else {}
            options = {"headers": headers, "request_id": f"{protocol}{number}"}
            tasks.append(asyncio.create_task(infer_aio(client, "nap", row, **options)))
        for reply in await asyncio.gather(*tasks):
            assert reply.as_numpy("y").tolist() == [[2, 2]]
    finally:
        await client.close()


def attributes(span: Any) -> dict[str, Any]:
    return {
        pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in span.attributes
    }


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_every_member_of_a_batch_has_its_spans(
    spanned: Server, collector: Collector, protocol: str
) -> None:
    asyncio.run(ask(spanned, protocol))
    wanted = {trace_of(protocol, number): number for number in range(1, MEMBERS + 1)}

    def all_there() -> bool:
        found = collector.by_trace()
        return all(len(found.get(trace, ())) == 3 for trace in wanted)

    wait_for(all_there, 60, "three spans of each member")
    found = collector.by_trace()
    computes = {trace: found[trace]["compute"] for trace in wanted}
    sizes = set()
    for trace, number in wanted.items():
        request, model, compute = (
            found[trace][name] for name in ("InferRequest", "nap", "compute")
        )
        assert request.parent_span_id.hex() == f"{number:016x}"
        assert model.parent_span_id == request.span_id and compute.parent_span_id == model.span_id
        told = attributes(model)
        assert told["triton.model_name"] == "nap" and told["triton.model_version"] == 1
        assert told["triton.request_id"] == f"{protocol}{number}"
        nanos = [request.start_time_unix_nano, model.start_time_unix_nano]
        nanos += [compute.start_time_unix_nano, compute.end_time_unix_nano]
        nanos += [model.end_time_unix_nano, request.end_time_unix_nano]
        assert nanos == sorted(nanos)
        assert compute.end_time_unix_nano - compute.start_time_unix_nano >= 20_000_000
        sizes.add(told["triton.batch_requests"])
        mates = {link.trace_id.hex(): link.span_id for link in compute.links}
        for mate, span_id in mates.items():  # who is linked links back
            assert computes[mate].span_id == span_id
            assert trace in {link.trace_id.hex() for link in computes[mate].links}
    assert max(sizes) > 1  # there were batches
    untraced = f"{protocol}{MEMBERS + 1}"
    ids = {attributes(span).get("triton.request_id") for span in collector.spans}
    assert untraced not in ids
    assert {(r["service.name"], r["zone"]) for r in collector.resources} == {("mine", "a")}


def test_requests_do_not_need_a_collector_and_a_server_ends_without(
    spanned: Server, collector: Collector
) -> None:
    collector.close()
    for _ in range(3):
        asyncio.run(ask(spanned, "http"))
    told = "does not take them"
    wait_for(lambda: told in spanned.output(), 90, "that spans are lost is told")
    assert spanned.output().count(told) == 1
    assert "Traceback" not in spanned.output()
    assert spanned.stop() == 0
