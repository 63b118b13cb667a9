"""URLs of repositories in stores, in Triton's form."""

from __future__ import annotations

import pytest

from configs.errors import ConfigError
from configs.stores import is_remote, parse, split


@pytest.mark.parametrize(
    ("url", "protocol", "path", "options"),
    [
        ("s3://bucket/models", "s3", "bucket/models", {}),
        ("s3://bucket/", "s3", "bucket", {}),
        ("s3://host:9000/b/p/q", "s3", "b/p/q", {"endpoint_url": "http://host:9000"}),
        ("s3://http://h:9/b", "s3", "b", {"endpoint_url": "http://h:9"}),
        ("s3://https://h:9/b/p", "s3", "b/p", {"endpoint_url": "https://h:9"}),
        ("s3://https://s3.example.org/b", "s3", "b", {"endpoint_url": "https://s3.example.org"}),
        ("gs://bucket/p", "gs", "bucket/p", {}),
        ("as://account/box/p", "abfs", "box/p", {"account_name": "account", "account_key": "k"}),
        (
            "as://account.blob.core.windows.net/box",
            "abfs",
            "box",
            {"account_name": "account", "account_key": "k"},
        ),
    ],
)
def test_urls(url, protocol, path, options):
    store = parse(url, {"AZURE_STORAGE_KEY": "k"})
    assert (store.url, store.protocol, store.path, store.options) == (url, protocol, path, options)


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///p", "gs://b/../c", "as://account", "as://account/", "s3://b//p"]
)
def test_urls_of_nothing(url):
    with pytest.raises(ConfigError, match="names no bucket"):
        parse(url, {})


def test_what_is_a_url():
    assert all(map(is_remote, ("s3://b", "gs://b", "as://a/b")))
    assert not any(map(is_remote, ("/s3", "s3", "http://h/b", "file:///m", "ftp://x", "")))


def test_repositories_joined_by_colons():
    urls = ["/a", "s3://host:9000/b", "s3://https://h:1/b", "b/c", "gs://x"]
    assert split(":".join(urls)) == urls
    assert split(":/a::b:") == ["/a", "b"]
