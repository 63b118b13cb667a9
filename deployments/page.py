"""The page at `/`: page.html, its style and its scripts, as one document.

Owns what the page may do in a browser: run its own script, wear its own style, ask its own server,
and nothing else. Decides nothing about models: the page speaks the protocol. Called by `http`.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

from .documents import Document, document

_STYLE = "page.css"
_SCRIPTS = ("page_wire.js", "page_views.js", "page.js")
_POLICY = (
    "default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self'; "
    "img-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)


def read() -> Document:
    """Script and style are allowed by their hashes, so that no other one runs."""
    style, script = _source(_STYLE), "".join(map(_source, _SCRIPTS))
    html = _source("page.html").replace("/* page.css */", style).replace("/* page.js */", script)
    policy = _POLICY.format(script=_hash(script), style=_hash(style))
    fields = (
        (b"content-security-policy", policy.encode()),
        (b"referrer-policy", b"no-referrer"),
        (b"x-frame-options", b"DENY"),
        (b"cross-origin-resource-policy", b"same-origin"),
    )
    return document(html.encode(), b"text/html; charset=utf-8", fields)


def _source(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
