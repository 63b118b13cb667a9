"""TLS of the gRPC port: options that do not go together, and files one cannot serve with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from pydantic import ValidationError

from configs import grpc_tls
from configs.grpc_tls import CertificateError
from configs.server import ServerSettings
from tests.certificates import Authority

PAIR = {"grpc_server_cert": "c", "grpc_server_key": "k"}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


def test_without_it_there_are_no_certificates() -> None:
    assert grpc_tls.certificates(ServerSettings()) is None


@pytest.mark.parametrize("mutual", [False, True])
def test_a_pair_and_for_clients_with_certificates_their_root(
    authority: Authority, mutual: bool
) -> None:
    found = grpc_tls.certificates(ServerSettings(**authority.settings(mutual)))
    assert found is not None
    assert [found.cert.name, found.key.name] == ["server.pem", "server.key"]
    assert (found.root is not None) == mutual


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"grpc_use_ssl": True}, "grpc_use_ssl needs grpc_server_cert"),
        ({"grpc_use_ssl": True, "grpc_server_cert": "c"}, "grpc_use_ssl needs grpc_server_key"),
        ({"grpc_use_ssl_mutual": True, **PAIR}, "grpc_use_ssl_mutual needs grpc_root_cert"),
        (PAIR, "grpc_server_cert needs grpc_use_ssl or grpc_use_ssl_mutual"),
        ({"grpc_use_ssl_mutual": False, **PAIR}, "grpc_server_cert needs grpc_use_ssl"),
        ({"grpc_root_cert": "r"}, "grpc_root_cert needs grpc_use_ssl"),
        ({"grpc_use_ssl": True, **PAIR, "listener": "serve"}, "needs listener 'router'"),
    ],
)
def test_what_does_not_go_together(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        ServerSettings(**given)


def test_who_switches_it_off_may_leave_the_files_where_they_are() -> None:
    assert grpc_tls.certificates(ServerSettings(grpc_use_ssl=False, **PAIR)) is None


@pytest.mark.parametrize(
    ("setting", "content", "text"),
    [
        ("grpc_server_cert", None, "grpc_server_cert: '.*' cannot be read: No such file"),
        ("grpc_server_key", None, "grpc_server_key: '.*' cannot be read: No such file"),
        ("grpc_root_cert", None, "grpc_root_cert: '.*' cannot be read: No such file"),
        ("grpc_server_cert", "client.pem", "grpc_server_key are no .*: key values mismatch"),
        ("grpc_server_key", "client.key", "grpc_server_key are no .*: key values mismatch"),
        ("grpc_server_cert", b"nonsense", "grpc_server_key are no certificate in PEM form"),
        ("grpc_server_key", b"", "grpc_server_key are no certificate in PEM form"),
        ("grpc_root_cert", b"nonsense", "grpc_root_cert holds no certificate in PEM form"),
    ],
)
def test_a_file_that_is_no_good_is_named(
    authority: Authority, tmp_path: Path, setting: str, content: Any, text: str
) -> None:
    file = tmp_path / "file.pem"
    if isinstance(content, str):
        file.write_bytes(Path(authority.file(content)).read_bytes())
    elif content is not None:
        file.write_bytes(content)
    settings = ServerSettings(**{**authority.settings(mutual=True), setting: str(file)})
    with pytest.raises(CertificateError, match=text):
        grpc_tls.certificates(settings)


def test_a_path_that_is_none_is_named(authority: Authority) -> None:
    given = {**authority.settings(mutual=False), "grpc_server_key": "/tmp/\0"}
    with pytest.raises(CertificateError, match="grpc_server_key: .* cannot be read"):
        grpc_tls.certificates(ServerSettings(**given))


def test_nobody_reads_them_where_there_is_no_grpc() -> None:
    assert (
        grpc_tls.certificates(ServerSettings(grpc_use_ssl=True, allow_grpc=False, **PAIR)) is None
    )


def test_a_key_with_a_password_is_refused_and_nobody_asked(
    authority: Authority, tmp_path: Path
) -> None:
    key = serialization.load_pem_private_key(Path(authority.file("server.key")).read_bytes(), None)
    file = tmp_path / "locked.key"
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    given = {**authority.settings(mutual=False), "grpc_server_key": str(file)}
    with pytest.raises(CertificateError, match="without a password"):
        grpc_tls.certificates(ServerSettings(**given))
