"""What a model is tried with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.optimize import samples
from cluster.optimize.target import OptimizeError
from configs.model import ModelInput
from tests.models import config, string_input

CPU = torch.device("cpu")


class Tables(torch.nn.Module):
    """Token ids, a mask, and an id that is converted before it is looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(50, 4)
        self.kinds = torch.nn.Embedding(7, 4)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.words(ids) * mask.unsqueeze(-1) + self.kinds(kind)
        return found


def described(name: str, data_type: str = "TYPE_FP32", dims: tuple[int, ...] = (4,)) -> ModelInput:
    return ModelInput(name=name, data_type=data_type, dims=dims)


def build(inputs: list[ModelInput], call=lambda tensors: None, **fields) -> samples.Samples:
    return samples.build(config(inputs, {"y": (4,)}, **fields), call, CPU)


@pytest.mark.parametrize("scripted", [False, True])
def test_token_ids_lie_in_their_tables(scripted: bool) -> None:
    """Seen by running the model, so that a scripted one tells as much as an eager one."""
    model = Tables().eval()
    call = torch.jit.script(model) if scripted else model
    names = ("ids", "mask", "kind")
    made = build([described(n, "TYPE_INT64", (-1,)) for n in names], lambda t: call(*t))
    assert [int(t.max()) for t in made.tensors] == [49, 1, 6]
    assert [int(t.min()) for t in made.tensors] == [0, 0, 0]
    call(*made.batch(8))


def test_types_shapes_and_sizes() -> None:
    kinds = ["TYPE_FP32", "TYPE_FP16", "TYPE_BF16", "TYPE_BOOL", "TYPE_UINT8", "TYPE_INT32"]
    made = build([described(kind, kind, (3, 2)) for kind in kinds])
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.int32]
    assert [t.dtype for t in made.tensors] == dtypes
    assert all(t.shape == (8, 3, 2) for t in made.tensors)
    assert [t.shape[0] for t in made.batch(3)] == [3] * 6
    assert int(made.tensors[4].max()) > 1  # pictures have more than two shades
    again = build([described(kind, kind, (3, 2)) for kind in kinds])
    assert all(torch.equal(a, b) for a, b in zip(made.tensors, again.tensors, strict=True))


def test_free_dimensions_are_tried_with_two_sizes() -> None:
    made = build([described("x", dims=(-1, 2)), described("z", dims=(3,))])
    assert [t.shape for t in made.batch(2)] == [(2, 16, 2), (2, 3)]
    assert [t.shape for t in made.batch(2, shorter=True)] == [(2, 5, 2), (2, 3)]
    assert build([described("z")]).shorter is None


def test_a_model_without_a_batch_dimension() -> None:
    made = build([described("x", dims=(3,))], max_batch_size=0)
    assert [t.shape for t in made.batch(0)] == [(3,)]
    assert samples.checked_sizes(config([described("x")], {"y": (4,)}, max_batch_size=0), (0,)) == (
        0,
    )


def test_sizes() -> None:
    wide = config([described("x")], {"y": (4,)}, max_batch_size=32)
    assert samples.default_sizes(wide) == (1, 8, 32)
    assert samples.checked_sizes(wide, (1, 8, 32)) == (1, 2, 3, 8, 31, 32)
    single = config([described("x")], {"y": (4,)}, max_batch_size=1)
    assert samples.default_sizes(single) == (1,)
    assert samples.checked_sizes(single, (1,)) == (1,)


def test_strings_are_refused() -> None:
    ragged = described("x").model_copy(update={"allow_ragged_batch": True})
    with pytest.raises(OptimizeError, match=r"input\[0\].allow_ragged_batch: ragged batches"):
        build([ragged])
    with pytest.raises(OptimizeError, match="'words' is TYPE_STRING"):
        build([string_input("words")])


def test_a_model_that_fails_on_generated_inputs_asks_for_real_ones() -> None:
    def fails(tensors) -> None:
        raise RuntimeError("no zeros here")

    with pytest.raises(OptimizeError, match=r"no zeros here.*--samples FILE\.npz"):
        build([described("ids", "TYPE_INT64")], fails)


# --- the user's file -----------------------------------------------------------------------------


def from_file(tmp_path: Path, inputs: list[ModelInput], **arrays) -> samples.Samples:
    file = tmp_path / "real.npz"
    np.savez(file, **arrays)
    return samples.build(config(inputs, {"y": (4,)}), lambda tensors: None, CPU, file)


def test_rows_are_repeated_up_to_a_full_batch(tmp_path: Path) -> None:
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    made = from_file(tmp_path, [described("x")], x=rows)
    assert made.tensors[0].shape == (8, 4) and made.shorter is None
    assert torch.equal(made.tensors[0][3:6], torch.from_numpy(rows))


def test_free_dimensions_are_cut_in_half(tmp_path: Path) -> None:
    made = from_file(tmp_path, [described("x", dims=(-1, 2))], x=np.ones((1, 9, 2), np.float32))
    assert [t.shape for t in made.batch(8, shorter=True)] == [(8, 4, 2)]


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"z": np.ones((1, 4), np.float32)}, "has no array 'x', only z"),
        ({"x": np.ones((1, 4))}, "'x' is float64, and float32 is wanted"),
        ({"x": np.ones((1, 5), np.float32)}, r"shape \(1, 5\), not \[rows, 4\]"),
        ({"x": np.ones((0, 4), np.float32)}, r"shape \(0, 4\)"),
        ({"x": np.ones(4, np.float32)}, r"shape \(4,\)"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, arrays, text: str) -> None:
    with pytest.raises(OptimizeError, match=text):
        from_file(tmp_path, [described("x")], **arrays)


def test_what_is_no_npz_file(tmp_path: Path) -> None:
    file = tmp_path / "real.npz"
    file.write_bytes(b"nothing")
    for path in (file, tmp_path / "absent.npz"):
        with pytest.raises(OptimizeError, match="cannot read"):
            samples.build(config([described("x")], {"y": (4,)}), lambda tensors: None, CPU, path)
