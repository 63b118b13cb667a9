"""Fuzz of HTTP from an OpenAPI document: requests, and a verdict on each answer.

schemathesis makes the requests, those that fit the document and those that do not; `TWISTS` spoil
some of them so that the status is known beforehand. Knows no server: `Target` says where one is and
what must not be touched there. Used by `test_fuzz_openapi.py`.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from schemathesis.core.failures import FailureGroup
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
NO_JSON = (b"{", b"nul", b'{"a":}', b'{"a" 1}', b"\xff", b'{"a":"\x01"}', b"{} {}", b"NaN")
# What is done to a request whose operation reads a body.
TWISTS = ("none", "none", "none", "example", "gzip", "no JSON", "unknown coding", "no gzip")


@dataclass(frozen=True)
class Target:
    """`values` are for parameters of paths, so that some of the requests find what they name; with
    the first of them `right` has bodies by path, and the statuses that answer them. `secrets` are
    never told. `chosen` leaves operations out, `spare` changes what would do harm."""

    url: str
    document: dict[str, Any]
    values: Mapping[str, Sequence[str]] = field(default_factory=dict)
    right: Mapping[str, tuple[Any, Sequence[int]]] = field(default_factory=dict)
    secrets: Sequence[str] = ()
    chosen: Callable[[str], bool] = lambda path: True
    spare: Callable[[schemathesis.Case], None] = lambda case: None
    limit_s: float = 30.0


@dataclass
class Found:
    """What was sent, by operation and status, and what was wrong, by operation."""

    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    faults: dict[str, str] = field(default_factory=dict)

    def total(self, status: int | None = None) -> int:
        return sum(n for (_, seen), n in self.answers.items() if status in (None, seen))

    def table(self) -> str:
        names = dict.fromkeys(name for name, _ in self.answers)
        lines = []
        for name in names:
            counts = {s: n for (one, s), n in sorted(self.answers.items()) if one == name}
            lines.append(f"{sum(counts.values()):6} {name}  {counts}")
        statuses = Counter[int]()
        for (_, status), count in self.answers.items():
            statuses[status] += count
        return "\n".join([*lines, f"{self.total():6} in all  {dict(sorted(statuses.items()))}"])


def fuzz(target: Target, examples: int, alive: Callable[[], None], *, fixed: bool) -> Found:
    """So many requests for each operation that fit its description and so many that do not, or
    all that there are. `alive` is called after each operation; `fixed`: the same ones always."""
    found = Found()
    schema = schemathesis.openapi.from_dict(target.document)
    phases = [Phase.generate] if fixed else [Phase.generate, Phase.shrink]
    limits = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=fixed,
        phases=phases,
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )
    with requests.Session() as session:
        for result in schema.get_all_operations():
            operation = result.ok()
            if not target.chosen(operation.path):
                continue
            for mode in schemathesis.GenerationMode:
                if mode.is_negative and not can_be_wrong(target.document, operation):
                    continue  # to learn that takes seconds
                name = f"{operation.method.upper()} {operation.path}"
                try:
                    _run(session, target, operation, mode, limits, found)
                    alive()
                except (Exception, FailureGroup) as error:
                    notes = "\n".join(getattr(error, "__notes__", ()))
                    found.faults[f"{name}, {mode.value}"] = f"{error!r}\n{notes}"
    return found


def _run(
    session: requests.Session,
    target: Target,
    operation: schemathesis.APIOperation,
    mode: schemathesis.GenerationMode,
    limits: settings,
    found: Found,
) -> None:
    name = f"{operation.method.upper()} {operation.path}"
    described = target.document["paths"][operation.path][operation.method]
    # CUDA's shared memory is refused before the body is read.
    reads_body = "requestBody" in described and "/cuda" not in operation.path
    twists = st.sampled_from(TWISTS if reads_body else TWISTS[:1])
    example, right = right_body(target, operation.path, described)

    @limits
    @given(case=operation.as_strategy(generation_mode=mode), twist=twists, data=st.data())
    def each(case: schemathesis.Case, twist: str, data: st.DataObject) -> None:
        exact = twist != "none" or data.draw(st.booleans())
        for key in case.path_parameters or {}:
            if exact and key in target.values:
                value = data.draw(
                    st.sampled_from(target.values[key][: 1 if twist != "none" else None])
                )
                case.path_parameters[key] = value
        target.spare(case)
        sent = requests.Request(**case.as_transport_kwargs(target.url)).prepare()
        if twist in ("example", "gzip") and example is not None:
            sent.prepare_body(json.dumps(example).encode(), None)
        status = spoil(sent, twist, data.draw, right) if twist != "none" else None
        answer = session.send(sent, timeout=target.limit_s, allow_redirects=False)
        found.answers[name, answer.status_code] += 1
        judge(case, answer, target.secrets)
        check_schema(target.document, described, answer)
        assert status is None or answer.status_code in status, (
            f"{twist}: {answer.status_code}, not {status}: {answer.text[:500]}"
        )

    each()


def spoil(
    sent: requests.PreparedRequest, twist: str, draw: Any, right: Sequence[int] | None
) -> Sequence[int] | None:
    """Changes the body; the statuses that answer it by the protocol, None for all that are
    described. `right` are those of the body as it is."""
    body = sent.body or b""
    body = body.encode() if isinstance(body, str) else body
    sent.headers.pop("Inference-Header-Content-Length", None)
    sent.headers.pop("Content-Encoding", None)
    if twist == "no JSON":
        sent.prepare_body(draw(st.sampled_from(NO_JSON)), None)
        return (500,)
    if twist == "gzip":
        sent.headers["Content-Encoding"] = "gzip"
        sent.prepare_body(gzip.compress(body), None)
        return (400,) if "/generate" in (sent.url or "") else right
    if twist == "example":
        return right
    if twist == "unknown coding":
        sent.headers["Content-Encoding"] = draw(st.sampled_from(["br", "zstd", "gzip, gzip", "x"]))
        sent.prepare_body(body or b"{}", None)
        return (400,) if "/generate" in (sent.url or "") else (501,)
    sent.headers["Content-Encoding"] = draw(st.sampled_from(["gzip", "deflate"]))
    sent.prepare_body(b"{" + body, None)
    return (400,)


def can_be_wrong(document: Mapping[str, Any], operation: schemathesis.APIOperation) -> bool:
    """Whether there are requests that do not fit its description: any text is a right name."""
    item = document["paths"][operation.path]
    described = item[operation.method]
    given = [*item.get("parameters", ()), *described.get("parameters", ())]
    return "requestBody" in described or any(
        one["in"] == "header" or "pattern" in one["schema"] for one in given
    )


def right_body(
    target: Target, path: str, described: Mapping[str, Any]
) -> tuple[Any, Sequence[int] | None]:
    """A body that the operation takes, from the target or the document, and what answers it."""
    if path in target.right:
        return target.right[path]
    schema = resolved(target.document, json_schema(described.get("requestBody")))
    examples = schema.get("examples")
    return (examples[0], (200,)) if examples else (None, None)


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


def check_schema(
    document: Mapping[str, Any], described: Mapping[str, Any], answer: requests.Response
) -> None:
    """schemathesis 4.32 does this too, but takes `prefixItems` for a mistake of the document."""
    if not answer.headers.get("content-type", "").startswith("application/json"):
        return
    told = resolved(document, described["responses"][str(answer.status_code)])
    schema = {**json_schema(told), "components": document.get("components", {})}
    Draft202012Validator(schema).validate(answer.json())


def judge(case: schemathesis.Case, answer: requests.Response, secrets: Sequence[str]) -> None:
    """Raises for an answer that the document does not describe, that tells too much, or is a 5xx
    without one of the reasons that the protocol has."""
    case.validate_response(answer, checks=CONFORMANCE)
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
