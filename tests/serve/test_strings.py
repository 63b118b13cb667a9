"""Strings: lists for TorchScript, object arrays of any shape for Python models, over every road."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import tritonclient.http as httpclient
from tritonclient.utils import InferenceServerException

from tests import models
from tests.serve import repository
from tests.serve.clients import aio_client, infer, infer_aio, loading, module_of, statistics
from tests.serve.server import Server

# So long that eight rows are one batch, however slowly they come: no test here has fewer.
HELD = "dynamic_batching { preferred_batch_size: [ 8 ] max_queue_delay_microseconds: 20000000 }"
FLAT = "reshape { shape: [] }"

UPPER = '''
import numpy as np
import torch

class Upper(torch.nn.Module):
    """Upper case, twice: as an object array of bytes, and as an array of lengths."""

    def forward(self, words, scale):
        assert isinstance(words, np.ndarray) and words.dtype == object
        upper = np.array([word.upper() for word in words.flat], object).reshape(words.shape)
        lengths = torch.tensor([len(word) for word in words.flat], dtype=torch.int64)
        return upper, lengths.reshape(words.shape) * scale
'''

Strings = npt.NDArray[np.object_]


class Greet(torch.nn.Module):
    """A list and a tensor, both in and out, with rows that know their place."""

    def forward(self, words: list[str], x: torch.Tensor) -> tuple[list[str], torch.Tensor]:
        return [word + "!" for word in words], x * 2


@pytest.fixture(scope="module")
def loaded(models_root: Path, server: Server) -> Iterator[None]:
    models.save_torchscript(Greet(), models_root, "greet")
    repository.write_config(
        models_root,
        "greet",
        repository.config(
            [repository.tensor("words", "1", "TYPE_STRING", FLAT), repository.tensor("x", "2")],
            [
                repository.tensor("OUTPUT__0", "1", "TYPE_STRING", FLAT),
                repository.tensor("OUTPUT__1", "2"),
            ],
            max_batch_size=8,
            more=HELD,
        ),
    )
    models.save_eager(UPPER, models_root, "upper")
    repository.write_config(
        models_root,
        "upper",
        repository.config(
            [
                repository.tensor("words", "-1, -1", "TYPE_STRING"),
                repository.tensor("scale", "1, 1", "TYPE_INT64"),
            ],
            [
                repository.tensor("upper", "-1, -1", "TYPE_STRING"),
                repository.tensor("lengths", "-1, -1", "TYPE_INT64"),
            ],
            engine='backend: "pytorch"\nruntime: "model.py"',
            max_batch_size=8,
            more="dynamic_batching { max_queue_delay_microseconds: 1000000 }\n" + repository.EAGER,
        ),
    )
    models.save_torchscript(models.Strings(), models_root, "matrix_of_strings")
    wide = repository.tensor("words", "2", "TYPE_STRING")
    repository.write_config(
        models_root,
        "matrix_of_strings",
        repository.config([wide], [repository.tensor("OUTPUT__0", "2", "TYPE_STRING")]),
    )
    with loading(server, ("greet", "upper")):
        yield


def asked(words: list[bytes], first: float) -> dict[str, Any]:
    x = np.array([[first, i] for i in range(len(words))], np.float32)
    return {"words": np.array([[word] for word in words], object), "x": x}


def greet(server: Server, protocol: str, lists: list[list[bytes]]) -> list[Any]:
    """One request for each list, all at once: with eight rows they are one batch."""

    async def run() -> list[Any]:
        async with aio_client(server, protocol) as client:
            calls = (infer_aio(client, "greet", asked(each, i)) for i, each in enumerate(lists))
            return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(run())


def check_rows(reply: Any, words: list[bytes], first: float) -> None:
    assert reply.as_numpy("OUTPUT__0").tolist() == [[word + b"!"] for word in words]
    expected = torch.from_numpy(asked(words, first)["x"]) * 2
    np.testing.assert_array_equal(reply.as_numpy("OUTPUT__1"), expected.numpy())


LISTS = [[b"one", b"two\0three"], ["drei·".encode()], [b""], [b"a", b"b" * 5000, b"\0"], [b"x"]]


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a9_requests_in_one_batch_get_their_own_rows(
    loaded: None, server: Server, http: Any, protocol: str
) -> None:
    before = statistics(http, "greet")
    for i, reply in enumerate(greet(server, protocol, LISTS)):
        check_rows(reply, LISTS[i], i)
    after = statistics(http, "greet")
    assert after["execution_count"] - before["execution_count"] == 1


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a10_what_is_not_utf8_fails_for_that_request_alone(
    loaded: None, server: Server, protocol: str
) -> None:
    lists = [LISTS[0], [b"\xff\xfe"], *LISTS[2:]]
    for i, reply in enumerate(greet(server, protocol, lists)):
        if i != 1:
            check_rows(reply, lists[i], i)
            continue
        assert isinstance(reply, InferenceServerException)
        assert reply.status() in ("400", "StatusCode.INVALID_ARGUMENT")
        assert "element 0 of input 'words' is not UTF-8" in str(reply.message())


def test_json_strings_and_their_nul_bytes(loaded: None, http: Any) -> None:
    words = httpclient.InferInput("words", [8, 1], "BYTES")
    texts = [["a\0b"], ["ü"], [""], ["d"], ["e"], ["f"], ["g"], ["h"]]
    words.set_data_from_numpy(np.array(texts, object), binary_data=False)
    x = httpclient.InferInput("x", [8, 2], "FP32")
    x.set_data_from_numpy(np.ones((8, 2), np.float32), binary_data=False)
    outputs = [httpclient.InferRequestedOutput("OUTPUT__0", binary_data=False)]
    reply = http.infer("greet", [words, x], outputs=outputs)
    assert reply.as_numpy("OUTPUT__0").tolist() == [[text + "!"] for (text,) in texts]


def test_lists_of_strings_have_one_dimension(loaded: None, http: Any) -> None:
    with pytest.raises(InferenceServerException) as caught:
        http.load_model("matrix_of_strings")
    text = "only 1-dimensional List of String is supported as input for 'words'"
    assert text in str(caught.value)


# --- Python models -------------------------------------------------------------------------------


def objects(*shape: int, seed: int = 0) -> Strings:
    draw = np.random.default_rng(seed)
    count = int(np.prod(shape))
    made = np.empty(count, object)
    made[:] = [draw.bytes(int(size)) for size in draw.integers(0, 9, count)]
    return made.reshape(shape)


def upper(words: Strings) -> Strings:
    made = np.empty(words.size, object)
    made[:] = [word.upper() for word in words.ravel().tolist()]
    return made.reshape(words.shape)


def scaled(rows: int, by: int) -> npt.NDArray[np.int64]:
    return np.full((rows, 1, 1), by, np.int64)


def check_upper(reply: Any, words: Strings, by: int) -> None:
    found = reply.as_numpy("upper")
    assert found.shape == words.shape and found.tolist() == upper(words).tolist()
    lengths = [len(word) * by for word in words.ravel().tolist()]
    np.testing.assert_array_equal(reply.as_numpy("lengths").ravel(), lengths)


@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 2, 1), (2, 1, 6), (2, 0, 4), (1, 1, 1)])
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_python_models_take_bytes_of_any_shape(
    loaded: None, http: Any, grpc: Any, protocol: str, shape: tuple[int, int, int]
) -> None:
    words = objects(*shape)
    client = http if protocol == "http" else grpc
    check_upper(infer(client, "upper", {"words": words, "scale": scaled(shape[0], 3)}), words, 3)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_object_arrays_are_batched_by_rows(
    loaded: None, server: Server, http: Any, protocol: str
) -> None:
    """Of equal shapes; one of another shape among them is a batch of its own."""
    shapes = [(1, 2, 3), (2, 2, 3), (1, 2, 3), (1, 3, 2), (2, 2, 3)]
    before = statistics(http, "upper")
    given = [objects(*shape, seed=i) for i, shape in enumerate(shapes)]

    async def run() -> list[Any]:
        async with aio_client(server, protocol) as client:
            calls = (
                infer_aio(client, "upper", {"words": words, "scale": scaled(len(words), i)})
                for i, words in enumerate(given)
            )
            return await asyncio.gather(*calls)

    for i, reply in enumerate(asyncio.run(run())):
        check_upper(reply, given[i], i)
    after = statistics(http, "upper")
    assert after["execution_count"] - before["execution_count"] < len(shapes)


def test_json_strings_of_any_shape(loaded: None, http: Any) -> None:
    module = module_of(http)
    words = module.InferInput("words", [2, 1, 2], "BYTES")
    texts = np.array([[["a\0b", "ü"]], [["", "x" * 300]]], object)
    words.set_data_from_numpy(texts, binary_data=False)
    scale = module.InferInput("scale", [2, 1, 1], "INT64")
    scale.set_data_from_numpy(scaled(2, 1), binary_data=False)
    outputs = [module.InferRequestedOutput("upper", binary_data=False)]
    reply = http.infer("upper", [words, scale], outputs=outputs)
    # bytes.upper() leaves what is not ASCII alone.
    assert reply.as_numpy("upper").tolist() == [[["A\0B", "ü"]], [["", "X" * 300]]]


def test_bytes_that_are_no_text_go_back_as_bytes_only(loaded: None, http: Any) -> None:
    words = np.array([[[b"\xff"]]], object)
    arrays = {"words": words, "scale": scaled(1, 1)}
    check_upper(infer(http, "upper", arrays), words, 1)
    outputs = [httpclient.InferRequestedOutput("upper", binary_data=False)]
    with pytest.raises(InferenceServerException, match="not UTF-8 text"):
        infer(http, "upper", arrays, outputs=outputs)
