"""A configuration that a load request gives as JSON, in place of config.pbtxt.

Fields, enum values and their types are protobuf's own; what a configuration must be is the same as
for the file. Called by deployments/repository.py.
"""

from __future__ import annotations

import json
from typing import Any

from google.protobuf import json_format
from tritonclient.grpc import model_config_pb2 as pb

from . import pbtxt
from .errors import ConfigError
from .model import ModelConfig

PLACE = "config"  # what errors call it: the name of the request's parameter

_REASON_LENGTH = 500
_MAX_BATCH_SIZE = {"max_batch_size", "maxBatchSize"}


def parse(text: str, directory_name: str, partial: bool = False) -> ModelConfig:
    """Raises ConfigError for what is no ModelConfig, and for what `pbtxt.parse` refuses.

    `partial`: tensors and max_batch_size may be missing, for the model to complete.
    """
    proto = pb.ModelConfig()
    try:
        fields = _object(text)
        json_format.ParseDict(fields, proto)
        open_batch = partial and not _MAX_BATCH_SIZE & fields.keys()
        # Also in here: JSON may give an enum any number.
        config, errors = pbtxt.examine_proto(proto, directory_name, partial, open_batch)
    except RecursionError:
        raise ConfigError("the JSON is nested too deeply", file=PLACE) from None
    except (json_format.ParseError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(str(error)[:_REASON_LENGTH], file=PLACE) from None
    for wrong in errors:
        raise wrong.located(PLACE)
    return config


def _object(text: str) -> dict[str, Any]:
    fields = json.loads(text)
    if not isinstance(fields, dict):
        raise ValueError("it is not a JSON object")
    return fields
