from __future__ import annotations

import pytest

from deployments.documents import document

ONE = document(b"text", b"text/plain", ((b"x", b"y"),))
BARE = ONE.tag.removeprefix(b"W/")


def test_the_tag_is_the_bodys():
    assert document(b"text", b"text/html").tag == ONE.tag != document(b"Text", b"text/plain").tag
    assert ONE.tag.startswith(b'W/"') and ONE.tag.endswith(b'"')


@pytest.mark.parametrize(
    ("known", "status"),
    [
        (b"", 200),
        (b'"other"', 200),
        (b"W/", 200),
        (BARE[:-2] + b'"', 200),
        (ONE.tag, 304),
        (BARE, 304),
        (b'"a" , ' + ONE.tag + b",", 304),
        (b"*", 304),
    ],
)
def test_if_none_match(known, status):
    answered, fields, body = ONE.answer(known)
    assert (answered, body) == (status, b"text" if status == 200 else b"")
    assert ((b"content-type", b"text/plain") in fields) == (status == 200)
    assert {(b"x", b"y"), (b"etag", ONE.tag), (b"cache-control", b"no-cache")} <= set(fields)
