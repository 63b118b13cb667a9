"""Certificates for tests of TLS: made anew each time, for 127.0.0.1 alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trustme


class Authority:
    """A root, and files that it has signed in `folder`: `root.pem`, and `NAME.pem`, `NAME.key`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self._ca = trustme.CA()
        self._ca.cert_pem.write_to_path(str(folder / "root.pem"))
        for name in ("server", "client"):
            signed = self._ca.issue_cert("127.0.0.1")
            signed.private_key_pem.write_to_path(str(folder / f"{name}.key"))
            for part in signed.cert_chain_pems:
                part.write_to_path(str(folder / f"{name}.pem"), append=True)

    def file(self, name: str) -> str:
        return str(self.folder / name)

    def settings(self, mutual: bool) -> dict[str, Any]:
        return {
            "grpc_use_ssl_mutual" if mutual else "grpc_use_ssl": True,
            "grpc_server_cert": self.file("server.pem"),
            "grpc_server_key": self.file("server.key"),
            "grpc_root_cert": self.file("root.pem"),
        }
