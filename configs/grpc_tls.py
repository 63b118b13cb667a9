"""TLS of the gRPC port: which files it takes, and whether one can serve with them.

Owns what tritonserver's options of it ask for. Settings are ServerSettings, whose module reads this
one; so do `cli`, before it starts anything, and the gRPC listener.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SWITCHES = ("grpc_use_ssl", "grpc_use_ssl_mutual")
FILES = ("grpc_server_cert", "grpc_server_key", "grpc_root_cert")


class CertificateError(ValueError):
    """The text names the option, and the file where it is one file's fault."""


@dataclass(frozen=True, slots=True)
class Certificates:
    """Files in PEM form. `root`, where there is one, signs the certificates that clients need."""

    cert: Path
    key: Path
    root: Path | None = None


def wanted(settings: Any) -> bool:
    """As in tritonserver, mutual authentication is TLS without a second word."""
    return any(getattr(settings, name) for name in SWITCHES)


def check(settings: Any) -> None:
    """Raises ValueError for options that do not go together; looks into no file."""
    if not wanted(settings):
        given = [name for name in FILES if getattr(settings, name)]
        # Somebody who has switched it off means it; who has forgotten the switch must hear of it.
        # (In tritonserver mutual=false switches TLS on, so that says nothing here.)
        if given and "grpc_use_ssl" not in settings.model_fields_set:
            raise ValueError(f"{given[0]} needs grpc_use_ssl or grpc_use_ssl_mutual")
        return
    need = FILES if settings.grpc_use_ssl_mutual else FILES[:2]
    for name in need:
        if not getattr(settings, name):
            switch = SWITCHES[bool(settings.grpc_use_ssl_mutual)]
            raise ValueError(f"{switch} needs {name}")


def certificates(settings: Any) -> Certificates | None:
    """None without TLS. Raises CertificateError unless certificate and key are a pair and clients'
    certificates can be checked: neither HAProxy nor gRPC tells in words what is wrong."""
    if not (wanted(settings) and settings.allow_grpc):
        return None
    found = Certificates(
        Path(settings.grpc_server_cert),
        Path(settings.grpc_server_key),
        Path(settings.grpc_root_cert) if settings.grpc_use_ssl_mutual else None,
    )
    for name, path in zip(FILES, (found.cert, found.key, found.root), strict=True):
        if path is not None:
            _readable(name, path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a password of ours OpenSSL would ask the terminal for one.
        context.load_cert_chain(found.cert, found.key, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        raise CertificateError(
            "grpc_server_cert and grpc_server_key are no certificate in PEM form and its key "
            f"without a password: {_reason(error)}"
        ) from None
    if found.root is not None:
        try:
            context.load_verify_locations(found.root)
        except ssl.SSLError as error:
            raise CertificateError(
                f"grpc_root_cert holds no certificate in PEM form: {_reason(error)}"
            ) from None
    return found


def _readable(name: str, path: Path) -> None:
    try:
        path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL
        why = getattr(error, "strerror", None) or "it is no path"
        raise CertificateError(f"{name}: {str(path)!r} cannot be read: {why}") from None


def _reason(error: Exception) -> str:
    """OpenSSL's words for it, without the place in its sources."""
    reason = getattr(error, "reason", None)
    return reason.replace("_", " ").lower() if reason else "it cannot be read"
