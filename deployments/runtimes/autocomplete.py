"""Completes a configuration from the model that it is for, before that is loaded for good.

One door for all kinds; what a kind can tell is its runtime's to find out, how it is merged with
what the user wrote is configs/offer.py. Called by replicas and by `manta config`.
"""

from __future__ import annotations

from pathlib import Path

from configs.complete import finish, runtime_kind
from configs.model import ModelConfig
from configs.parameters import ModelParameters


def complete(
    artifact: Path, config: ModelConfig, parameters: ModelParameters, device: str, kind: str
) -> ModelConfig:
    """The configuration to load `artifact` with; raises ConfigError for what is still missing or
    contradicts the model. Called for every model unless auto-complete is switched off; a kind that
    has nothing to add to a complete configuration does not touch the artifact."""
    del parameters, device, kind
    return finish(config, runtime_kind(config, (artifact.name,)))
