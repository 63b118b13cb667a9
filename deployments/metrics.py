"""The metrics page: Triton's names, labels and text form, and histograms of our own.

Owns the tables of families. Reads what the Aggregator has summed; counts nothing. Called by the
Controller; what a Router adds about its machine is `gauges`. Labels are of what is loaded, so their
number is bounded by the repository and not by what clients ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

from configs.metrics import MetricsConfig

from . import buckets, windows
from .aggregate import LoadedVersion
from .statistics import reasons


class Sample(NamedTuple):
    """One line: `last` is a label that stands behind the sorted ones, as Prometheus writes it."""

    value: int | float
    labels: Mapping[str, str] = {}
    suffix: str = ""
    last: tuple[str, str] | None = None


Samples = Callable[[LoadedVersion], Iterable[Sample]]


class Family(NamedTuple):
    """One metric: `samples` gives the values for one loaded version."""

    name: str
    kind: str
    help: str
    samples: Samples


def _one(value: Callable[[LoadedVersion], int | float]) -> Samples:
    return lambda version: [Sample(value(version))]


_COUNTS = (
    Family(
        "nv_inference_request_success",
        "counter",
        "Number of successful inference requests, all batch sizes",
        _one(lambda v: v.totals.success),
    ),
    Family(
        "nv_inference_request_failure",
        "counter",
        "Number of failed inference requests, all batch sizes",
        lambda v: [Sample(count, {"reason": reason}) for reason, count in reasons(v.totals)],
    ),
    Family(
        "nv_inference_count",
        "counter",
        "Number of inferences performed (does not include cached requests)",
        _one(lambda v: v.totals.inference_count),
    ),
    Family(
        "nv_inference_exec_count",
        "counter",
        "Number of model executions performed (does not include cached requests)",
        _one(lambda v: v.totals.execution_count),
    ),
)
# Under `counter_latencies`.
_DURATIONS = (
    Family(
        "nv_inference_request_duration_us",
        "counter",
        "Cumulative inference request duration in microseconds (includes cached requests)",
        _one(lambda v: v.totals.success_ns // 1000),
    ),
    Family(
        "nv_inference_queue_duration_us",
        "counter",
        "Cumulative inference queuing duration in microseconds (includes cached requests)",
        _one(lambda v: v.totals.queue_ns // 1000),
    ),
    Family(
        "nv_inference_compute_input_duration_us",
        "counter",
        "Cumulative compute input duration in microseconds (does not include cached requests)",
        _one(lambda v: v.totals.input_ns // 1000),
    ),
    Family(
        "nv_inference_compute_infer_duration_us",
        "counter",
        "Cumulative compute inference duration in microseconds (does not include cached requests)",
        _one(lambda v: v.totals.infer_ns // 1000),
    ),
    Family(
        "nv_inference_compute_output_duration_us",
        "counter",
        "Cumulative inference compute output duration in microseconds "
        "(does not include cached requests)",
        _one(lambda v: v.totals.output_ns // 1000),
    ),
)
_GAUGES = (
    Family(
        "nv_inference_pending_request_count",
        "gauge",
        "Instantaneous number of pending requests awaiting execution per-model",
        _one(lambda v: v.pending),
    ),
    Family(
        "nv_model_load_duration_secs",
        "gauge",
        "Model load time in seconds",
        _one(lambda v: v.load_s),
    ),
)
# Our own, of what `scaling` does.
_REPLICAS = (
    Family(
        "manta_replicas_wanted",
        "gauge",
        "Replicas that a model version should have now",
        _one(lambda v: v.replicas_wanted),
    ),
    Family(
        "manta_replicas_running",
        "gauge",
        "Replicas of a model version that are loaded and healthy",
        _one(lambda v: v.replicas_running),
    ),
)
# Under `histogram_latencies`: no series, since only decoupled models have any.
_FIRST_RESPONSE = Family(
    "nv_inference_first_response_histogram_ms",
    "histogram",
    "Duration from request to first response in milliseconds",
    lambda v: (),
)


# --- histograms of our own -----------------------------------------------------------------------


def _histogram(
    bounds: Sequence[float], counts: Sequence[int], total: int | float
) -> Iterator[Sample]:
    """Cumulative, as Prometheus has them."""
    for bound, count in zip((*map(_number, bounds), "+Inf"), accumulate(counts), strict=True):
        yield Sample(count, suffix="_bucket", last=("le", bound))
    yield Sample(total, suffix="_sum")
    yield Sample(sum(counts), suffix="_count")


def _compute_s(version: LoadedVersion) -> float:
    sizes = version.totals.batches.values()
    return sum(one.input_ns + one.infer_ns + one.output_ns for one in sizes) / 1e9


def _batch_sizes(version: LoadedVersion) -> Iterator[Sample]:
    executions = {size: one.executions for size, one in version.totals.batches.items()}
    rows = sum(size * count for size, count in executions.items())
    return _histogram(buckets.ROWS, buckets.by_rows(executions), rows)


_HISTOGRAMS = (
    Family(
        "manta_request_duration_seconds",
        "histogram",
        "Duration of successful inference requests, from the queue's door to the answer",
        lambda v: _histogram(buckets.SECONDS, v.totals.request_buckets, v.totals.success_ns / 1e9),
    ),
    Family(
        "manta_queue_duration_seconds",
        "histogram",
        "Time that successful inference requests have waited for their batch to start",
        lambda v: _histogram(buckets.SECONDS, v.totals.queue_buckets, v.totals.queue_ns / 1e9),
    ),
    Family(
        "manta_compute_duration_seconds",
        "histogram",
        "Duration of model executions, with their inputs and outputs",
        lambda v: _histogram(buckets.SECONDS, v.totals.compute_buckets, _compute_s(v)),
    ),
    Family(
        "manta_batch_size",
        "histogram",
        "Batch items of model executions",
        _batch_sizes,
    ),
)
FAMILIES = (*_COUNTS, *_DURATIONS, *_GAUGES, *_REPLICAS, *_HISTOGRAMS)


# --- summaries -----------------------------------------------------------------------------------

# Name, help, field of Totals that is the sum; in the order of `Counters.windows`.
_SUMMARIES = (
    (
        "nv_inference_request_summary_us",
        "Summary of inference request duration in microseconds (includes cached requests)",
        "success_ns",
    ),
    (
        "nv_inference_queue_summary_us",
        "Summary of inference queuing duration in microseconds (includes cached requests)",
        "queue_ns",
    ),
    (
        "nv_inference_compute_input_summary_us",
        "Summary of compute input duration in microseconds (does not include cached requests)",
        "input_ns",
    ),
    (
        "nv_inference_compute_infer_summary_us",
        "Summary of compute inference duration in microseconds (does not include cached requests)",
        "infer_ns",
    ),
    (
        "nv_inference_compute_output_summary_us",
        "Summary of inference compute output duration in microseconds "
        "(does not include cached requests)",
        "output_ns",
    ),
)


def _summary(
    index: int, sum_field: str, wanted: Sequence[float], version: LoadedVersion
) -> Iterator[Sample]:
    """Count and sum since the load, quantiles of the last minute over all Routers."""
    yield Sample(version.totals.success, suffix="_count")
    yield Sample(getattr(version.totals, sum_field) // 1000, suffix="_sum")
    counts = version.recent[index] if version.recent else {}
    for quantile, value in zip(wanted, windows.quantiles(counts, wanted), strict=True):
        yield Sample(value, last=("quantile", _number(quantile)))


def families(config: MetricsConfig) -> Iterator[Family]:
    """What the page has, in its order."""
    yield from _COUNTS
    if config.counter_latencies:
        yield from _DURATIONS
    if config.summary_latencies:
        for index, (name, text, sum_field) in enumerate(_SUMMARIES):
            samples = partial(_summary, index, sum_field, config.summary_quantiles)
            yield Family(name, "summary", text, samples)
    if config.histogram_latencies:
        yield _FIRST_RESPONSE
    yield from _GAUGES
    yield from _REPLICAS
    yield from _HISTOGRAMS


# --- text ----------------------------------------------------------------------------------------


def render(loaded: Iterable[LoadedVersion], config: MetricsConfig | None = None) -> str:
    """The page for `Aggregator.loaded()`."""
    versions = [(_place(version), version) for version in loaded]
    lines: list[str] = []
    for family in families(config or MetricsConfig()):
        lines += head(family.name, family.kind, family.help)
        for place, version in versions:
            for value, extra, suffix, last in family.samples(version):
                labels = {**place, **extra} if extra else place
                lines.append(line(family.name + suffix, labels, value, last))
    return "\n".join(lines) + "\n"


def _place(version: LoadedVersion) -> dict[str, str]:
    tags = {f"_{key}": value for key, value in version.tags.items()}
    return {**tags, "model": version.key.model, "version": version.key.version}


def head(name: str, kind: str, text: str) -> tuple[str, str]:
    """The two lines that stand before the samples of a family."""
    return f"# HELP {name} {text}", f"# TYPE {name} {kind}"


def line(
    name: str,
    labels: Mapping[str, str],
    value: int | float,
    last: tuple[str, str] | None = None,
) -> str:
    pairs = [*sorted(labels.items()), *([last] if last else [])]
    inside = ",".join(f'{label}="{_escape(text)}"' for label, text in pairs)
    return f"{name}{{{inside}}} {_number(value)}" if pairs else f"{name} {_number(value)}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: int | float) -> str:
    if value != value:
        return "NaN"
    return str(int(value)) if value == int(value) else repr(value)
