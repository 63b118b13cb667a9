"""Fuzz of HTTP from an OpenAPI document: requests, and a verdict on each answer.

schemathesis makes the requests, those that fit the document and those that do not; `TWISTS` spoil
each of them once more so that the status is known beforehand; methods and paths that the document
does not have are sent as well. Knows no server: `Target` says where one is and what must not be
touched there. Used by `test_fuzz_openapi.py`.
"""

from __future__ import annotations

import contextlib
import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st
from schemathesis import Response
from schemathesis.core.failures import FailureGroup

from tests.serve.exchange import Connection
from tests.serve.verdict import (
    Asked,
    Tolerated,
    body_of,
    check_schema,
    json_schema,
    judge,
    judge_text,
    resolved,
    violations,
)

NO_JSON = (b"{", b"nul", b'{"a":}', b'{"a" 1}', b"\xff", b'{"a":"\x01"}', b"{} {}", b"NaN")
# What is done to a request whose operation reads a body.
TWISTS = ("example", "gzip", "no JSON", "unknown coding", "no gzip")
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND")
EACH_ALIVE = 10  # cases between two questions whether the server is there


@dataclass(frozen=True)
class Target:
    """`values` are for parameters of paths, so that some of the requests find what they name; with
    the first of them `right` has bodies by path, and the statuses that answer them. `expected` are
    the statuses that answer what fits the document, None where that is not known; of what does not
    fit, `tolerated` is taken nevertheless. `secrets` are never told. `chosen` leaves operations
    out, `spare` changes what would do harm. `limit_s` is for all of an answer."""

    url: str
    document: dict[str, Any]
    values: Mapping[str, Sequence[str]] = field(default_factory=dict)
    right: Mapping[str, tuple[Any, Sequence[int]]] = field(default_factory=dict)
    expected: Callable[[Asked], Sequence[int] | None] = lambda asked: None
    tolerated: Sequence[Tolerated] = ()
    secrets: Sequence[str] = ()
    chosen: Callable[[str], bool] = lambda path: True
    spare: Callable[[schemathesis.Case], None] = lambda case: None
    limit_s: float = 30.0


@dataclass
class Found:
    """What was sent, by operation and status, and what was wrong, by operation. `ruled` counts
    the verdicts by what the status was held against."""

    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    faults: dict[str, str] = field(default_factory=dict)
    ruled: Counter[str] = field(default_factory=Counter)

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
        lines.append(f"{self.total():6} in all  {dict(sorted(statuses.items()))}")
        return "\n".join([*lines, f"held against: {dict(self.ruled)}"])


def fuzz(target: Target, examples: int, alive: Callable[[], None], *, fixed: bool) -> Found:
    """So many requests for each operation that fit its description and so many that do not, or
    all that there are; of those with a body each once more, spoiled. `alive` is called after each
    few and after each operation; `fixed`: the same ones always."""
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
    with contextlib.closing(Connection(target.url, target.limit_s)) as connection:
        for result in schema.get_all_operations():
            operation = result.ok()
            if not target.chosen(operation.path):
                continue
            one = _Operation(connection, target, operation, found, alive)
            for mode in schemathesis.GenerationMode:
                if mode.is_negative and not can_be_wrong(target.document, operation):
                    continue  # to learn that takes seconds
                with _faults_of(found, f"{one.name}, {mode.value}"):
                    one.run(mode, limits)
                    alive()
    return found


@contextlib.contextmanager
def _faults_of(found: Found, name: str) -> Iterator[None]:
    try:
        yield
    except (Exception, FailureGroup) as error:
        notes = "\n".join(getattr(error, "__notes__", ()))
        found.faults[name] = f"{error!r}\n{notes}"


class _Operation:
    """Of the document: what is sent to it, and what is said of its answers."""

    def __init__(
        self,
        connection: Connection,
        target: Target,
        operation: schemathesis.APIOperation,
        found: Found,
        alive: Callable[[], None],
    ) -> None:
        self.name = f"{operation.method.upper()} {operation.path}"
        self._connection, self._target, self._operation = connection, target, operation
        self._found, self._alive = found, alive
        self._described = target.document["paths"][operation.path][operation.method]
        self._example, self._right = right_body(target, operation.path, self._described)
        # CUDA's shared memory is refused before the body is read.
        self._twisted = "requestBody" in self._described and "/cuda" not in operation.path
        self._count = 0

    def run(self, mode: schemathesis.GenerationMode, limits: settings) -> None:
        strategy = self._operation.as_strategy(generation_mode=mode)

        @limits
        @given(case=strategy, data=st.data())
        def each(case: schemathesis.Case, data: st.DataObject) -> None:
            if data.draw(st.booleans()):
                for key in self._named(case):
                    case.path_parameters[key] = data.draw(st.sampled_from(self._target.values[key]))
            self._plain(case)
            if self._twisted:
                self._twist(case, data.draw(st.sampled_from(TWISTS)), data.draw)
            self._count += 1
            if not self._count % EACH_ALIVE:
                self._alive()

        each()

    def _named(self, case: schemathesis.Case) -> list[str]:
        return [key for key in case.path_parameters or {} if key in self._target.values]

    def _plain(self, case: schemathesis.Case) -> None:
        target = self._target
        target.spare(case)
        sent = requests.Request(**case.as_transport_kwargs(target.url)).prepare()
        status = self._ask(case, sent)
        asked = Asked(case.method, case.path, case.path_parameters or {}, body_of(sent))
        wrong = violations(target.document, asked, sent, target.tolerated)
        if wrong:
            self._found.ruled["does not fit: an error"] += 1
            assert status >= 400, f"{status} to what does not fit: {wrong[:5]}"
            return
        expected = target.expected(asked)
        if expected is None:
            self._found.ruled["fits: what is described"] += 1
            return
        self._found.ruled["fits: a rule"] += 1
        assert status in expected, f"{status}, not {expected}, to {asked}"

    def _twist(self, case: schemathesis.Case, twist: str, draw: Any) -> None:
        for key in self._named(case):
            case.path_parameters[key] = self._target.values[key][0]
        self._target.spare(case)
        sent = requests.Request(**case.as_transport_kwargs(self._target.url)).prepare()
        if twist in ("example", "gzip") and self._right is not None:
            sent.prepare_body(json.dumps(self._example).encode(), None)
        expected = spoil(sent, twist, draw, self._right)
        status = self._ask(case, sent)
        self._found.ruled[f"twist: {twist}"] += 1
        assert expected is None or status in expected, f"{twist}: {status}, not {expected}"

    def _ask(self, case: schemathesis.Case, sent: requests.PreparedRequest) -> int:
        """The status of an answer that is well-formed."""
        answer = self._connection.send(sent)
        self._found.answers[self.name, answer.status_code] += 1
        judge(case, answer, self._target.secrets)
        check_schema(self._target.document, self._described, answer)
        status: int = answer.status_code
        return status


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


# --- methods and paths that the document does not have -------------------------------------------


def fuzz_methods(target: Target, *, fills: int | None = None) -> Found:
    """To each path, filled in with so many of `values` or all, every method that it has not: 405.
    To a path below it, which nobody has, some: 404. HEAD is GET without its body."""
    found = Found()
    with contextlib.closing(Connection(target.url, target.limit_s)) as connection:
        for path in filter(target.chosen, target.document["paths"]):
            for method, filled in product(METHODS, _filled(target, path)[:fills]):
                wanted = _wanted(target, path, method, filled)
                with _faults_of(found, f"{method} {path}, not described"):
                    if wanted is not None:
                        _refused(connection, target, found, (method, path, filled), wanted)
                    if method in ("GET", "POST", "DELETE"):
                        url = f"{path.format(**filled).rstrip('/')}/nobody/has/this"
                        _refused(connection, target, found, (method, url, {}), (404,))
    return found


def _filled(target: Target, path: str) -> list[dict[str, str]]:
    """Values for the parameters of a path, all ways; first the first of each."""
    names = [one["name"] for one in target.document["paths"][path].get("parameters", ())]
    choices = [target.values.get(name, ("any",)) for name in names]
    return [dict(zip(names, values, strict=True)) for values in product(*choices)]


def _wanted(
    target: Target, path: str, method: str, filled: Mapping[str, str]
) -> Sequence[int] | None:
    item = target.document["paths"][path]
    if method.lower() in item:
        return None  # it has it
    if method == "HEAD" and "get" in item:
        described = [int(status) for status in item["get"]["responses"]]
        return target.expected(Asked("HEAD", path, filled)) or described
    return (405,)


def _refused(
    connection: Connection,
    target: Target,
    found: Found,
    asked: tuple[str, str, Mapping[str, str]],
    wanted: Sequence[int],
) -> None:
    method, path, filled = asked
    url = target.url + path.format(**filled)
    body = b"{}" if method in ("POST", "PUT", "PATCH") else None
    answer = connection.send(requests.Request(method, url, data=body).prepare())
    found.answers[f"{method}, which is not described", answer.status_code] += 1
    assert answer.status_code in wanted, f"{answer.status_code}, not {wanted}: {url}"
    if method == "HEAD":
        assert answer.content == b""
        return
    judge_text(answer, target.secrets)
    text = {404: "Not Found", 405: "Method Not Allowed"}[answer.status_code]
    _check_error(answer, text)


def _check_error(answer: Response, text: str) -> None:
    assert json.loads(answer.content) == {"error": text}, answer.content[:500]
    assert answer.headers["content-type"] == ["application/json"], answer.headers
