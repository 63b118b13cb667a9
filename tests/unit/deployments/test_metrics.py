from __future__ import annotations

import re

from deployments.metrics import FAMILIES, render
from deployments.statistics import Aggregator, LoadedVersion, Reason, Recorder, Totals, VersionKey


def loaded(model="m", version="1", load_s=2.0, pending=0, **totals):
    return LoadedVersion(VersionKey(model, version, "g"), load_s, Totals(**totals), pending)


def samples(page):
    return [line for line in page.splitlines() if not line.startswith("#")]


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
        own = [i for i, line in enumerate(lines) if line.startswith(family.name + "{")]
        assert own == list(range(at + 2, at + 2 + len(own)))
        assert len(own) == (8 if family.name.endswith("failure") else 2)
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


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
