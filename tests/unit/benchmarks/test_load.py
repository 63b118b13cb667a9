"""The load generators' outputs: what counts, what does not, and when nothing can be said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import load
from benchmarks.load import LoadError
from benchmarks.wire import Request

SECOND = 1_000_000
OUTPUT = """\
requests: 30 total, 34 started, {done} done, {done} succeeded, \
0 failed, {errored} errored, {timeout} timeout
status codes: 30 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 12.33KB (12623) total, 1.20KB (1230) headers (space savings 95.49%), 10.89KB ({data}) data
"""


def log(*rows: tuple[int, int, int]) -> str:
    return "".join("\t".join(map(str, row)) + "\n" for row in rows)


def test_the_window_opens_at_the_last_answer_of_the_warm_up():
    text = log(
        (0, 200, 10), (SECOND - 25, 200, 20), (2 * SECOND, 503, 7), (3 * SECOND - 5, 200, 30)
    )
    result = load.read_log(text, warm_up_s=1.0)
    assert (result.requests, result.failed, result.total) == (1, 1, 4)
    assert result.seconds == pytest.approx((2 * SECOND + 30) / 1e6)
    assert (result.p50_us, result.mean_us) == (30, 30)


def test_slow_batches_count_whole():
    """Batches of 32 that take 2 s each are 16 rows a second, wherever the warm-up is cut."""
    ends = [2 * SECOND * number for number in (1, 2, 3)]
    text = log(*((end - 2 * SECOND, 200, 2 * SECOND) for end in ends for _ in range(32)))
    for warm_up_s in (2.0, 2.9, 3.9):
        assert load.read_log(text, warm_up_s).throughput == pytest.approx(16)


def test_without_a_warm_up_all_counts():
    result = load.read_log(log((0, 200, 500_000), (500_000, 200, 500_000)), warm_up_s=0.0)
    assert (result.requests, result.seconds, result.throughput) == (2, 1.0, 2.0)


@pytest.mark.parametrize(
    "text", ["", log((0, 200, 10)), log((0, 200, 1), (2 * SECOND, 500, 1))], ids=str
)
def test_no_usable_request(text: str):
    with pytest.raises(LoadError):
        load.read_log(text, warm_up_s=1.0)


@pytest.mark.parametrize(
    ("done", "data", "errored", "timeout", "size", "broken"),
    [
        (30, 3000, 0, 0, 100, 0),
        (30, 3050, 0, 0, 100, 0),  # a part of an answer that came too late
        (30, 2800, 0, 0, 100, 2),  # two answers of status 200 without a message
        (30, 0, 2, 1, 0, 3),  # HTTP: the log has the statuses, only broken connections count
    ],
)
def test_failures_that_only_the_output_shows(done, data, errored, timeout, size, broken):
    text = OUTPUT.format(done=done, data=data, errored=errored, timeout=timeout)
    assert load.read_output(text, answer_bytes=size) == broken


def test_output_without_counts():
    with pytest.raises(LoadError, match="no counts"):
        load.read_output("some other program\n", 0)


def test_wrk_counts_good_answers_only():
    line = '{"requests":110,"status":10,"broken":1,"us":2000000,"mean":9.5,"p50":9,"p99":20}'
    result = load.read_wrk(f"Running 2s test\nBENCH {line}\n")
    assert (result.requests, result.failed, result.throughput) == (100, 11, 50.0)


def test_wrk_without_a_good_answer():
    line = '{"requests":10,"status":10,"broken":0,"us":1000000,"mean":1,"p50":1,"p99":1}'
    for text in ("", f"BENCH {line}"):
        with pytest.raises(LoadError):
            load.read_wrk(text)


def test_the_script_of_wrk_has_the_headers():
    request = Request("http", "/x", (("Content-Type", 'a"b'),), b"x", lambda *_: np.zeros(1))
    script = load.wrk_script(Path("/tmp/body"), request)
    assert 'io.open("/tmp/body", "rb")' in script
    assert 'wrk.headers["Content-Type"] = "a\\"b"' in script


def test_a_missing_generator_names_its_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    request = Request("http", "/", (), b"", lambda *_: np.zeros(1))
    assert "nghttp2-client" in (load.missing() or "")
    with pytest.raises(LoadError, match="apt-get install wrk"):
        load.run("wrk", 1, request, 1, load.Timing(0.1, 0.1))
