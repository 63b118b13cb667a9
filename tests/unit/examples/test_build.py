"""The builder: configurations that Triton takes, weights that land, nothing kept half-made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from configs import pbtxt
from examples import build
from examples.models.minilm import Encoder

CONFIGS = sorted(build.SOURCES.glob("*/config.pbtxt"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_config_is_valid_for_triton_and_for_us(path: Path):
    build.check_config(path)
    ours = pbtxt.parse(path.read_text(), str(path), path.parent.name)
    official = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    assert ours.max_batch_size == official.max_batch_size > 0
    assert ours.dynamic_batching is not None


def test_every_recipe_has_a_config_and_the_other_way_round():
    assert {path.parent.name for path in CONFIGS} == set(build.SMALL | build.EMBEDDINGS)


def test_build_moves_in_whole_models_and_leaves_current_ones_alone(tmp_path: Path):
    output = tmp_path / "repository"
    assert build.build("add_sub", build.build_add_sub, output).startswith("built")
    file = output / "add_sub" / "1" / "model.pt"
    made = file.stat().st_mtime_ns
    assert build.build("add_sub", build.build_add_sub, output) == "up to date"
    assert file.stat().st_mtime_ns == made
    one, other = torch.rand(3, 16), torch.rand(3, 16)
    total, difference = torch.jit.load(file)(one, other)
    assert torch.equal(total, one + other) and torch.equal(difference, one - other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["repository"]


def test_a_failed_build_keeps_the_old_model(tmp_path: Path):
    output = tmp_path / "repository"
    build.build("add_sub", build.build_add_sub, output)
    (output / "add_sub" / ".built").write_text("of another recipe")

    def fail(version: Path) -> float:
        raise build.BuildError("add_sub: no")

    with pytest.raises(build.BuildError):
        build.build("add_sub", fail, output)
    assert (output / "add_sub" / "1" / "model.pt").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["repository"]


def test_check_refuses_an_artifact_that_differs_or_is_not_a_number():
    samples = [(torch.zeros(2),)]
    assert build.check("same", torch.cos, torch.cos, samples) == 0
    for made in (lambda x: x, lambda x: x / 0):
        with pytest.raises(build.BuildError, match="differs from eager"):
            build.check("other", torch.cos, made, samples)


def test_read_safetensors(tmp_path: Path):
    tensors = {"a": torch.rand(2, 3), "b": torch.arange(4)}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    raw = b""
    for name, tensor in tensors.items():
        data = tensor.numpy().tobytes()
        kind = {torch.float32: "F32", torch.int64: "I64"}[tensor.dtype]
        span = [len(raw), len(raw) + len(data)]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": span}
        raw += data
    text = json.dumps(header).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw)
    found = build.read_safetensors(file)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def small_encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(vocabulary=50, width=16, layers=2, heads=4, inner=32, positions=12).eval()


def test_encoder_equals_torchs_own_layers():
    encoder = small_encoder()
    ids = torch.randint(50, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    with torch.no_grad():
        x = encoder.word(ids) + encoder.position.weight[:7] + encoder.segment.weight[0]
        x = encoder.norm(x)
        for layer in encoder.layers:
            twin = torch.nn.TransformerEncoderLayer(16, 4, 32, 0, "gelu", 1e-12, batch_first=True)
            twin = twin.eval()
            qkv = [layer[name] for name in ("query", "key", "value")]  # type: ignore[index]
            attention, parts = twin.self_attn, dict(layer.named_children())
            attention.in_proj_weight.copy_(torch.cat([one.weight for one in qkv]))
            attention.in_proj_bias.copy_(torch.cat([one.bias for one in qkv]))
            attention.out_proj.load_state_dict(parts["mix"].state_dict())
            twin.norm1.load_state_dict(parts["mix_norm"].state_dict())
            twin.linear1.load_state_dict(parts["expand"].state_dict())
            twin.linear2.load_state_dict(parts["shrink"].state_dict())
            twin.norm2.load_state_dict(parts["shrink_norm"].state_dict())
            x = twin(x, src_key_padding_mask=mask == 0)
        rows = [row[: int(kept.sum())].mean(0) for row, kept in zip(x, mask, strict=True)]
        expected = torch.nn.functional.normalize(torch.stack(rows), dim=1)
        assert torch.allclose(encoder(ids, mask), expected, atol=1e-5)


def test_encoder_ignores_padding_and_survives_an_empty_row():
    encoder = small_encoder()
    ids = torch.randint(50, (2, 5))
    mask = torch.ones_like(ids)
    longer = torch.cat((ids, torch.zeros(2, 4, dtype=torch.int64)), 1)
    with torch.inference_mode():
        padded = encoder(longer, (torch.arange(9) < 5).long().expand(2, 9))
        assert torch.allclose(padded, encoder(ids, mask), atol=1e-6)
        assert torch.isfinite(encoder(ids, mask * 0)).all()


def test_rename_covers_the_whole_state():
    encoder = small_encoder()
    empty: dict[str, torch.Tensor] = {}
    assert build.rename(empty, 2) == {}
    state = encoder.state_dict()
    theirs = {
        "layers.": "encoder.layer.",
        "word": "embeddings.word_embeddings",
        "position": "embeddings.position_embeddings",
        "segment": "embeddings.token_type_embeddings",
        "shrink_norm": "output.LayerNorm",
        "mix_norm": "attention.output.LayerNorm",
        "mix": "attention.output.dense",
        "expand": "intermediate.dense",
        "shrink": "output.dense",
    }
    published = {}
    for name, tensor in state.items():
        for ours, other in theirs.items():
            name = name.replace(ours, other)
        for part in ("query", "key", "value"):
            name = name.replace(f".{part}.", f".attention.self.{part}.")
        if name.startswith("norm."):
            name = f"embeddings.LayerNorm.{name[5:]}"
        published[name] = tensor
    renamed = build.rename(published, 2)
    assert renamed.keys() == state.keys()
    assert all(torch.equal(renamed[name], tensor) for name, tensor in state.items())


@pytest.mark.skipif(build.minilm_folder() is None, reason="needs the extra 'examples'")
def test_the_published_weights_land_and_know_paraphrases():
    from tokenizers import Tokenizer

    folder = build.minilm_folder()
    assert folder is not None
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    sentences = ["A man is playing a guitar on stage.", "Someone performs music with a guitar."]
    encodings = tokenizer.encode_batch([*sentences, "The stock market fell sharply today."])
    ids = torch.tensor([one.ids for one in encodings])
    mask = torch.tensor([one.attention_mask for one in encodings])
    with torch.inference_mode():
        embeddings = build.load_encoder()(ids, mask)
    similar = embeddings @ embeddings.T
    # What transformers 5 computes with the same weights.
    expected = torch.tensor([[1, 0.6861, -0.0830], [0.6861, 1, -0.0524], [-0.0830, -0.0524, 1]])
    assert torch.allclose(similar, expected, atol=2e-4)
