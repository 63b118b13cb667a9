"""Requests of unequal shapes in one batch: what the model is told, and who gets which elements."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tritonclient.utils import InferenceServerException

from configs.pbtxt import to_proto
from tests import models
from tests.ragged import SOURCE, packed, packed_config, told
from tests.serve import repository
from tests.serve.clients import aio_client, infer_aio, loading, statistics
from tests.serve.server import Server

# So long that eight rows are one batch, however slowly they come: no test here has fewer.
HELD = "dynamic_batching { preferred_batch_size: [ 8 ] max_queue_delay_microseconds: 20000000 }"
EIGHT_ROWS = [(1, 3), (2, 1), (1, 0), (1, 7), (3, 2)]
PROTOCOLS = pytest.mark.parametrize("protocol", ["http", "grpc"])
MODELS = pytest.mark.parametrize("model", ["ragged", "ragged_eager"])


def write(root: Path, name: str, text: str) -> None:
    repository.write_config(root, name, text + HELD + "\n" + repository.EAGER)


@pytest.fixture(scope="module")
def loaded(
    models_root: Path, server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    made = packed_config().model_copy(update={"name": ""})
    module = packed(tmp_path_factory.mktemp("packed") / "packed.py")
    for name in ("ragged", "ragged_lost"):
        models.save_torchscript(module, models_root, name)
    write(models_root, "ragged", str(to_proto(made)))
    write(models_root, "ragged_lost", str(to_proto(made)).replace('"starts"', '"begins"'))
    models.save_eager(SOURCE, models_root, "ragged_eager")
    eager = made.model_copy(update={"platform": "", "runtime": "model.py"})
    write(models_root, "ragged_eager", str(to_proto(eager)))
    with loading(server, ("ragged", "ragged_eager")):
        yield


def arrays(shapes: Sequence[tuple[int, ...]], spoilt: int | None = None) -> list[dict[str, Any]]:
    made = []
    for k, shape in enumerate(shapes):
        x = np.random.default_rng(k).random(shape, np.float32)
        made.append({"x": -1 - x if k == spoilt else x, "id": np.full((shape[0], 1), k, np.int32)})
    return made


def at_once(server: Server, protocol: str, model: str, given: list[dict[str, Any]]) -> list[Any]:
    async def run() -> list[Any]:
        async with aio_client(server, protocol) as client:
            calls = (infer_aio(client, model, each) for each in given)
            return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(run())


def direct(given: dict[str, Any]) -> npt.NDArray[np.float32]:
    """The first output, of a direct call for this request alone."""
    doubled: npt.NDArray[np.float32] = (torch.from_numpy(given["x"]).flatten() * 2).numpy()
    return doubled.reshape(given["x"].shape)


def check(reply: Any, given: dict[str, Any]) -> list[float]:
    """The member's own; returns what its rows were told of the batch."""
    np.testing.assert_array_equal(reply.as_numpy("OUTPUT__0"), direct(given))
    np.testing.assert_array_equal(reply.as_numpy("OUTPUT__2"), given["id"])
    seen = reply.as_numpy("OUTPUT__1")
    assert len(seen) == len(given["x"])
    assert all(row == seen[0].tolist() for row in seen.tolist())
    found: list[float] = seen[0].tolist()
    return found


@PROTOCOLS
@MODELS
def test_unequal_shapes_are_one_batch(
    loaded: None, server: Server, http: Any, model: str, protocol: str
) -> None:
    before = statistics(http, model)
    given = arrays(EIGHT_ROWS)
    replies = at_once(server, protocol, model, given)
    seen = [check(reply, each) for reply, each in zip(replies, given, strict=True)]
    assert all(each == seen[0] for each in seen)  # all of one batch
    # In the order in which they came, which the counts tell: no two are equal here.
    counts = seen[0][: len(EIGHT_ROWS)]
    by_count = {float(np.prod(shape)): shape for shape in EIGHT_ROWS}
    assert seen[0] == told([by_count[count] for count in counts])
    after = statistics(http, model)
    assert after["execution_count"] - before["execution_count"] == 1
    assert after["inference_count"] - before["inference_count"] == 8


@PROTOCOLS
def test_equal_shapes_are_flat_too(loaded: None, server: Server, protocol: str) -> None:
    """They come joined to the replica, rows and all."""
    shapes: list[tuple[int, ...]] = [(1, 4)] * 8
    given = arrays(shapes)
    for reply, each in zip(at_once(server, protocol, "ragged", given), given, strict=True):
        assert check(reply, each) == told(shapes)


@PROTOCOLS
def test_a_request_alone_is_flat_as_well(loaded: None, server: Server, protocol: str) -> None:
    given = arrays([(8, 5)])
    (reply,) = at_once(server, protocol, "ragged", given)
    assert check(reply, given[0]) == told([(8, 5)])


@PROTOCOLS
@MODELS
def test_large_ones_go_by_shared_memory(
    loaded: None, server: Server, model: str, protocol: str
) -> None:
    given = arrays([(1, 90_000), (1, 200_001), (2, 70_000), (4, 33_333)])
    for reply, each in zip(at_once(server, protocol, model, given), given, strict=True):
        check(reply, each)


@PROTOCOLS
@MODELS
def test_a_culprit_fails_alone(loaded: None, server: Server, model: str, protocol: str) -> None:
    given = arrays(EIGHT_ROWS, spoilt=1)
    for k, reply in enumerate(at_once(server, protocol, model, given)):
        if k == 1:
            assert isinstance(reply, InferenceServerException)
            assert "negative value" in str(reply.message())
        else:  # run again by itself, and told so
            assert check(reply, given[k]) == told([EIGHT_ROWS[k]])


def test_a_target_that_the_model_does_not_have(loaded: None, http: Any) -> None:
    with pytest.raises(InferenceServerException) as caught:
        http.load_model("ragged_lost")
    assert "batch_input[2].target_name: batch input 'begins' must be an argument of" in str(
        caught.value
    )
