"""Completes a configuration from the model that it is for, before that is loaded for good.

One door for all kinds; what a kind can tell is its runtime's to find out, how it is merged with
what the user wrote is configs/offer.py. Called by replicas and by `manta config`.
"""

from __future__ import annotations

import logging
from pathlib import Path

from configs.checks import lacks
from configs.complete import finish, runtime_kind
from configs.model import ModelConfig, ModelInput, ModelOutput
from configs.offer import Offer, fill
from configs.parameters import ModelParameters

from . import settings

logger = logging.getLogger("manta.runtimes")


def complete(
    artifact: Path, config: ModelConfig, parameters: ModelParameters, device: str, kind: str
) -> ModelConfig:
    """The configuration to load `artifact` with; raises ConfigError for what is still missing or
    contradicts the model. Called for every model unless auto-complete is switched off; a kind that
    has nothing to add to a complete configuration does not touch the artifact."""
    chosen = runtime_kind(config, (artifact.name,))
    if chosen == "python":
        return finish(_from_python(artifact, config), chosen)
    offer = None
    if lacks(config) or config.open_batch:
        # A run on a sample may start torch's pools, which take their size once.
        settings.apply_process(parameters, chosen)
        offer = _offer(artifact, config, device, kind)
    made = finish(config, chosen) if offer is None else fill(config, chosen, offer)
    if offer is not None:
        inputs, outputs = (", ".join(map(_told, each)) for each in (made.input, made.output))
        logger.info(
            "configuration completed from the model: max_batch_size %d, inputs %s, outputs %s",
            made.max_batch_size,
            inputs,
            outputs,
        )
    return made


def _told(tensor: ModelInput | ModelOutput) -> str:
    return f"{tensor.name} {tensor.data_type.removeprefix('TYPE_')} {list(tensor.dims)}"


def _offer(artifact: Path, config: ModelConfig, device: str, kind: str) -> Offer | None:
    """None for a kind that tells nothing."""
    match runtime_kind(config, (artifact.name,)):
        case "aoti":
            from . import aoti

            return aoti.offer(artifact, config, device, kind)
        case "torchscript" if lacks(config):
            from . import sampling

            return sampling.offer(artifact, config, device, kind)
        case "exported":
            from . import exported, place

            return exported.describe(artifact, place(artifact, config))[1]
    return None


def _from_python(artifact: Path, config: ModelConfig) -> ModelConfig:
    """By the model's own auto_complete_config, which is called whatever the configuration says."""
    from . import python_model

    return python_model.completed(artifact, config) if python_model.completes(artifact) else config
