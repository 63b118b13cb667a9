"""The metrics page: Triton's names, labels and text form.

Owns the one table of families. Reads what the Aggregator has summed; counts nothing. Called by the
Controller for the Routers' metrics port. Labels are model and version of what is loaded, so their
number is bounded by the repository and not by what clients ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeAlias

from .statistics import LoadedVersion, reasons

Sample: TypeAlias = tuple[Mapping[str, str], int | float]


class Family(NamedTuple):
    """One metric: `samples` gives extra labels and the value for one loaded version."""

    name: str
    kind: str
    help: str
    samples: Callable[[LoadedVersion], Iterable[Sample]]


def _one(value: Callable[[LoadedVersion], int | float]) -> Callable[[LoadedVersion], list[Sample]]:
    return lambda version: [({}, value(version))]


FAMILIES: tuple[Family, ...] = (
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
        lambda v: [({"reason": reason}, count) for reason, count in reasons(v.totals)],
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


def render(loaded: Iterable[LoadedVersion]) -> str:
    """The page for `Aggregator.loaded()`."""
    versions = tuple(loaded)
    lines = []
    for family in FAMILIES:
        lines.append(f"# HELP {family.name} {family.help}")
        lines.append(f"# TYPE {family.name} {family.kind}")
        for version in versions:
            place = {"model": version.key.model, "version": version.key.version}
            for extra, value in family.samples(version):
                lines.append(f"{family.name}{_labels({**place, **extra})} {_number(value)}")
    return "\n".join(lines) + "\n"


def _labels(labels: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{name}="{_escape(labels[name])}"' for name in sorted(labels)) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: int | float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
