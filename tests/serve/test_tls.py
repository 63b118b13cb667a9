"""gRPC over mutual TLS on a real server, as tritonclient's documentation has it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from tritonclient.utils import InferenceServerException

from tests.certificates import Authority
from tests.serve import repository
from tests.serve.clients import infer
from tests.serve.server import BIN, START_S, Server, manta_serve

X = {"x": np.array([[1, -1]], np.float32)}
Y = X["x"] * 2


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def secured(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("models")
    repository.write_nap(root, "nap")
    flags = ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={authority.file('root.pem')}"]
    flags += [f"--grpc-server-cert={authority.file('server.pem')}"]
    flags += [f"--grpc-server-key={authority.file('server.key')}"]
    with manta_serve(root, *flags) as server:
        server.wait_ready()
        yield server


def client_of(server: Server, authority: Authority, name: str = "client") -> Any:
    return grpcclient.InferenceServerClient(
        server.grpc,
        ssl=True,
        root_certificates=authority.file("root.pem"),
        private_key=authority.file(f"{name}.key"),
        certificate_chain=authority.file(f"{name}.pem"),
    )


def test_infer_and_stream(secured: Server, authority: Authority) -> None:
    with client_of(secured, authority) as client:
        assert client.is_server_ready() and client.is_model_ready("nap")
        assert np.array_equal(infer(client, "nap", X).as_numpy("y"), Y)
        answers: list[Any] = []
        client.start_stream(lambda result, error: answers.append(error or result.as_numpy("y")))
        given = grpcclient.InferInput("x", [1, 2], "FP32").set_data_from_numpy(X["x"])
        client.async_stream_infer("nap", [given])
        client.stop_stream()
    assert len(answers) == 1 and np.array_equal(answers[0], Y)


def test_in_the_clear_and_for_strangers_there_is_no_answer(
    secured: Server, authority: Authority, tmp_path: Path
) -> None:
    strangers = Authority(tmp_path / "strangers")
    for name in ("client.pem", "client.key"):
        (authority.folder / f"strange-{name}").write_bytes((strangers.folder / name).read_bytes())
    with client_of(secured, authority, "strange-client") as stranger:
        with pytest.raises(InferenceServerException, match="UNAVAILABLE"):
            infer(stranger, "nap", X)
    with grpcclient.InferenceServerClient(secured.grpc) as clear:
        with pytest.raises(InferenceServerException, match="UNAVAILABLE"):
            infer(clear, "nap", X)
    with httpclient.InferenceServerClient(secured.http) as http:  # no TLS, as in tritonserver
        assert np.array_equal(infer(http, "nap", X).as_numpy("y"), Y)


def test_a_file_that_is_not_there_ends_the_command_at_once(authority: Authority) -> None:
    words = ["--grpc-use-ssl=true", "--grpc-server-cert=/nowhere/server.pem"]
    words += [f"--grpc-server-key={authority.file('server.key')}", "--model-repository=."]
    command = [str(BIN / "manta"), "serve", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)
    assert done.returncode == 1
    assert "grpc_server_cert: '/nowhere/server.pem' cannot be read" in done.stderr
