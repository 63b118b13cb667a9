"""The file of traces: whole after each write, one per so many traces, one per Router."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from deployments import trace_file
from deployments.trace_file import TraceFile, claim, texts_of
from deployments.traced_tensors import INPUT, OUTPUT, TracedTensor
from deployments.tracing import Finished, Ids
from deployments.types import TraceSettings

STAMPS = (("REQUEST_START", 10), ("REQUEST_END", 20))


def trace(number, frequency=0, request_id="", tensors=(), stamps=STAMPS):
    settings = TraceSettings(("TIMESTAMPS",), log_frequency=frequency)
    ids = Ids(number, 1, 2, 3, 4)
    return Finished("m", "1", request_id, ids, None, stamps, settings, None, tensors, "")


def numbers(path):
    """Of the traces in a file, which must be whole."""
    return [event["id"] for event in json.loads(path.read_text()) if "model_name" in event]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trace.json"


def test_events_are_tritons():
    array = np.array([1, 2], np.int32)
    tensors = (TracedTensor(OUTPUT, "y", "INT32", (2,), array, True),)
    assert list(map(json.loads, texts_of(trace(7, request_id='a"\n', tensors=tensors)))) == [
        {"id": 7, "model_name": "m", "model_version": 1, "request_id": 'a"\n'},
        {"id": 7, "timestamps": [{"name": "REQUEST_START", "ns": 10}]},
        {"id": 7, "timestamps": [{"name": "REQUEST_END", "ns": 20}]},
        {
            "id": 7,
            "activity": "TENSOR_BACKEND_OUTPUT",
            "tensor": {"name": "y", "data": "1,2", "shape": "2", "dtype": "INT32"},
        },
    ]
    assert "request_id" not in json.loads(next(texts_of(trace(7))))


def test_all_that_was_taken_is_in_the_file(path):
    sink = TraceFile(str(path))
    for number in range(1, 301):
        sink.take(trace(number))
    sink.close(10)
    assert numbers(path) == list(range(1, 301))


def test_the_file_is_whole_after_each_write(path):
    array = trace_file._Array(str(path))
    for number in range(1, 6):
        array.append([text.encode() for text in texts_of(trace(number))])
        assert numbers(path) == list(range(1, number + 1))


# A disk that is full after so many bytes, until there is room again.
FULL = """
import json, resource, signal, sys
from deployments.trace_file import _Array
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for limit in (4096, 500):
    path = f"{sys.argv[1]}.{limit}"
    array, written, failures = _Array(path), [], set()
    for number in range(20):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit if number < 15 else hard, hard))
        # Those that fail are longer than what follows them.
        filler = "x" * (600 if number < 15 else 1)
        try:
            array.append([b"%d" % number, json.dumps(filler).encode()])
            written.append(number)
        except OSError as error:
            failures.add(error.strerror)
        found = json.load(open(path))
        assert found[::2] == written, (found, written)
    print(json.dumps([written, list(failures)]))
"""


def test_a_full_disk_leaves_a_whole_file_and_goes_on_when_it_has_room(path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert list(map(json.loads, done.stdout.splitlines())) == [
        [[*range(6), *range(15, 20)], ["File too large"]],
        [[*range(15, 20)], ["File too large"]],
    ]


def test_a_write_is_bounded_and_gives_its_tensors_room_back(path, monkeypatch):
    monkeypatch.setattr(trace_file, "WRITE_BYTES", 5000)
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)
    monkeypatch.setattr(threading.Thread, "join", lambda self, limit_s: None)
    writes = []
    append = trace_file._Array.append

    def noted(array, texts):
        append(array, texts)
        writes.append((numbers(path), sink._put_bytes - sink._got_bytes))

    monkeypatch.setattr(trace_file._Array, "append", noted)
    sink = TraceFile(str(path))
    array = np.zeros(1000, np.int8)  # a document of 2000 bytes, which stands there twice
    tensors = (TracedTensor(INPUT, "x", "INT8", (1000,), array, True),)
    for number in range(1, 6):
        sink.take(trace(number, tensors=tensors))
    sink.close(10)
    sink._run()
    assert writes == [([1, 2], 5000), ([1, 2, 3, 4], 3000), ([1, 2, 3, 4, 5], 1000)]
    assert sink._put_bytes == sink._got_bytes


def test_what_was_there_before_is_overwritten(path):
    path.write_text("[" + "0," * 10_000 + "0]")
    sink = TraceFile(str(path))
    sink.take(trace(1))
    sink.close(10)
    assert numbers(path) == [1]


def test_without_a_trace_there_is_no_file(path):
    TraceFile(str(path)).close(10)
    assert not path.exists()


def test_each_file_holds_so_many(path):
    sink = TraceFile(str(path))
    for number in range(1, 8):
        sink.take(trace(number, frequency=3))
    sink.close(10)
    files = sorted(each.name for each in path.parent.iterdir())
    assert files == ["trace.json.0", "trace.json.1", "trace.json.2"]
    assert [numbers(path.with_name(name)) for name in files] == [[1, 2, 3], [4, 5, 6], [7]]


def test_the_frequency_may_change_on_the_way(path):
    sink = TraceFile(str(path))
    for number, frequency in enumerate((0, 0, 1, 1, 2, 2, 0), 1):
        sink.take(trace(number, frequency))
    sink.close(10)
    found = {each.name: numbers(each) for each in path.parent.iterdir()}
    assert found == {
        "trace.json": [1, 2, 7],
        "trace.json.0": [3],
        "trace.json.1": [4, 5],
        "trace.json.2": [6],
    }


def test_two_routers_write_to_two_files(path):
    first, second = TraceFile(str(path)), TraceFile(str(path))
    first.take(trace(1))
    while not path.exists():
        os.sched_yield()
    second.take(trace(2))
    second.close(10)
    first.take(trace(3))
    first.close(10)
    assert numbers(path) == [1, 3]
    assert numbers(path.with_name("trace.json.router2")) == [2]
    third = TraceFile(str(path))  # both have ended
    third.take(trace(4))
    third.close(10)
    assert numbers(path) == [4]


def test_a_router_that_was_killed_leaves_its_name_to_the_next(path):
    code = (
        "import os, sys; from pathlib import Path; from deployments.trace_file import claim\n"
        "print(claim(Path(sys.argv[1]))[0], flush=True); os.kill(os.getpid(), 9)"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=root, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(path)
    name, lock = claim(path)
    assert name == path
    assert claim(path)[0] == path.with_name("trace.json.router2")  # control: while it is held
    os.close(lock)


def test_a_place_that_cannot_be_written_is_told_of_once(tmp_path, caplog):
    sink = TraceFile(str(tmp_path / "nowhere" / "trace.json"))
    with caplog.at_level(logging.WARNING, "manta.trace"):
        for number in range(3):
            sink.take(trace(number))
        sink.close(10)
    told = [record.getMessage() for record in caplog.records]
    assert told and set(told) == {"traces cannot be written: No such file or directory"}
    assert len(told) == 1


def test_more_than_can_wait_is_left_out_and_told_of_once(path, caplog, monkeypatch):
    monkeypatch.setattr(trace_file, "MAX_WAITING", 2)
    monkeypatch.setattr(TraceFile, "_run", lambda self: None)
    sink = TraceFile(str(path))
    with caplog.at_level(logging.WARNING, "manta.trace"):
        for number in range(5):
            sink.take(trace(number))
    assert [record.getMessage() for record in caplog.records] == [
        "more traces than can be written: some are left out"
    ]
    sink.close(0.01)


def test_tensors_that_wait_are_bounded_in_bytes(path, monkeypatch):
    array = np.zeros(1000, np.int8)
    tensors = (TracedTensor(OUTPUT, "y", "INT8", (1000,), array, True),)
    monkeypatch.setattr(trace_file, "MAX_WAITING_BYTES", 2500)
    run = TraceFile._run
    monkeypatch.setattr(TraceFile, "_run", lambda self: None)
    sink = TraceFile(str(path))
    for number in range(1, 5):
        sink.take(trace(number, tensors=tensors))
    sink.take(trace(5))
    sink._waiting.put(None)
    run(sink)
    assert numbers(path) == [1, 2, 5]
    sink.take(trace(6, tensors=tensors))  # there is room again
    assert sink._waiting.qsize() == 1
