"""What the protocol says of requests made from the document: bodies that are right, statuses that
are known beforehand, and what is taken although the document has it otherwise.

Of the shared server's models. Used by `test_fuzz_openapi.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tests.serve.verdict import Asked, Tolerated

GOOD = {
    "inputs": [{"name": "INPUT__0", "datatype": "FP32", "shape": [1, 8], "data": [0.5] * 8}],
}
LOADED = ("mlp", "strings")
# The first of each is there, and so is the second model; "nobody" and version 2 are not.
VALUES = {"model": (*LOADED, "nobody"), "version": ("1", "2"), "region": ("fuzzed",)}
INT32_MAX = 2**31 - 1
_LOG = ("log_info", "log_warning", "log_error", "log_verbose_level", "log_format")
_TRACE = ("trace_level", "trace_rate", "trace_count", "log_frequency")
_FIXED_TRACE = ("trace_file", "trace_mode")
_NOT_THERE = (400, 404)

# --- bodies --------------------------------------------------------------------------------------

# Operations with a body that no body is right for.
NO_RIGHT_BODY = {
    "/v2/cudasharedmemory/register": "CUDA's regions are refused before the body is read",
    "/v2/cudasharedmemory/region/{region}/register": "the same",
}


def right_bodies(region: str) -> dict[str, tuple[Any, Sequence[int]]]:
    """Of `mlp`, of the region `fuzzed` and of the key of memory that is there. A model that is
    loaded or unloaded is always "nobody". Infer calls by model have examples in the document."""
    register = {"key": region, "byte_size": 64}
    found: dict[str, tuple[Any, Sequence[int]]] = {
        "/v2/systemsharedmemory/region/{region}/register": (register, (200, 400)),  # it is there
        "/v2/systemsharedmemory/register": (register, (400,)),  # without a name
        "/v2/repository/index": ({"ready": True}, (200,)),
        "/v2/repository/models/{model}/load": ({"parameters": {}}, (500,)),
        "/v2/repository/models/{model}/unload": (
            {"parameters": {"unload_dependents": False}},
            (200,),
        ),
        "/v2/logging": ({"log_verbose_level": 0}, (200,)),
        "/v2/trace/setting": ({"trace_rate": "5"}, (200,)),
        "/v2/models/{model}/trace/setting": ({"trace_rate": "5"}, (200,)),
    }
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        found[f"{model}/infer"] = (GOOD, (200,))
        for generate in ("generate", "generate_stream"):
            found[f"{model}/{generate}"] = ({"INPUT__0": [0.5] * 8}, (200,))
    return found


# --- what is taken nevertheless ------------------------------------------------------------------


def _without(*names: str) -> Callable[[Any], Any]:
    return lambda body: {key: value for key, value in body.items() if key not in names}


TOLERATED = (
    Tolerated(
        "§1.13: raw_handle and device_id are of CUDA's regions, and not read here",
        re.compile("/v2/systemsharedmemory/.*"),
        _without("raw_handle", "device_id"),
    ),
    Tolerated(
        "§5.4: POST changes some of the settings; those with null are none of them",
        re.compile("/v2/logging"),
        lambda body: {key: value for key, value in body.items() if value is not None},
    ),
)

# --- statuses ------------------------------------------------------------------------------------


def expected(asked: Asked) -> Sequence[int] | None:
    """The statuses that answer a request which fits the document, where they are known. HEAD is
    GET without its body, but for metrics (§1.1: other verbs 405)."""
    if asked.method == "HEAD":
        return (405,) if asked.path == "/metrics" else expected(replace(asked, method="GET"))
    model = asked.values.get("model")
    if asked.path.startswith("/v2/repository/{repository}"):
        return (501,) if not _odd(asked.values) else (404, 501)
    if "sharedmemory" in asked.path:
        return _of_memory(asked)
    if model is None:
        return _of_all(asked)
    if asked.path.startswith("/v2/repository/"):
        return _of_repository(asked)
    if model not in LOADED:
        return _of_nobody(asked)
    if "version" in asked.values and asked.values["version"] not in VALUES["version"]:
        return None  # 01 is 1
    return _of_loaded(asked)


def _odd(values: Mapping[str, Any]) -> bool:
    """Whether a value can lead to another path."""
    return any(not re.fullmatch(r"[\w-]+", str(value), re.ASCII) for value in values.values())


def _of_all(asked: Asked) -> Sequence[int] | None:
    if asked.method == "GET" or asked.path == "/v2/repository/index":
        return (200,)
    if asked.path == "/v2/logging":
        return _of_log(asked.body)
    if asked.path == "/v2/trace/setting":
        return _of_trace(asked.body)
    return None


def _of_log(body: Any) -> Sequence[int] | None:
    given = {key: value for key, value in (body or {}).items() if value is not None}
    if "log_file" in given:
        return (501,)
    if not given.keys() <= set(_LOG):
        return (400,)
    level = given.get("log_verbose_level", 0)
    return (200,) if type(level) is int and level <= INT32_MAX else (500,)


def _of_trace(body: Any) -> Sequence[int] | None:
    """What a number's text may be is not told by the document."""
    given = body or {}
    if any(key in given for key in _FIXED_TRACE):
        return (501,)
    if not given.keys() <= set(_TRACE):
        return (400,)
    return (200,) if all(value is None for value in given.values()) else (200, 400)


def _of_repository(asked: Asked) -> Sequence[int] | None:
    """§1.12 and §4.4: what is in no repository cannot be loaded, and may be unloaded."""
    parameters = (asked.body or {}).get("parameters", {})
    if asked.values["model"] != "nobody":
        return None
    if asked.path.endswith("/unload"):
        return (200,) if parameters.keys() <= {"unload_dependents"} else (400,)
    return (500,) if not parameters else (400, 500)


def _of_nobody(asked: Asked) -> Sequence[int] | None:
    """§1.3, §5.1: 400 for ready and statistics, for the rest 404, but 400 for what is no name."""
    if asked.values["model"] == "stats" and asked.path == "/v2/models/{model}":
        return None  # a path of its own
    if asked.path.endswith("/trace/setting"):
        if asked.method == "POST" and (asked.body or {}):
            return (*_NOT_THERE, 501)
        return _NOT_THERE
    if asked.values["model"] != "nobody" or _odd(asked.values):
        return _NOT_THERE
    if asked.path.endswith(("/ready", "/stats")):
        return (400,)
    version = asked.values.get("version", "1")
    return (404,) if version in VALUES["version"] else _NOT_THERE


def _of_loaded(asked: Asked) -> Sequence[int] | None:
    there = asked.values.get("version", "1") == "1"
    if asked.path.endswith("/trace/setting"):
        return (200,) if asked.method == "GET" else _of_trace(asked.body)
    if asked.method == "GET" and there:
        return (200,)
    if asked.path.endswith(("/ready", "/stats")):
        return (400,)
    return None if there else (404,)  # of infer and generate before the body is read


def _of_memory(asked: Asked) -> Sequence[int] | None:
    """§1.13. Names of regions are any text but what leads to another path."""
    kind = "cuda" if asked.path.startswith("/v2/cuda") else "system"
    region = asked.values.get("region")
    if region is not None and _odd(asked.values):
        return None
    if asked.path.endswith("/unregister"):
        return (200,)
    if asked.path.endswith("/status"):
        if region is None:
            return (200,)
        return (404,) if kind == "cuda" else (200, 404)
    if kind == "cuda":
        return (400,)
    if region is None:
        return (400, 500)  # there is no name, and a number of the document may be none of Triton's
    return None  # register: it depends on what is there
