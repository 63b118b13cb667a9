"""Model repositories in object stores, by their URLs in Triton's form.

Text to data: no network, no packages of a store. Read by the command line, and by
deployments/mirror.py, which goes there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import ConfigError

# The package that fsspec wants for each.
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "as": "adlfs"}

_ENDPOINT = re.compile(r"(?:(https?)://)?([^/]+:\d+)/(.+)|(https?)://([^/]+)/(.+)")
# A colon that parts two repositories is none of a URL's own.
_BETWEEN = re.compile(r":(?!//)(?!\d+/)")


@dataclass(frozen=True, slots=True)
class Store:
    """`protocol`, `path` and `options` are fsspec's; `path` begins with the bucket or container."""

    url: str
    protocol: str
    path: str
    options: Mapping[str, str]
    package: str


def is_remote(repository: str) -> bool:
    scheme, found, _ = repository.partition("://")
    return bool(found) and scheme in PACKAGES


def split(paths: str) -> list[str]:
    """Repositories as an environment variable has them: joined by colons, on Windows otherwise."""
    parts = _BETWEEN.split(paths) if os.pathsep == ":" else paths.split(os.pathsep)
    return [part for part in parts if part]


def parse(url: str, environment: Mapping[str, str]) -> Store:
    """Raises ConfigError for a URL that names no bucket. Credentials are read by the packages, from
    the variables of each store; those of Azure have other names in Triton."""
    scheme, _, rest = url.partition("://")
    rest = rest.rstrip("/")
    options: dict[str, str] = {}
    protocol, path = scheme, rest
    if scheme == "s3" and (match := _ENDPOINT.fullmatch(rest)):
        kind, address = match[1] or match[4] or "http", match[2] or match[5]
        options["endpoint_url"], path = f"{kind}://{address}", match[3] or match[6]
    elif scheme == "as":
        protocol = "abfs"
        account, _, path = rest.partition("/")
        options["account_name"] = account.partition(".")[0]
        if key := environment.get("AZURE_STORAGE_KEY"):
            options["account_key"] = key
    parts = path.split("/")
    if not path or any(part in ("", ".", "..") for part in parts):
        raise ConfigError(f"model repository '{url}' names no bucket, or leads out of it")
    return Store(url, protocol, path, options, PACKAGES[scheme])
