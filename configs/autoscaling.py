"""How many instances a model may have, and when it gets more or fewer: the parameter AUTOSCALING.

The same object stands in config.pbtxt, as JSON, and in the server's settings. What it means is
deployments/autoscaler.py's affair.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import ConfigError
from .model import ModelConfig

PARAMETER = "AUTOSCALING"
_FIELD = f'parameters["{PARAMETER}"]'
_MOST = 1024
_LONGEST_S = 86400
# Requests per instance that may wait where nothing is batched; Ray Serve's own default.
_TARGET = 2.0


class Autoscaling(BaseModel):
    """Bounds of `instance_group.count`, and the policy between them. `target_queued_requests` is
    per instance; None stands for a full batch."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    min_count: int = Field(1, ge=0, le=_MOST)
    max_count: int = Field(ge=1, le=_MOST)
    target_queued_requests: float | None = Field(None, gt=0)
    upscale_delay_s: float = Field(3.0, ge=0, le=_LONGEST_S)
    downscale_delay_s: float = Field(300.0, ge=0, le=_LONGEST_S)

    @model_validator(mode="after")
    def _ordered(self) -> Autoscaling:
        if self.min_count > self.max_count:
            raise ValueError(
                f"min_count {self.min_count} must not be above max_count {self.max_count}"
            )
        return self

    def bounded(self, count: int) -> int:
        return max(self.min_count, min(self.max_count, count))

    def target(self, config: ModelConfig) -> float:
        """Requests per instance that may wait."""
        if self.target_queued_requests is not None:
            return self.target_queued_requests
        batched = config.dynamic_batching is not None
        return max(_TARGET, float(config.max_batch_size)) if batched else _TARGET


def parse(text: str) -> Autoscaling:
    """Raises ValueError with a reason that names the field."""
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"failed to parse as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError('must be a JSON object such as {"min_count": 1, "max_count": 4}')
    try:
        return Autoscaling(**value)
    except ValidationError as error:
        raise ValueError(reason(error)) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} is given twice")
        found[name] = value
    return found


def reason(error: ValidationError) -> str:
    """What is wrong, by the field's name: one that is not known, or the first."""
    found = error.errors()
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        known = ", ".join(Autoscaling.model_fields)
        return f"unknown field '{place}'; there are {known}"
    text = first["msg"].removeprefix("Value error, ")
    return f"{place}: {text}" if place else text


def check(scaling: Autoscaling, config: ModelConfig, sharing: bool, by_server: bool) -> None:
    """Raises ConfigError where the model's groups cannot be scaled so.

    `by_server`: it stands in the server's settings and not in config.pbtxt.
    """
    active = [group for group in config.instance_group if not group.passive]
    if sharing:
        text = (
            "with ENABLE_WEIGHT_SHARING all instances of a device live in one process, whose "
            "number of instances is fixed; leave one of the two out"
        )
    elif config.instance_group and len(active) != 1:
        text = (
            f"needs exactly one instance group that takes requests, and there are {len(active)}: "
            "their queue is one, and nothing says which of them is to grow"
        )
    elif active and scaling.bounded(max(1, active[0].count)) != max(1, active[0].count):
        text = (
            f"count {max(1, active[0].count)} of its instance group is where it begins, and must "
            f"lie in {scaling.min_count} to {scaling.max_count}"
        )
    else:
        return
    if by_server:
        raise ConfigError(f"autoscaling in the server's settings: {text}")
    raise ConfigError(f"{PARAMETER}: {text}", field=_FIELD)


def unscaled(config: ModelConfig) -> ModelConfig:
    """What makes an instance what it is: without how many there are, and of other versions."""
    parameters = {key: text for key, text in config.parameters.items() if key != PARAMETER}
    free = {"version_policy": None, "instance_group": (), "parameters": parameters}
    return config.model_copy(update=free)
