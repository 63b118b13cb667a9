"""Requests in all their forms, read back by an independent reader; answers read from all forms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tritonclient.grpc import service_pb2

from benchmarks import baseline, limit, models, wire
from benchmarks.models import MODELS, Model

TINY, ENCODER = MODELS["tiny"], MODELS["encoder"]


@pytest.mark.parametrize("model", [TINY, ENCODER], ids=lambda model: model.name)
def test_v2_binary(model: Model):
    row = model.one_row()
    request = wire.v2_binary(model, row)
    length = int(dict(request.headers)[wire.HEADER])
    (given,) = json.loads(request.body[:length])["inputs"]
    assert given["shape"] == [1, *model.row] and given["datatype"] == model.datatype
    assert request.body[length:] == row.tobytes()
    assert given["parameters"]["binary_data_size"] == row.nbytes
    assert request.path == f"/v2/models/{model.name}/infer"


@pytest.mark.parametrize("model", [TINY, ENCODER], ids=lambda model: model.name)
def test_v2_json_gives_the_same_numbers(model: Model):
    row = model.one_row()
    (given,) = json.loads(wire.v2_json(model, row).body)["inputs"]
    assert np.array_equal(np.array(given["data"], row.dtype), row.reshape(-1))


def test_v2_grpc_has_the_prefix():
    row = TINY.one_row()
    body = wire.v2_grpc(TINY, row).body
    assert body[0] == 0 and int.from_bytes(body[1:5], "big") == len(body) - 5
    message = service_pb2.ModelInferRequest.FromString(body[5:])
    assert message.raw_input_contents[0] == row.tobytes()


def test_only_numbers_as_text_differ_in_size():
    row = TINY.one_row()
    assert wire.v2_grpc(TINY, row).one_size and wire.raw_bytes(TINY, row, "/").one_size
    assert wire.v2_binary(TINY, row).one_size and not wire.v2_json(TINY, row).one_size


def test_answers_in_all_forms():
    values = np.arange(16, dtype=np.float32).reshape(1, 16)
    output = {"name": "OUTPUT__0", "shape": [1, 16], "datatype": "FP32"}
    text = json.dumps({"outputs": [output]}).encode()
    headers = {wire.HEADER.lower(): str(len(text))}
    in_json = json.dumps({"outputs": [output | {"data": values.reshape(-1).tolist()}]}).encode()
    reply = service_pb2.ModelInferResponse()
    reply.outputs.add(name="OUTPUT__0", datatype="FP32", shape=[1, 16])
    typed = service_pb2.ModelInferResponse.FromString(reply.SerializeToString())
    reply.raw_output_contents.append(values.tobytes())
    typed.outputs[0].contents.fp32_contents.extend(values.reshape(-1).tolist())
    answers = [
        wire.read_v2(headers, text + values.tobytes()),
        wire.read_v2({}, in_json),
        wire.read_grpc({}, reply.SerializeToString()),
        wire.read_grpc({}, typed.SerializeToString()),
        wire.reader_of_rows(TINY)({}, values.tobytes()),
    ]
    assert all(wire.error_of(answer, values) == 0 for answer in answers)


def test_a_wrong_answer_shows():
    right = np.full((1, 4), 10, np.float32)
    assert wire.error_of(right + 1, right) == pytest.approx(0.1)
    with pytest.raises(wire.WireError, match="shape"):
        wire.error_of(right.reshape(4, 1), right)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_the_baseline_answers_as_torch_does(tmp_path: Path):
    file = models.build(TINY, tmp_path)
    row = TINY.one_row()
    request = wire.v2_binary(TINY, row)
    length = int(dict(request.headers)[wire.HEADER])
    body, header_bytes = baseline.answer(torch.jit.load(str(file)), request.body, length)
    answer = request.read({wire.HEADER.lower(): str(header_bytes)}, body)
    assert np.array_equal(answer, models.expected(TINY, file, row))


@pytest.mark.parametrize("name", ["mlp", "encoder", "large4"])
def test_models_are_the_same_when_built_again(name: str, tmp_path: Path):
    model = MODELS[name]
    row = model.one_row()
    first, second = [
        models.expected(model, models.build(model, tmp_path / folder), row) for folder in "ab"
    ]
    assert np.array_equal(first, second) and first.shape == (1, *model.output)


@pytest.mark.parametrize("name", ["encoder", "resnet18"])
def test_a_row_does_not_depend_on_its_batch(name: str):
    model = MODELS[name]
    torch.manual_seed(0)
    network, row = model.build().eval(), torch.from_numpy(model.one_row())
    with torch.inference_mode():
        alone, many = network(row), network(row.expand(3, *row.shape[1:]))
    assert alone.shape == (1, *model.output) and many.shape == (3, *model.output)
    assert torch.allclose(alone[0], many[2], atol=1e-3)


def test_the_limit_counts_rows():
    batch = torch.zeros(4, 16)
    result = limit.measure(torch.neg, batch, warm_up_s=0.0, seconds=0.0)
    assert (result["calls"], result["rows"]) == (1, 4)
    assert result["seconds"] > 0


def test_configuration_without_batching_for_large_rows():
    assert "dynamic_batching { max_queue_delay_microseconds: 7 }" in TINY.config(7)
    assert "dynamic_batching" not in MODELS["large4"].config(7)
