"""The metrics page of a real server with two Routers: what Prometheus and dashboards read there."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from prometheus_client.parser import text_string_to_metric_families

from deployments.followers import ROUTER_SILENT_S
from tests import models
from tests.serve import repository
from tests.serve.clients import aio_client, infer, infer_aio, loading, rows, statistics
from tests.serve.server import Server, wait_equal, wait_for

HOST = "instance_group [ { kind: KIND_CPU } ]\ndynamic_batching { }\n"
TAGS = 'metric_tags { key: "site" value: "north" }\n' + HOST

Page = dict[str, dict[tuple[str, ...], float]]


@pytest.fixture(scope="module")
def metered(pair: Server) -> Iterator[Server]:
    write(pair.repository, "tagged", TAGS)
    write(pair.repository, "plain", HOST)
    with loading(pair, ("tagged", "plain")):
        yield pair


def write(root: Path, name: str, more: str) -> None:
    models.save_torchscript(repository.mlp(), root, name)
    tensors = [repository.tensor("INPUT__0", "8")], [repository.tensor("OUTPUT__0", "4")]
    repository.write_config(root, name, repository.config(*tensors, more=more))


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest, metered: Server) -> Iterator[Any]:
    if request.param == "http":  # its limit is a minute otherwise, and a load may take longer
        one: Any = httpclient.InferenceServerClient(metered.http, network_timeout=240)
    else:
        one = grpcclient.InferenceServerClient(metered.grpc)
    yield one
    one.close()


def text(server: Server) -> str:
    reply = httpx.get(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=30)
    assert (reply.status_code, reply.headers["content-type"]) == (200, "text/plain; charset=utf-8")
    return reply.text


def page(server: Server) -> Page:
    """By name of sample, then by the values of its labels, as prometheus_client reads them."""
    found: Page = {}
    for family in text_string_to_metric_families(text(server)):
        for sample in family.samples:
            of = found.setdefault(sample.name.removesuffix("_total"), {})
            of[tuple(sample.labels[name] for name in sorted(sample.labels))] = sample.value
    return found


def successes(found: Page, model: str) -> float:
    return found["nv_inference_request_success"][model, "1"]


def page_with(server: Server, model: str, count: float) -> Page:
    """Once it has so many successes: the Router that is not asked tells its own now and then."""
    seen: list[Page] = []

    def there() -> bool:
        seen.append(page(server))
        return successes(seen[-1], model) >= count

    wait_for(there, 60, f"{count} successes of {model}")
    return seen[-1]


def many(server: Server, model: str, count: int, size: int) -> None:
    """Requests on as many connections, so that both Routers get some, over both protocols."""

    async def ask(protocol: str) -> None:
        async with aio_client(server, protocol) as one:
            await infer_aio(one, model, {"INPUT__0": rows(size, 8)})

    async def run() -> None:
        await asyncio.gather(*(ask(("http", "grpc")[k % 2]) for k in range(count)))

    asyncio.run(run())


def test_both_ports_have_the_page(metered: Server) -> None:
    def names(page: str) -> list[str]:
        return [line for line in page.splitlines() if line.startswith("# TYPE")]

    assert names(metered.get("/metrics").text) == names(text(metered))
    assert metered.get("/metrics").headers["content-type"] == "text/plain; charset=utf-8"
    for port in (metered.http_port, metered.metrics_port):
        for method in ("POST", "HEAD", "DELETE"):
            reply = httpx.request(method, f"http://127.0.0.1:{port}/metrics", timeout=30)
            assert reply.status_code == 405, (port, method)
    lost = httpx.get(f"http://127.0.0.1:{metered.metrics_port}/v2", timeout=30)
    assert (lost.status_code, lost.json()) == (404, {"error": "Not Found"})


def test_counters_histograms_and_statistics_agree_over_two_routers(metered: Server) -> None:
    before = page(metered)
    many(metered, "plain", 60, 2)
    after = page_with(metered, "plain", successes(before, "plain") + 60)
    key = ("plain", "1")

    def grown(name: str) -> float:
        return after[name][key] - before[name][key]

    assert grown("nv_inference_request_success") == 60
    assert grown("nv_inference_count") == 120
    executions = grown("nv_inference_exec_count")
    assert 1 <= executions <= 60
    for part, count in (("request", 60), ("queue", 60), ("compute", executions)):
        name = f"manta_{part}_duration_seconds"
        assert grown(f"{name}_count") == count
        bounds = {
            float(labels[0]): value
            for labels, value in after[f"{name}_bucket"].items()
            if labels[1] == "plain"
        }
        counts = [bounds[bound] for bound in sorted(bounds)]
        assert counts == sorted(counts) and math.inf in bounds
        assert bounds[math.inf] == after[f"{name}_count"][key]
    assert grown("manta_batch_size_count") == executions
    assert grown("manta_batch_size_sum") == 120
    in_us = grown("nv_inference_request_duration_us")
    assert grown("manta_request_duration_seconds_sum") * 1e6 == pytest.approx(in_us, abs=2)
    assert grown("nv_inference_queue_duration_us") <= in_us
    one = httpclient.InferenceServerClient(metered.http)
    counted = statistics(one, "plain")
    one.close()
    assert counted["success"] == after["nv_inference_request_success"][key]
    assert counted["execution_count"] == after["nv_inference_exec_count"][key]


def test_tags_are_labels_of_their_model_alone(metered: Server, client: Any) -> None:
    infer(client, "tagged", {"INPUT__0": rows(1, 8)})
    lines = text(metered).splitlines()
    labels = '{_site="north",model="tagged",version="1"}'
    assert any(line.startswith(f"nv_inference_count{labels} ") for line in lines)
    reason = '{_site="north",model="tagged",reason="REJECTED",version="1"} 0'
    assert f"nv_inference_request_failure{reason}" in lines
    assert not [line for line in lines if "plain" in line and "_site" in line]


def test_quantiles_of_the_last_minute(metered: Server) -> None:
    before = page(metered)
    many(metered, "plain", 20, 1)
    found = page_with(metered, "plain", successes(before, "plain") + 20)
    name = "nv_inference_request_summary_us"
    half, nearly = (found[name]["plain", quantile, "1"] for quantile in ("0.5", "0.99"))
    assert 0 < half <= nearly
    succeeded = found["nv_inference_request_success"]["plain", "1"]
    assert found[f"{name}_count"]["plain", "1"] == succeeded
    assert {key[1] for key in found[name] if key[0] == "plain"} == {"0.5", "0.99"}
    for part in ("queue", "compute_input", "compute_infer", "compute_output"):
        assert found[f"nv_inference_{part}_summary_us"]["plain", "0.5", "1"] >= 0


def test_cpu_and_memory(metered: Server) -> None:
    found = page(metered)
    assert 0 <= found["nv_cpu_utilization"][()] <= 1
    total = found["nv_cpu_memory_total_bytes"][()]
    assert total == psutil.virtual_memory().total
    assert 0 < found["nv_cpu_memory_used_bytes"][()] < total


def test_what_clients_ask_for_makes_no_series(metered: Server) -> None:
    before = len(text(metered).splitlines())
    with httpx.Client(base_url=f"http://{metered.http}", timeout=30) as one:
        for number in range(300):
            reply = one.post(f"/v2/models/nobody{number}/infer", json={"inputs": []})
            assert reply.status_code == 404
    assert len(text(metered).splitlines()) == before


def test_series_go_with_an_unload_and_begin_anew_with_a_load(metered: Server, client: Any) -> None:
    infer(client, "tagged", {"INPUT__0": rows(1, 8)})
    nothing = 'nv_inference_count{_site="north",model="tagged",version="1"} 0'
    wait_for(lambda: nothing not in text(metered), 60, "it is counted")
    client.unload_model("tagged")
    assert "tagged" not in text(metered)
    client.load_model("tagged")
    lines = text(metered).splitlines()
    assert nothing in lines
    place = '{_site="north",model="tagged",version="1",le="+Inf"} 0'
    assert f"manta_request_duration_seconds_bucket{place}" in lines


# --- nothing goes backwards ----------------------------------------------------------------------


GROWING = (
    "nv_inference_request_success",
    "nv_inference_exec_count",
    "manta_request_duration_seconds_count",
    "manta_batch_size_sum",
)


def counted(server: Server) -> dict[str, float]:
    """What must never be less than before; asked again while a Router is being replaced."""

    def ask() -> dict[str, float] | None:
        try:
            found = page(server)
            return {name: found[name]["plain", "1"] for name in GROWING}
        except (httpx.TransportError, AssertionError, KeyError):
            return None

    found: dict[str, float] = wait_for(ask, 60, "the page is there")
    return found


def settled(server: Server) -> dict[str, float]:
    """What is counted, once no Router tells of more."""
    seen = [counted(server)]

    def same() -> bool:
        time.sleep(3)
        seen.append(counted(server))
        return seen[-1] == seen[-2]

    wait_for(same, 60, "the counts rest")
    return seen[-1]


def test_a_router_and_then_the_controller_die_and_no_count_goes_back(metered: Server) -> None:
    """The Router's counts are the Controller's, and then those of the Routers that are left."""
    many(metered, "plain", 20, 1)
    before = settled(metered)
    routers = metered.replica_pids("manta:Router")
    os.kill(routers[0], signal.SIGKILL)
    wait_for(lambda: len(set(metered.replica_pids("manta:Router")) - {routers[0]}) == 2, 120, "two")
    wait_for(metered.ready, 60, "the server is ready again")
    assert counted(metered) == before
    time.sleep(ROUTER_SILENT_S + 2)
    assert settled(metered) == before  # by then the others have heard what it had counted
    (controller,) = metered.replica_pids("manta:Controller")
    os.kill(controller, signal.SIGKILL)
    wait_for(
        lambda: metered.replica_pids("manta:Controller") not in ([], [controller]), 120, "another"
    )
    wait_for(lambda: counted(metered) == before, 60, "the new Controller knows all counts")
    many(metered, "plain", 10, 1)
    name = "nv_inference_request_success"
    wait_equal(lambda: counted(metered)[name], before[name] + 10, 60)
