"""What is said of one answer to a fuzzed request, by the OpenAPI document and the protocol.

Pure: sends nothing. Used by `fuzz`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import requests
import schemathesis
from jsonschema import Draft202012Validator
from schemathesis import Response
from schemathesis.specs.openapi import checks

CONFORMANCE = [
    checks.status_code_conformance,
    checks.content_type_conformance,  # schemas of answers: see `check_schema`
]
MAX_ERROR_BYTES = 20_000  # 4096 characters, each of which JSON may write as six or twelve
PREFIX = r"(\[request id: .*?\] )?"
# Every text that may come with a status of 5xx, as the protocol has it; others are faults.
EXPECTED = {
    500: re.compile(
        PREFIX + r"(failed to parse the request JSON buffer|Failed to parse 'data' field"
        r"|Unable to parse '|attempt to access JSON |Converting keyword: "
        r"|unrecognized load parameter |failed to load '|PyTorch execute failure: )",
        re.DOTALL,
    ),
    501: re.compile(
        r"(Unsupported compression type |'repository_name' specification is not supported"
        r"|log file location can not be updated|trace |.*CUDA )"
        rf"|{PREFIX}request parameter '(sequence_\w+|priority|timeout)' is not supported$",
        re.DOTALL,
    ),
    503: re.compile(
        PREFIX + r"(Request for unknown model: .* is not at ready state$"
        r"|invalid argument for --log_format|Request timeout expired: )",
        re.DOTALL,
    ),
}
_LENGTH = "Inference-Header-Content-Length"
_NOTHING = object()


@dataclass(frozen=True)
class Asked:
    """A request as the document has it: `values` are those of the path, `body` is parsed, None
    where there is none."""

    method: str
    path: str
    values: Mapping[str, Any]
    body: Any = None


@dataclass(frozen=True)
class Tolerated:
    """What the server takes although the document has it otherwise. `read` gives the body as the
    server reads it, or None where nothing of it matters."""

    reason: str
    path: re.Pattern[str]
    read: Callable[[Any], Any]


def judge(case: schemathesis.Case, answer: Response, secrets: Sequence[str]) -> None:
    """Raises for an answer that the document does not describe, that tells too much, or is a 5xx
    without one of the reasons that the protocol has."""
    case.validate_response(answer, checks=CONFORMANCE)
    judge_text(answer, secrets)


def judge_text(answer: Response, secrets: Sequence[str]) -> None:
    text = answer.content.decode("utf-8", "replace")
    for secret in ("Traceback", "internal error", *secrets):
        assert secret not in text, f"{secret!r} is told: {text[:500]}"
    if answer.status_code < 400:
        return
    assert len(answer.content) <= MAX_ERROR_BYTES, f"an error of {len(answer.content)} bytes"
    if not answer.content:
        return  # where an error has no body, the document says so
    told = json.loads(text.removeprefix("data: "))
    assert list(told) == ["error"] and isinstance(told["error"], str), text[:500]
    if answer.status_code >= 500:
        expected = EXPECTED.get(answer.status_code)
        assert expected is not None and expected.match(told["error"]), (
            f"{answer.status_code}: {told['error'][:500]}"
        )


def check_schema(
    document: Mapping[str, Any], described: Mapping[str, Any], answer: Response
) -> None:
    """schemathesis 4.32 does this too, but takes `prefixItems` for a mistake of the document."""
    kind = "".join(answer.headers.get("content-type", ()))
    if not kind.startswith("application/json"):
        return
    told = resolved(document, described["responses"][str(answer.status_code)])
    _validator(document, json_schema(told)).validate(json.loads(answer.content))


# --- requests ------------------------------------------------------------------------------------


def violations(
    document: Mapping[str, Any],
    asked: Asked,
    sent: requests.PreparedRequest,
    tolerated: Sequence[Tolerated],
) -> list[str]:
    """Where a request, as it was sent, does not fit the document, and the server should mind."""
    item = document["paths"][asked.path]
    described = item[asked.method.lower()]
    found = []
    for one in (*item.get("parameters", ()), *described.get("parameters", ())):
        if one["in"] == "path":
            value: Any = str(asked.values[one["name"]])
        else:
            value = _number(sent.headers.get(one["name"]))
        if value is not None and not _validator(document, one["schema"]).is_valid(value):
            found.append(f"{one['name']}: {value!r}")
    if "requestBody" in described:
        found += _of_body(document, asked.path, described["requestBody"], sent, tolerated)
    return found


def body_of(sent: requests.PreparedRequest) -> Any:
    """The JSON of a request; None where there is no such thing."""
    parsed = _parsed(sent)
    return None if parsed is _NOTHING else parsed


def _of_body(
    document: Mapping[str, Any],
    path: str,
    described: Mapping[str, Any],
    sent: requests.PreparedRequest,
    tolerated: Sequence[Tolerated],
) -> Iterator[str]:
    if not sent.body:
        if described.get("required"):
            yield "no body"
        return
    if _number(sent.headers.get(_LENGTH)) == 0:
        return  # all of it is a tensor
    parsed = _parsed(sent)
    for one in tolerated:
        if one.path.fullmatch(path) and isinstance(parsed, dict):
            parsed = one.read(parsed)
            if parsed is None:
                return
    if parsed is _NOTHING:
        yield "no JSON"
        return
    for error in _validator(document, json_schema(described)).iter_errors(parsed):
        yield f"{error.json_path}: {error.message[:200]}"


def _parsed(sent: requests.PreparedRequest) -> Any:
    body = sent.body or b""
    content = body.encode() if isinstance(body, str) else body
    length = _number(sent.headers.get(_LENGTH))
    if isinstance(length, int) and length >= 0:
        content = content[:length]
    try:
        return json.loads(content.decode())
    except ValueError:
        return _NOTHING


def _number(text: str | bytes | None) -> Any:
    """Of a header: a number where it is one."""
    if text is None:
        return None
    text = (text.decode("latin-1") if isinstance(text, bytes) else text).strip(" \t")
    return int(text) if re.fullmatch("[0-9]{1,300}", text) else text


# --- the document --------------------------------------------------------------------------------


def json_schema(described: Mapping[str, Any] | None, kind: str = "application/json") -> Any:
    """Of a request's or an answer's body; an empty one where there is none."""
    content = (described or {}).get("content", {})
    return content.get(kind, {}).get("schema", {})


def resolved(document: Mapping[str, Any], node: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a reference to one of the components leads to."""
    if "$ref" not in node:
        return node
    _, _, group, name = node["$ref"].split("/")
    found: Mapping[str, Any] = document["components"][group][name]
    return found


def _validator(document: Mapping[str, Any], schema: Mapping[str, Any]) -> Draft202012Validator:
    return Draft202012Validator({**schema, "components": document.get("components", {})})
