from __future__ import annotations

import re
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from configs.metrics import parse
from deployments.aggregate import Aggregator, LoadedVersion
from deployments.buckets import EMPTY, SECONDS
from deployments.metrics import FAMILIES, render
from deployments.statistics import BatchTotals, Reason, Recent, Recorder, Totals, VersionKey
from deployments.windows import value_of


def loaded(model="m", version="1", load_s=2.0, pending=0, tags=None, recent=(), **totals):
    key = VersionKey(model, version, "g")
    return LoadedVersion(key, load_s, Totals(**totals), pending, tags or {}, recent)


def samples(page):
    """The lines of Triton's families."""
    return [line for line in page.splitlines() if line.startswith("nv_")]


def test_every_family_of_a_version():
    page = render(
        [
            loaded(
                load_s=1.25,
                pending=4,
                success=3,
                success_ns=9_999,
                queue_ns=2_000,
                input_ns=3_000,
                infer_ns=4_000,
                output_ns=5_000,
                inference_count=6,
                execution_count=2,
                failures={"CANCELED": 7},
            )
        ]
    )
    assert samples(page) == [
        'nv_inference_request_success{model="m",version="1"} 3',
        'nv_inference_request_failure{model="m",reason="REJECTED",version="1"} 0',
        'nv_inference_request_failure{model="m",reason="CANCELED",version="1"} 7',
        'nv_inference_request_failure{model="m",reason="BACKEND",version="1"} 0',
        'nv_inference_request_failure{model="m",reason="OTHER",version="1"} 0',
        'nv_inference_count{model="m",version="1"} 6',
        'nv_inference_exec_count{model="m",version="1"} 2',
        'nv_inference_request_duration_us{model="m",version="1"} 9',
        'nv_inference_queue_duration_us{model="m",version="1"} 2',
        'nv_inference_compute_input_duration_us{model="m",version="1"} 3',
        'nv_inference_compute_infer_duration_us{model="m",version="1"} 4',
        'nv_inference_compute_output_duration_us{model="m",version="1"} 5',
        'nv_inference_pending_request_count{model="m",version="1"} 4',
        'nv_model_load_duration_secs{model="m",version="1"} 1.25',
    ]


def test_each_family_has_one_help_and_one_type_before_its_samples():
    lines = render([loaded("a"), loaded("b")]).splitlines()
    for family in FAMILIES:
        at = lines.index(f"# HELP {family.name} {family.help}")
        assert lines[at + 1] == f"# TYPE {family.name} {family.kind}"
        own = [i for i, line in enumerate(lines) if line.startswith(family.name) and i > at]
        assert own == list(range(at + 2, at + 2 + len(own)))
        count = 2 * (len(EMPTY) + 2) if family.kind == "histogram" else 2
        count = {"nv_inference_request_failure": 8, "manta_batch_size": 26}.get(family.name, count)
        assert len(own) == count
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_how_many_replicas_there_should_be_and_are():
    page = render([replace(loaded(), replicas_wanted=3, replicas_running=1)])
    assert 'manta_replicas_wanted{model="m",version="1"} 3' in page
    assert 'manta_replicas_running{model="m",version="1"} 1' in page


def test_the_page_ends_with_a_newline_and_parses():
    page = render([loaded()])
    assert page.endswith("\n") and not page.endswith("\n\n")
    form = re.compile(r'nv_[a-z_]+\{([a-z]+="[^"]*",?)+\} [0-9.]+')
    assert all(form.fullmatch(line) for line in samples(page))


def test_whole_numbers_have_no_decimals():
    page = render([loaded(load_s=2.0, success=10**15)])
    assert 'nv_model_load_duration_secs{model="m",version="1"} 2\n' in page
    assert 'nv_inference_request_success{model="m",version="1"} 1000000000000000\n' in page


def test_labels_are_escaped():
    page = render([loaded(model='a"b\\c\nd')])
    assert r'nv_inference_count{model="a\"b\\c\nd",version="1"} 0' in page.splitlines()


def test_nothing_loaded_has_no_series():
    assert samples(render([])) == []


def test_series_come_with_the_load_and_go_with_the_unload():
    key = VersionKey("m", "1", "g")
    router, aggregator = Recorder(), Aggregator()
    router.counters(key).failed(Reason.OTHER, 1)
    aggregator.apply("r", router.flush(1))
    assert samples(render(aggregator.loaded())) == []
    aggregator.open(key, 1)
    failed = 'nv_inference_request_failure{model="m",reason="OTHER",version="1"} 1'
    assert failed in samples(render(aggregator.loaded()))
    aggregator.drop(key)
    assert samples(render(aggregator.loaded())) == []


# --- tags ----------------------------------------------------------------------------------------


def test_tags_are_labels_that_sort_into_place():
    page = render([loaded(tags={"site": 'the "north"', "a1": "x"})])
    assert (
        r'nv_inference_request_failure{_a1="x",_site="the \"north\"",model="m",'
        r'reason="OTHER",version="1"} 0'
    ) in page.splitlines()
    assert '_site="the \\"north\\"",model="m",version="1",le="0.0001"} 0' in page


# --- histograms of our own -----------------------------------------------------------------------


def counted():
    """Two requests of 3 and 5 rows in one execution, another of one row, as a Gate counts them."""
    key = VersionKey("m", "1", "g")
    router, aggregator = Recorder(), Aggregator()
    counters = router.counters(key)
    counters.executed(8, 1_000_000, 7_000_000, 2_000_000)
    counters.succeeded(3, 12_000_000, 2_000_000, 1_000_000, 7_000_000, 2_000_000)
    counters.succeeded(5, 11_000_000, 1_000_000, 1_000_000, 7_000_000, 2_000_000)
    counters.executed(1, 0, 90_000, 0)
    counters.succeeded(1, 100_000_000_000, 0, 0, 90_000, 0)
    aggregator.open(key, 1)
    aggregator.apply("r", router.flush(1))
    return aggregator.loaded()


def parsed(page):
    """By family, as Prometheus's own parser for Python reads it."""
    return {family.name: family for family in text_string_to_metric_families(page)}


def histogram(page, name):
    """Cumulative counts by upper bound, sum and count."""
    rows = parsed(page)[name].samples
    buckets = {row.labels["le"]: row.value for row in rows if row.name == f"{name}_bucket"}
    others = {row.name.removeprefix(name): row.value for row in rows if "le" not in row.labels}
    return buckets, others["_sum"], others["_count"]


def test_prometheus_reads_every_line():
    families = parsed(render(counted(), parse(["summary_latencies=true"])))
    assert {family.type for family in families.values()} >= {"counter", "gauge", "histogram"}
    assert families["manta_request_duration_seconds"].type == "histogram"
    assert families["nv_inference_queue_summary_us"].type == "summary"
    assert all(family.documentation for family in families.values())


def test_buckets_are_cumulative_and_agree_with_the_counters():
    page = render(counted())
    buckets, total, count = histogram(page, "manta_request_duration_seconds")
    assert list(buckets)[-1] == "+Inf" and [float(b) for b in buckets][:-1] == list(SECONDS)
    assert (buckets["0.01"], buckets["0.025"], buckets["60"], buckets["+Inf"]) == (0, 2, 2, 3)
    assert (total, count) == (pytest.approx(100.023), 3)
    buckets, total, count = histogram(page, "manta_queue_duration_seconds")
    assert (buckets["0.0001"], buckets["0.001"], buckets["0.0025"], count) == (1, 2, 3, 3)
    assert total == pytest.approx(0.003)
    buckets, total, count = histogram(page, "manta_compute_duration_seconds")
    assert (buckets["0.0001"], buckets["0.005"], buckets["0.01"], count) == (1, 1, 2, 2)
    assert total == pytest.approx(0.01009)


def test_batch_sizes():
    buckets, total, count = histogram(render(counted()), "manta_batch_size")
    assert (buckets["1"], buckets["4"], buckets["8"], buckets["512"]) == (1, 1, 2, 2)
    assert (total, count) == (9, 2)


def test_a_version_that_never_ran_has_all_its_series_at_zero():
    page = render([loaded()])
    for name in ("manta_request_duration_seconds", "manta_batch_size"):
        buckets, total, count = histogram(page, name)
        assert set(buckets.values()) == {0} and (total, count) == (0, 0)


def test_how_many_series_there_are_does_not_depend_on_requests():
    assert len(render(counted()).splitlines()) == len(render([loaded()]).splitlines())


# --- --metrics-config ----------------------------------------------------------------------------


def names(*entries):
    return {line.split()[2] for line in render([], parse(entries)).splitlines()}


def test_counters_of_latencies_can_be_turned_off():
    off = names() - names("counter_latencies=false")
    assert off == {
        f"nv_inference_{part}_duration_us"
        for part in ("request", "queue", "compute_input", "compute_infer", "compute_output")
    }
    assert {"nv_inference_request_success", "manta_request_duration_seconds"} <= names(
        "counter_latencies=false"
    )


def test_first_responses_are_those_of_decoupled_models_and_there_are_none():
    name = "nv_inference_first_response_histogram_ms"
    assert names("histogram_latencies=true") - names() == {name}
    page = render([loaded()], parse(["histogram_latencies=true"]))
    assert not [line for line in page.splitlines() if line.startswith(name)]


def test_summaries_as_triton_writes_them():
    recent: Recent = ({400: 50, 500: 50}, {0: 1}, {}, {}, {})
    version = loaded(success=100, success_ns=7_000_999, queue_ns=5_999, recent=recent)
    config = parse(["summary_latencies=true", "summary_quantiles=0.5:0.05,0.99:0.001"])
    lines = samples(render([version], config))
    name = "nv_inference_request_summary_us"
    request = [line for line in lines if line.startswith(name)]
    assert request == [
        'nv_inference_request_summary_us_count{model="m",version="1"} 100',
        'nv_inference_request_summary_us_sum{model="m",version="1"} 7000',
        f'{name}{{model="m",version="1",quantile="0.5"}} {value_of(400)}',
        f'{name}{{model="m",version="1",quantile="0.99"}} {value_of(500)}',
    ]
    assert 'nv_inference_queue_summary_us{model="m",version="1",quantile="0.5"} 0' in lines
    idle = 'nv_inference_compute_infer_summary_us{model="m",version="1",quantile="0.5"} NaN'
    assert idle in lines


def test_summaries_of_a_version_where_nothing_ran():
    page = render([loaded(batches={1: BatchTotals()})], parse(["summary_latencies=true"]))
    values = [line for line in samples(page) if "quantile=" in line]
    assert len(values) == 25 and all(line.endswith(" NaN") for line in values)
