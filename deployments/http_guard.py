"""Who may change the server over HTTP: no page of another site, by way of somebody's browser.

A browser names the page's origin with each POST, and a page cannot prevent it; tritonclient and
curl name none and are not asked further. Owns that one rule, and which endpoints are open to all
pages all the same. Called by `http` for every POST of the route table.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from .errors import ForeignOrigin
from .http_body import Headers

# Endpoints whose POST changes nothing. Every other one is guarded, also one that is new.
OPEN = frozenset(("infer_elsewhere", "generate", "generate_stream", "index"))


def check_origin(headers: Headers, names: Collection[str]) -> None:
    """Raises ForeignOrigin unless the page, if a page asks, is this server's own.

    `names` are those that the server is known by, beside addresses and localhost. Any other name
    is refused even where it is the Host: whoever owns a name can have it lead here (DNS rebinding),
    and then the browser takes the pages of that name for ours.
    """
    origin = headers.get(b"origin")
    if origin is None:
        return
    shown = origin[:64].decode("latin-1")
    authority = origin.lower().partition(b"://")[2]
    if not authority or authority != headers.get(b"host", b"").lower():
        raise ForeignOrigin(shown)
    if not _is_known(authority.decode("latin-1"), names):
        raise ForeignOrigin(shown)


def _is_known(authority: str, names: Collection[str]) -> bool:
    try:
        name = urlsplit(f"//{authority}").hostname or ""
        if name == "localhost" or name in names:
            return True
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
