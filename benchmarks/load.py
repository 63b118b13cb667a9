"""Closed-loop load on one endpoint: every connection sends, waits, and sends again.

Owns `h2load` (HTTP/1.1 keep-alive, gRPC over cleartext HTTP/2) and, for the server whose status
line h2load refuses, `wrk`. Knows nothing of the servers. Called by `matrix.py`.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.wire import Request

PACKAGES = {"h2load": "nghttp2-client", "wrk": "wrk"}
MARGIN_S = 60.0
_COUNTS = re.compile(
    r"requests: \d+ total, \d+ started, (\d+) done, (\d+) succeeded,"
    r" (\d+) failed, (\d+) errored, (\d+) timeout"
)
_DATA = re.compile(r"traffic: .*\((\d+)\) data$", re.MULTILINE)


class LoadError(Exception):
    """The generator did not give a usable result."""


@dataclass(frozen=True, slots=True)
class Timing:
    warm_up_s: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Load:
    """What one run gave, without its warm-up; `total` is with it. Latencies in microseconds."""

    requests: int
    failed: int
    seconds: float
    total: int
    mean_us: float
    p50_us: float
    p99_us: float

    @property
    def throughput(self) -> float:
        return self.requests / self.seconds


def missing() -> str | None:
    """What to install before anything can be measured."""
    if shutil.which("h2load"):
        return None
    return f"h2load is missing: apt-get install {PACKAGES['h2load']}"


def run(
    generator: str,
    port: int,
    request: Request,
    connections: int,
    timing: Timing,
    answer_bytes: int = 0,
) -> Load:
    """Loads 127.0.0.1:`port`. `answer_bytes`: size of one right answer (gRPC: with its
    prefix) where all are of one size, else 0."""
    if not shutil.which(generator):
        raise LoadError(f"{generator} is missing: apt-get install {PACKAGES[generator]}")
    with tempfile.TemporaryDirectory(prefix="bench.") as temporary:
        if generator == "wrk":
            return _run_wrk(Path(temporary), port, request, connections, timing)
        return _run_h2load(Path(temporary), port, request, connections, timing, answer_bytes)


def _execute(command: list[str], limit_s: float) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    if done.returncode != 0:
        end = (done.stdout + done.stderr)[-500:]
        raise LoadError(f"{command[0]} ended with {done.returncode}: {end}")
    return done.stdout


# --- h2load --------------------------------------------------------------------------------------


def _run_h2load(
    folder: Path,
    port: int,
    request: Request,
    connections: int,
    timing: Timing,
    answer_bytes: int,
) -> Load:
    body, log = folder / "body", folder / "log"
    body.write_bytes(request.body)
    whole_s = timing.seconds + timing.warm_up_s
    command = ["h2load", f"--clients={connections}", "--threads=1", f"--data={body}"]
    command += [f"--duration={round(whole_s * 1e3)}ms", f"--log-file={log}"]
    command += ["--h1"] if request.protocol == "http" else ["--max-concurrent-streams=1"]
    command += [f"--header={name}: {value}" for name, value in request.headers]
    command += [f"http://127.0.0.1:{port}{request.path}"]
    try:
        output = _execute(command, whole_s + MARGIN_S)
    except subprocess.TimeoutExpired as error:
        raise LoadError("h2load did not end") from error
    if not log.is_file():
        raise LoadError(f"h2load wrote no log: {output[-500:]}")
    broken = read_output(output, answer_bytes)
    return read_log(log.read_text(), timing.warm_up_s, broken)


def read_output(text: str, answer_bytes: int) -> int:
    """Failures that the log does not show, from what h2load prints.

    Broken connections, and with `answer_bytes` also answers that lack bytes: a gRPC error has
    HTTP status 200 too, and only the size of its data tells it from a right answer.
    """
    counts = _COUNTS.search(text)
    data = _DATA.search(text)
    if counts is None or data is None:
        raise LoadError(f"h2load printed no counts: {text[-500:]}")
    done, _, _, errored, timeout = (int(group) for group in counts.groups())
    empty = done - int(data.group(1)) // answer_bytes if answer_bytes else 0
    return errored + timeout + max(0, empty)


def read_log(text: str, warm_up_s: float, broken: int = 0) -> Load:
    """h2load's log: start in us since the epoch, status, us until the end of the response.

    The window opens at the last response of the warm-up and closes at the last of all: with both
    ends on a response, slow batches count whole.
    """
    rows = [line.split("\t") for line in text.splitlines() if line]
    if not rows:
        raise LoadError("no request was answered")
    table = np.array([[int(cell) for cell in row[:3]] for row in rows], np.int64)
    ends = table[:, 0] + table[:, 2]
    cut = table[:, 0].min() + int(warm_up_s * 1e6)
    warm = ends <= cut
    begin = int(ends[warm].max()) if warm.any() else int(cut)
    good = ~warm & (table[:, 1] == 200)
    if not good.any():
        raise LoadError(f"no request succeeded after the warm-up; {int((~warm).sum())} failed")
    took = table[good, 2]
    return Load(
        requests=int(good.sum()),
        failed=int((table[:, 1] != 200).sum()) + broken,
        seconds=max(1, int(ends[~warm].max()) - begin) / 1e6,
        total=len(rows),
        mean_us=float(took.mean()),
        p50_us=float(np.percentile(took, 50)),
        p99_us=float(np.percentile(took, 99)),
    )


# --- wrk -----------------------------------------------------------------------------------------

_SCRIPT = """\
local file = io.open({body}, "rb")
wrk.method, wrk.body = "POST", file:read("*a")
file:close()
{headers}
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    'BENCH {{"requests":%d,"status":%d,"broken":%d,"us":%d,"mean":%f,"p50":%f,"p99":%f}}\\n',
    summary.requests, e.status, e.connect + e.read + e.write + e.timeout, summary.duration,
    latency.mean, latency:percentile(50), latency:percentile(99)))
end
"""


def wrk_script(body: Path, request: Request) -> str:
    lines = [
        f"wrk.headers[{json.dumps(name)}] = {json.dumps(value)}" for name, value in request.headers
    ]
    return _SCRIPT.format(body=json.dumps(str(body)), headers="\n".join(lines))


def _run_wrk(folder: Path, port: int, request: Request, connections: int, timing: Timing) -> Load:
    """wrk has no warm-up: a run of its own goes before. It takes whole seconds."""
    if request.protocol != "http":
        raise LoadError("wrk speaks HTTP/1.1 only")
    body, script = folder / "body", folder / "script.lua"
    body.write_bytes(request.body)
    script.write_text(wrk_script(body, request))
    url = f"http://127.0.0.1:{port}{request.path}"
    lengths = (max(1, round(timing.warm_up_s)), max(1, round(timing.seconds)))
    outputs = []
    for seconds in lengths:
        command = ["wrk", "--threads=1", f"--connections={connections}", "--timeout=60s"]
        command += [f"--duration={seconds}s", f"--script={script}", url]
        outputs.append(_execute(command, seconds + MARGIN_S))
    warm_up, result = (read_wrk(output) for output in outputs)
    return Load(
        requests=result.requests,
        failed=warm_up.failed + result.failed,
        seconds=result.seconds,
        total=warm_up.total + result.total,
        mean_us=result.mean_us,
        p50_us=result.p50_us,
        p99_us=result.p99_us,
    )


def read_wrk(text: str) -> Load:
    """The line that our script writes. wrk counts answers of any status; ours are the good ones."""
    found = next((line[6:] for line in text.splitlines() if line.startswith("BENCH ")), None)
    if found is None:
        raise LoadError(f"wrk gave no summary: {text[-500:]}")
    values = json.loads(found)
    good = values["requests"] - values["status"]
    if good <= 0:
        raise LoadError(f"no request succeeded; {values['status']} with another status")
    return Load(
        requests=good,
        failed=values["status"] + values["broken"],
        seconds=values["us"] / 1e6,
        total=values["requests"],
        mean_us=values["mean"],
        p50_us=values["p50"],
        p99_us=values["p99"],
    )
