"""pb_utils.ModelConfig: what a model's auto_complete_config may add to its configuration.

What the user wrote wins: a contradiction raises ValueError, which fails the load. Plain dicts in
the form of the official proto's JSON; models call it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping
from typing import Any

_INPUT = ("name", "data_type", "dims", "optional")
_OUTPUT = ("name", "data_type", "dims")


class ModelConfig:
    def __init__(self, model_config: str) -> None:
        """`model_config` is JSON."""
        self._config: dict[str, Any] = json.loads(model_config)
        self._name = self._config.get("name", "")

    def as_dict(self) -> dict[str, Any]:
        """A copy: what it becomes is said by the setters."""
        return copy.deepcopy(self._config)

    def set_max_batch_size(self, max_batch_size: int) -> None:
        """The largest that the model takes: what is configured stays, if it is no larger.

        Triton's would replace a smaller one.
        """
        given = self._config.get("max_batch_size", 0)
        if given > max_batch_size:
            raise ValueError(
                f"the configuration of model '{self._name}' has max_batch_size {given}, and its "
                f"auto_complete_config sets {max_batch_size}"
            )
        self._config["max_batch_size"] = given or max_batch_size

    def set_dynamic_batching(self) -> None:
        """Requests are merged, in the way that the configuration says where it says one."""
        for other in ("sequence_batching", "ensemble_scheduling"):
            if other in self._config:
                raise ValueError(
                    f"the configuration of model '{self._name}' has {other}, and its "
                    "auto_complete_config sets dynamic_batching"
                )
        self._config.setdefault("dynamic_batching", {})

    def set_model_transaction_policy(self, transaction_policy_dict: Mapping[str, Any]) -> None:
        """`decoupled` false is all that is supported."""
        unknown = [key for key in transaction_policy_dict if key != "decoupled"]
        if unknown:
            raise ValueError(
                f"auto_complete_config of model '{self._name}' sets {unknown[0]!r} of the "
                "transaction policy, which has only 'decoupled'"
            )
        if transaction_policy_dict.get("decoupled"):
            raise ValueError(
                f"auto_complete_config of model '{self._name}' makes it decoupled: decoupled "
                "models are not supported"
            )

    def add_input(self, input: Mapping[str, Any]) -> None:
        """Keys `name`, `data_type`, `dims`, and `optional` if it is."""
        self._add("input", input, _INPUT)

    def add_output(self, output: Mapping[str, Any]) -> None:
        """Keys `name`, `data_type`, `dims`."""
        self._add("output", output, _OUTPUT)

    def _add(self, kind: str, given: Mapping[str, Any], known: Collection[str]) -> None:
        where = f"auto_complete_config of model '{self._name}'"
        for key in ("name", "data_type", "dims"):
            if key not in given:
                name = f" '{given['name']}'" if "name" in given else ""
                raise ValueError(f"{where}: {kind}{name} lacks '{key}'")
        unknown = [key for key in given if key not in known]
        if unknown:
            raise ValueError(
                f"{where}: {kind} '{given['name']}' has {unknown[0]!r}, and may have only "
                + ", ".join(f"'{key}'" for key in known)
            )
        new = {**given, "dims": [int(size) for size in given["dims"]]}
        listed = self._config.setdefault(kind, [])
        for one in listed:
            if one.get("name") == new["name"]:
                self._merge(kind, one, new)
                return
        listed.append(new)

    def _merge(self, kind: str, one: dict[str, Any], new: Mapping[str, Any]) -> None:
        said = {
            "data_type": one.get("data_type", "TYPE_INVALID") != "TYPE_INVALID",
            "dims": bool(one.get("dims")),
            "optional": bool(one.get("optional")),
        }
        for key, is_said in said.items():
            if key in new and is_said and one[key] != new[key]:
                raise ValueError(
                    f"{kind} '{new['name']}' of model '{self._name}' has {key} {one[key]} in the "
                    f"configuration, and its auto_complete_config says {new[key]}"
                )
        one.update(new)
