"""A document that clients ask for again and again: its body, and the tag by which they know it.

Owns the answer to If-None-Match. Knows no content. Made by `page` and `openapi`, sent by `http`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from .http_replies import Field

# Asked for anew each time, answered in full only when it has changed.
_ALWAYS: tuple[Field, ...] = (
    (b"cache-control", b"no-cache"),
    (b"x-content-type-options", b"nosniff"),
)


@dataclass(frozen=True, slots=True)
class Document:
    """`fields` come with the body and, but for its type, without."""

    body: bytes
    content_type: bytes
    fields: tuple[Field, ...]
    tag: bytes

    def answer(self, if_none_match: bytes) -> tuple[int, list[Field], bytes]:
        """Status, fields and body; 304 where `if_none_match` has the tag."""
        fields = [*_ALWAYS, *self.fields, (b"etag", self.tag)]
        known = [tag.strip().removeprefix(b"W/") for tag in if_none_match.split(b",")]
        if b"*" in known or self.tag.removeprefix(b"W/") in known:
            return 304, fields, b""
        return 200, [(b"content-type", self.content_type), *fields], self.body


def document(body: bytes, content_type: bytes, fields: tuple[Field, ...] = ()) -> Document:
    """The tag is a weak one: what is between us and the client may compress the body."""
    tag = b'W/"%s"' % hashlib.sha256(body).hexdigest()[:32].encode()
    return Document(body, content_type, fields, tag)
