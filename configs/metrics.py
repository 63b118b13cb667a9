"""What users may say of metrics: `--metrics-config` as tritonserver takes it, and `metric_tags`.

Owns the form of both. The settings and the checks of a configuration call it; `metrics` and
`aggregate` of deployments/ act on it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from .errors import ConfigError
from .model import ModelConfig

DEFAULT_QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)
MAX_QUANTILES = 32
_SWITCHES = ("counter_latencies", "histogram_latencies", "summary_latencies")
_VALUES = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True, slots=True)
class MetricsConfig:
    """`histogram_latencies` is about first responses of decoupled models."""

    counter_latencies: bool = True
    histogram_latencies: bool = False
    summary_latencies: bool = False
    summary_quantiles: tuple[float, ...] = DEFAULT_QUANTILES


def parse(entries: Iterable[str]) -> MetricsConfig:
    """Of two entries for one key the later counts. Raises ValueError, which names the entry."""
    config = MetricsConfig()
    for entry in entries:
        key, _, value = entry.partition("=")
        if key in _SWITCHES:
            if value.lower() not in _VALUES:
                raise ValueError(f"metrics_config: {key} is true or false, not '{value}'")
            given: dict[str, Any] = {key: _VALUES[value.lower()]}
            config = replace(config, **given)
        elif key == "summary_quantiles":
            config = replace(config, summary_quantiles=_quantiles(value))
        else:
            known = ", ".join((*_SWITCHES, "summary_quantiles"))
            raise ValueError(f"metrics_config: unknown '{entry}'; there are {known}")
    return config


def _quantiles(text: str) -> tuple[float, ...]:
    """`0.5:0.05,0.9:0.01`: a quantile, and the error that is allowed in its rank. Ours is one of
    value, see `deployments/windows.py`; so the error is checked and has no other use."""
    found = []
    for pair in text.split(","):
        quantile, colon, error = pair.partition(":")
        try:
            numbers = (float(quantile), float(error))
        except ValueError:
            numbers = (-1.0, -1.0)
        if not colon or not all(0 <= number <= 1 for number in numbers):
            raise ValueError(
                f"metrics_config: summary_quantiles are pairs like 0.99:0.001, not '{pair}'"
            )
        found.append(numbers[0])
    if len(found) > MAX_QUANTILES:
        raise ValueError(f"metrics_config: more than {MAX_QUANTILES} summary_quantiles")
    return tuple(found)


def check_tags(config: ModelConfig) -> None:
    """A tag `site` becomes the label `_site` of the version's series."""
    for key in config.metric_tags:
        if not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_]{0,63}", key):
            raise ConfigError(
                f"'{key[:64]}' cannot be a label: it begins with a letter or digit, and has only "
                "these and underscores",
                field=f'metric_tags["{key[:64]}"]',
            )
