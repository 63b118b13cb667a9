"""The page as it is sent: what it may do, and that its parts belong together."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from deployments import page

from .serving import Server

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def reply():
    return Server().ask("GET", "/")


def inside(tag, html):
    """The text of the one element of this kind."""
    found = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", html, re.DOTALL)
    assert len(found) == 1
    return found[0]


def test_it_is_confined(reply):
    assert (reply.status_code, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert reply.headers["referrer-policy"] == "no-referrer"
    assert reply.headers["x-frame-options"] == "DENY"
    policy = dict(
        part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";")
    )
    for directive in ("default-src", "base-uri", "form-action", "frame-ancestors"):
        assert policy[directive] == "'none'"
    assert policy["connect-src"] == "'self'"
    for directive, tag in (("script-src", "script"), ("style-src", "style")):
        digest = hashlib.sha256(inside(tag, reply.text).encode()).digest()
        assert policy[directive] == f"'sha256-{base64.b64encode(digest).decode()}'"


def test_nothing_comes_from_elsewhere_and_nothing_becomes_html(reply):
    elsewhere = r"https?://|<script[^>]+src|<link[^>]+stylesheet|@import|url\("
    assert not re.search(elsewhere, reply.text)
    assert not re.search(r"\son\w+=|\sstyle=", reply.text)
    script = inside("script", reply.text)
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|srcdoc|\beval\b|Function\("
    assert not re.search(ways, script)
    assert "textContent" in script
    assert "</script" not in script and "<!--" not in script


class Tags(HTMLParser):
    """Ids, and form controls that stand in no label."""

    def __init__(self):
        super().__init__()
        self.ids, self.bare, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        facts = dict(attributes)
        if "id" in facts:
            self.ids.append(facts["id"])
        if tag in ("input", "select", "textarea") and "label" not in self.open:
            self.bare.append(tag)
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_script_finds_what_it_asks_for(reply):
    tags = Tags()
    tags.feed(reply.text)
    assert tags.open == [] and tags.bare == []
    assert len(set(tags.ids)) == len(tags.ids)
    script = inside("script", reply.text)
    asked = set(re.findall(r'\b(?:byId|copy|say)\("([\w-]+)"', script))
    assert asked and asked <= set(tags.ids)
    classes = set(re.findall(r'querySelector\("\.(\w+)', script))
    given = set(" ".join(re.findall(r'class="([^"]+)"', reply.text)).split())
    assert classes and classes <= given


def test_pip_installs_its_files():
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(r"^deployments = \[(.*)\]$", text, re.MULTILINE)
    assert found is not None
    patterns = re.findall(r'"([^"]+)"', found[1])
    here = Path(page.__file__).parent
    names = [path.name for path in here.iterdir() if path.is_file() and path.suffix != ".py"]
    assert "page.html" in names
    for name in names:
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns), name
