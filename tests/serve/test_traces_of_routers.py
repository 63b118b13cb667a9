"""Two Routers: both hear of trace settings, and each writes a file of its own."""

from __future__ import annotations

from pathlib import Path

import httpx
import numpy as np
import tritonclient.http as httpclient

from tests.serve.clients import infer
from tests.serve.server import Server, wait_for
from tests.serve.traces import events

REQUESTS = 40


def test_each_router_writes_its_own_file_whole(pair: Server, traces: Path) -> None:
    address = f"http://{pair.http}/v2/models/nap/trace/setting"
    changes = {"trace_level": ["TIMESTAMPS"], "trace_rate": "1"}
    assert httpx.post(address, json=changes, timeout=60).json()["trace_rate"] == "1"
    row = {"x": np.ones((1, 2), np.float32)}
    for number in range(REQUESTS):  # connections of their own: some at each Router
        client = httpclient.InferenceServerClient(pair.http)
        assert client.get_trace_settings("nap")["trace_level"] == ["TIMESTAMPS"]
        infer(client, "nap", row, request_id=f"{number}")
        client.close()
    files = [traces / "pair.json", traces / "pair.json.router2"]

    def ids() -> list[list[str]]:
        return [[e["request_id"] for e in events(each) if "request_id" in e] for each in files]

    wait_for(lambda: sum(map(len, ids())) == REQUESTS, 60, "every request is in a file")
    first, second = ids()
    assert first and second and {*first, *second} == {str(n) for n in range(REQUESTS)}
    httpx.post(address, json={"trace_level": None, "trace_rate": None}, timeout=60)
