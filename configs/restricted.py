"""Groups of Triton's APIs that want a header, as users write them: `API[,API...]:KEY=VALUE`.

Owns the names of the APIs and this form, and keeps VALUE out of every text. Which API an operation
belongs to is `deployments/restricted`'s. Called by `server`.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, SecretStr

APIS = (
    "health",
    "metadata",
    "inference",
    "shared-memory",
    "model-config",
    "model-repository",
    "statistics",
    "trace",
    "logging",
)
_KEY = re.compile(r"[A-Za-z0-9_.-]+")
# Whatever else stands in a header is changed on its way, so that it could never match.
_VALUE = re.compile(r"[!-~](?:[ -~]*[!-~])?")


class RestrictedGroup(BaseModel):
    """APIs that are open only to who sends `value` in the header that `key` names."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    apis: tuple[str, ...]
    key: str
    value: SecretStr


def read_groups(given: Any, metadata: bool) -> Any:
    """Groups that agree with each other; `metadata`: their keys become names of gRPC's metadata.

    What is no list is left to pydantic. Raises ValueError, which repeats nothing that may be a
    value at a wrong place.
    """
    if not isinstance(given, (list, tuple)):
        return given
    groups = tuple(
        _read(each) if isinstance(each, str) else RestrictedGroup.model_validate(each)
        for each in given
    )
    _check(groups, metadata)
    return groups


def _read(text: str) -> RestrictedGroup:
    apis, colon, rest = text.partition(":")
    key, equals, value = rest.partition("=")
    if not (colon and equals):
        raise ValueError("a restricted group has the form API[,API...]:KEY=VALUE")
    names = tuple(name.strip() for name in apis.split(","))
    return RestrictedGroup(apis=names, key=key.strip(), value=SecretStr(value))


def _check(groups: tuple[RestrictedGroup, ...], metadata: bool) -> None:
    seen: set[str] = set()
    for group in groups:
        for api in group.apis:
            if api not in APIS:
                raise ValueError(f"unknown API in a restricted group; there are {', '.join(APIS)}")
            if api in seen:
                raise ValueError(f"API '{api}' is restricted twice")
            seen.add(api)
        if not _KEY.fullmatch(group.key) or (metadata and group.key.lower().endswith("-bin")):
            raise ValueError("a restricted group has a key that cannot be a header's name")
        if not _VALUE.fullmatch(group.value.get_secret_value()):
            raise ValueError(
                f"the value for key '{group.key}' must be printable ASCII without outer spaces"
            )
