"""What --help says: every option once, under tritonserver's headings, with its kind."""

from __future__ import annotations

import re

import pytest

from cluster.flags import FLAGS, MEANINGLESS, REFUSED
from cluster.usage import GROUPS, OWN, WIDTH, group, usage


def sections() -> dict[str, str]:
    parts = re.split(r"^([A-Z][\w/ ]+):$", usage(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def entries(section: str) -> dict[str, str]:
    parts = re.split(r"^  --([\w-]+)$", section, flags=re.MULTILINE)
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return {name: " ".join(text.split()) for name, text in pairs}


def test_headings_are_tritonservers_and_last_is_our_own() -> None:
    assert list(sections()) == [*GROUPS, OWN]


def test_every_option_stands_once_with_its_kind() -> None:
    shown: dict[str, str] = {}
    for section in sections().values():
        one = entries(section)
        assert one and not shown.keys() & one.keys()
        shown |= one
    assert set(shown) == {*FLAGS, *MEANINGLESS, *REFUSED}
    for name, text in shown.items():
        marked = re.match(r"\((no effect|refused)\) ", text)
        kinds = {**dict.fromkeys(MEANINGLESS, "no effect"), **dict.fromkeys(REFUSED, "refused")}
        assert (marked[1] if marked else "") == kinds.get(name, "")
    assert shown["rate-limit"].endswith("; off is accepted")
    assert shown["http-port"] == "port of HTTP"


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("id", "Server"),
        ("log-verbose", "Logging"),
        ("model-store", "Model Repository"),
        ("http-restricted-api", "HTTP"),
        ("http-lane", OWN),
        ("max-body-bytes", OWN),
        ("grpc-use-ssl", "GRPC"),
        ("allow-cpu-metrics", "Metrics"),
        ("trace-config", "Tracing"),
        ("rate-limit", "Rate Limiter"),
        ("host-policy", "Memory/Device Management"),
        ("model-load-timeout-secs", OWN),
    ],
)
def test_where_an_option_stands(name: str, title: str) -> None:
    assert group(name) == title
    assert name in entries(sections()[title])


def test_what_is_tritonservers_does_not_stand_under_our_heading() -> None:
    assert not [name for name in (*MEANINGLESS, *REFUSED) if group(name) == OWN]


def test_lines_fit_a_terminal() -> None:
    assert all(len(line) <= WIDTH for line in usage().splitlines())
