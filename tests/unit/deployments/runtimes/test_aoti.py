from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import ConfigError
from configs.model import ModelConfig
from configs.parameters import ModelParameters
from deployments import runtimes
from deployments.errors import InvalidArgument
from deployments.runtimes import aoti, autocomplete, package
from deployments.signature import Signature, Slot
from tests import models
from tests.models import config

INPUTS = ["ARGS[0]", "ARGS[1]", "ARGS[2][keyA]", "ARGS[2][key2]", "KWARGS[kwarg1]"]
OUTPUTS = {
    "RESULT[AAA]": "OUTPUT__0",
    "RESULT[BBB][0]": "OUTPUT__2",
    "RESULT[BBB][1]": "OUTPUT__3",
    "RESULT[CCC][keyA]": "OUTPUT__4",
    "RESULT[CCC][key2]": "OUTPUT__5",
    "RESULT[DDD][KA]": "OUTPUT__6",
    "RESULT[DDD][KB]": "OUTPUT__7",
    "RESULT[ZZZ]": "OUTPUT__1",
}


def load(path: Path, inputs, outputs, device: str = "cpu", **fields):
    made = config(
        {n: (16,) for n in inputs}, {n: (16,) for n in outputs}, platform="torch_aoti", **fields
    )
    return runtimes.load(path, made, ModelParameters(), device, "KIND_CPU")


def tensors(rows: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return [torch.rand(rows, 16, generator=generator) for _ in range(6)]


def direct(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """In the order of OUTPUTS."""
    h, v, key_a, key_2, kw1, kw2 = values
    out = models.Seed()(h, v, {"keyA": key_a, "key2": key_2}, kwarg1=kw1, kw_arg2=kw2)
    c, d = out["CCC"], out["DDD"]
    return [out["AAA"], *out["BBB"], c["keyA"], c["key2"], d["KA"], d["KB"], out["ZZZ"]]


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_the_seed_example(seed_package, rows):
    """One row too: torch.export's own lower bound of two is not the client's business."""
    values = tensors(rows)
    got = load(seed_package, [*INPUTS, "KWARGS[kw_arg2]"], OUTPUTS).run(values)
    for mine, theirs in zip(got, direct(values), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_ordinals_are_the_same_slots_and_mix(seed_package):
    values = tensors(3)
    inputs = ["INPUT__5", "ARGS[0]", "INPUT__1", "ARGS[2][keyA]", "INPUT__3", "KWARGS[kwarg1]"]
    mixed = [ordinal if i % 2 else name for i, (name, ordinal) in enumerate(OUTPUTS.items())]
    got = load(seed_package, inputs, mixed).run([values[5], *values[:5]])
    for mine, theirs in zip(got, direct(values), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_names_outside_the_spec(seed_package):
    with pytest.raises(ConfigError, match=r"'x__5' is not found .*KWARGS\[kwarg1\] \(INPUT__4\)"):
        load(seed_package, [*INPUTS, "x__5"], OUTPUTS)
    with pytest.raises(ConfigError, match="same input"):
        load(seed_package, [*INPUTS, "INPUT__4"], OUTPUTS)
    with pytest.raises(ConfigError, match=r"output\[0\].name: output 'RESULT\[BBB\]'"):
        load(seed_package, [*INPUTS, "INPUT__5"], ["RESULT[BBB]"])
    with pytest.raises(ConfigError, match="expects 5 inputs, model provides 6"):
        load(seed_package, INPUTS, OUTPUTS)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(2, 17),
        torch.zeros(2, 16, dtype=torch.float64),
        torch.zeros(2, 16, dtype=torch.int32),
        torch.zeros(2, 1, 16),
    ],
)
def test_what_does_not_fit_is_an_error_not_garbage(seed_package, wrong):
    runtime = load(seed_package, [*INPUTS, "INPUT__5"], OUTPUTS)
    values = tensors(2)
    with pytest.raises(InvalidArgument, match=r"input 'ARGS\[1\]' does not fit"):
        runtime.run([values[0], wrong, *values[2:]])


def test_more_rows_than_it_was_compiled_for(seed_package):
    runtime = load(seed_package, [*INPUTS, "INPUT__5"], OUTPUTS, max_batch_size=8)
    with pytest.raises(InvalidArgument, match="too large"):
        runtime.run(tensors(9))
    with pytest.raises(ConfigError, match="max_batch_size is 16, and the model .* at most 8"):
        load(seed_package, [*INPUTS, "INPUT__5"], OUTPUTS, max_batch_size=16)


def test_the_configuration_is_held_against_the_package(seed_package):
    inputs = [*INPUTS, "INPUT__5"]
    with pytest.raises(ConfigError, match=r"input\[0\].data_type: .* TYPE_FP64, .* TYPE_FP32"):
        load(seed_package, inputs, OUTPUTS, data_type="TYPE_FP64")
    with pytest.raises(ConfigError, match=r"input\[0\].dims: .* has dims \[16\], .* \[-1, 16\]"):
        load(seed_package, inputs, OUTPUTS, max_batch_size=0)
    wide = config({n: (-1,) for n in inputs}, {n: (16,) for n in OUTPUTS}, platform="torch_aoti")
    runtime = runtimes.load(seed_package, wide, ModelParameters(), "cpu", "KIND_CPU")
    values = tensors(2)
    with pytest.raises(InvalidArgument, match="expected: 16, but got: 5"):  # A16
        runtime.run([torch.zeros(2, 5), *values[1:]])


def test_a_package_without_its_source_is_asked(seed_package, tmp_path, monkeypatch):
    """What it takes is then known only from what it refuses."""
    monkeypatch.setattr(package, "read", lambda path: package.Package({}))
    inputs = [*INPUTS, "INPUT__5"]
    assert load(seed_package, inputs, OUTPUTS, max_batch_size=8).run(tensors(3))
    with pytest.raises(ConfigError, match="max_batch_size is 9, .* batches of at most 8 rows"):
        load(seed_package, inputs, OUTPUTS, max_batch_size=9)
    bare = ModelConfig(name="model", platform="torch_aoti", open_batch=True)
    with pytest.raises(ConfigError, match=r"does not tell what ARGS\[0\], .* must be"):
        aoti.offer(seed_package, bare, "cpu", "KIND_CPU")


def test_completed_from_nothing(seed_package):
    bare = ModelConfig(name="model", backend="pytorch", platform="torch_aoti", open_batch=True)
    made = autocomplete.complete(seed_package, bare, ModelParameters(), "cpu", "KIND_CPU")
    assert made.max_batch_size == 8
    assert [t.name for t in made.input] == [*INPUTS, "KWARGS[kw_arg2]"]
    assert {t.name for t in made.output} == set(OUTPUTS)
    tensors_of: list[Any] = [*made.input, *made.output]
    assert {(t.data_type, t.dims) for t in tensors_of} == {("TYPE_FP32", (16,))}
    values = tensors(1)
    got = runtimes.load(seed_package, made, ModelParameters(), "cpu", "KIND_CPU").run(values)
    named = dict(zip(OUTPUTS, direct(values), strict=True))
    for mine, output in zip(got, made.output, strict=True):
        assert isinstance(mine, torch.Tensor)
        assert torch.allclose(mine, named[output.name], atol=1e-5)


def test_package_for_another_device(seed_package):
    with pytest.raises(ConfigError, match="compiled for cpu, and this instance runs on cuda"):
        load(seed_package, [*INPUTS, "INPUT__5"], OUTPUTS, device="cuda:0")


def test_a_leaf_that_is_no_tensor_is_a_load_error(seed_package):
    """An int among the sample inputs is a leaf of the spec that the code does not take."""
    runtime = load(seed_package, [*INPUTS, "INPUT__5"], OUTPUTS)
    seven = Signature(tuple(Slot(i, f"INPUT__{i}") for i in range(7)), closed=True)
    with pytest.raises(ConfigError, match="names 7 inputs and its code takes 6"):
        aoti._check_slots(runtime._loader, seven)


def test_other_archives_are_refused(tmp_path):
    path = models.version_folder(tmp_path) / "model.pt2"
    torch.export.save(torch.export.export(models.add_sub(), (torch.ones(4), torch.ones(4))), path)
    with pytest.raises(ConfigError, match="torch.export.save, .*torch_export"):
        load(path, ["INPUT__0"], ["OUTPUT__0"])
    script = models.save_torchscript(models.add_sub(), tmp_path)
    with pytest.raises(ConfigError, match='platform: "pytorch_libtorch"'):
        load(script, ["INPUT__0"], ["OUTPUT__0"])
    path.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="not readable as a .pt2 archive"):
        load(path, ["INPUT__0"], ["OUTPUT__0"])


def test_package_given_to_torchscript(seed_package):
    with pytest.raises(ConfigError, match='set platform: "torch_aoti"'):
        made = config({"INPUT__0": (16,)}, {"OUTPUT__0": (16,)})
        runtimes.load(seed_package, made, ModelParameters(), "cpu", "KIND_CPU")


def test_a_package_for_another_processor_is_refused(monkeypatch, seed_package):
    """Its first unknown instruction would end the process, again and again."""
    assert aoti._refuse_processor("") == aoti._refuse_processor("INVALID_VEC_ISA") == ""
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    refusal = aoti._refuse_processor("AVX512 AVX512_VNNI")
    assert "a processor with AVX512, AVX512_VNNI, which this one has not" in refusal
    load(seed_package, [*INPUTS, "INPUT__5"], OUTPUTS)  # compiled without either


def test_what_asks_the_processor_is_there():
    for name in ("_is_avx2_supported", "_is_avx512_supported", "_is_vnni_supported"):
        assert isinstance(getattr(torch.cpu, name)(), bool)


def test_loading_leaves_the_compiler_alone(seed_package):
    """Packages are run without the parts of torch that make them, which weigh 80 MB."""
    code = f"""
import sys
from deployments.runtimes import aoti
from tests.unit.deployments.runtimes import test_aoti as t
from pathlib import Path
runtime = t.load(Path({str(seed_package)!r}), [*t.INPUTS, "INPUT__5"], t.OUTPUTS)
assert len(runtime.run(t.tensors(2))) == 8
print([name for name in ("sympy", "torch._dynamo", "torch._inductor") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == "[]", done.stderr
