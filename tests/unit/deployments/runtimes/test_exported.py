"""Programs of torch.export.save, beside what torch itself makes of them."""

from __future__ import annotations

import json
import pickle
import threading
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from configs.complete import of_content
from configs.errors import ConfigError
from configs.model import ModelConfig
from configs.parameters import ModelParameters
from deployments import archives, runtimes
from deployments.errors import InvalidArgument
from deployments.runtimes import autocomplete, compiling, exported, vetting
from tests import models

BARE = ModelConfig(name="m", backend="pytorch", platform="torch_export", open_batch=True)


class Odd(torch.nn.Module):
    """A number among the arguments, a keyword, state, half precision, several kinds of results."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(1))
        self.runs: torch.Tensor
        self.embedding = torch.nn.Embedding(5, 3)

    def forward(self, x, factor, *, ids):
        self.runs += 1
        y = x.float() * factor + self.embedding(ids)
        return {"y": y, "sum": y.sum(1)}, factor, self.runs.clone()


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    torch.manual_seed(0)
    module = Odd().eval()
    rows = torch.export.Dim("rows", min=3, max=9)
    made = torch.export.export(
        module,
        (torch.ones(4, 3, dtype=torch.float16), 3),
        {"ids": torch.zeros(4, dtype=torch.int64)},
        dynamic_shapes={"x": {0: rows}, "factor": None, "ids": {0: rows}},
    )
    return module, save(made, tmp_path_factory.mktemp("odd"))


@pytest.fixture(scope="module")
def seed(tmp_path_factory):
    return save(models.export_seed(), tmp_path_factory.mktemp("seed"))


def save(made, root: Path) -> Path:
    path = models.version_folder(root, "m") / "model.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(made, str(path))
    return path


def complete(path, config=BARE):
    return autocomplete.complete(path, config, ModelParameters(), "cpu", "KIND_CPU")


def load(path, config=None, **parameters):
    config = config or complete(path)
    return runtimes.load(path, config, ModelParameters(**parameters), "cpu", "KIND_CPU")


def test_all_of_a_configuration_comes_from_the_archive(odd):
    _, path = odd
    config = complete(path)
    assert config.max_batch_size == 0  # the count of runs has no batch
    assert [(t.name, t.data_type, t.dims) for t in config.input] == [
        ("ARGS[0]", "TYPE_FP16", (-1, 3)),
        ("KWARGS[ids]", "TYPE_INT64", (-1,)),
    ]
    assert [(t.name, t.data_type, t.dims) for t in config.output] == [
        ("RESULT[0][y]", "TYPE_FP32", (-1, 3)),
        ("RESULT[0][sum]", "TYPE_FP32", (-1,)),
        ("RESULT[2]", "TYPE_FP32", (1,)),
    ]


def test_the_seed_example_is_the_same_as_its_package(seed):
    config = complete(seed)
    assert config.max_batch_size == 8
    values = [torch.rand(3, 16) for _ in config.input]
    found = load(seed, config).run(values)
    h, v, key_a, key_2, kw1, kw2 = values
    out = models.Seed()(h, v, {"keyA": key_a, "key2": key_2}, kwarg1=kw1, kw_arg2=kw2)
    wanted = {"RESULT[AAA]": out["AAA"], "RESULT[BBB][1]": v, "RESULT[DDD][KB]": kw2}
    names = [tensor.name for tensor in config.output]
    for name, tensor in wanted.items():
        assert torch.equal(found[names.index(name)], tensor)


def test_numbers_and_keywords_and_few_rows(odd):
    """Three rows are the fewest that it was exported for: less is filled up, and cut again."""
    module, path = odd
    some = {
        "input": ({"name": "INPUT__2"}, {"name": "ARGS[0]"}),
        "output": ({"name": "OUTPUT__0"},),
    }
    given = ModelConfig.model_validate({**BARE.model_dump(), **some, "max_batch_size": 9})
    config = complete(path, given)
    runtime = load(path, config)
    for rows in (1, 4, 9):
        x = torch.rand(rows, 3).half()
        ids = torch.randint(5, (rows,))
        (found,) = runtime.run([ids, x])
        assert torch.allclose(found, module(x, 3, ids=ids)[0]["y"])


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (torch.zeros(2, 17), "unmatched dim value at 1, expected: 16, but got: 17"),
        (torch.zeros(9, 16), "unmatched dim value at 0, expected to be <= 8, but got: 9"),
        (torch.zeros(2, 16).double(), "unmatched dtype, expected: float32, but got: float64"),
        (torch.zeros(2, 1, 16), "unmatched rank, expected: 2, but got: 3"),
    ],
)
def test_what_does_not_fit_is_an_error(seed, wrong, reason):
    values = [torch.zeros(2, 16) for _ in range(6)]
    with pytest.raises(InvalidArgument, match=rf"input 'ARGS\[1\]' .*{reason}"):
        load(seed).run([values[0], wrong, *values[2:]])


def test_sizes_that_must_be_equal(seed):
    config = complete(seed).model_copy(update={"max_batch_size": 0})
    wide = [t.model_copy(update={"dims": (-1, 16)}) for t in config.input]
    results = [t.model_copy(update={"dims": (-1, 16)}) for t in config.output]
    config = config.model_copy(update={"input": tuple(wide), "output": tuple(results)})
    values = [torch.zeros(2 + (k == 3), 16) for k in range(6)]
    with pytest.raises(InvalidArgument, match="which needs .*size"):
        load(seed, config).run(values)


def test_state_is_not_shared(odd):
    _, path = odd
    with pytest.raises(ConfigError, match=r"changes its own state .*\(runs\)"):
        load(path, enable_weight_sharing=True)


def test_contradictions(seed, odd):
    config = complete(seed)
    with pytest.raises(ConfigError, match="max_batch_size is 9, and the model .* at most 8"):
        load(seed, config.model_copy(update={"max_batch_size": 9}))
    with pytest.raises(ConfigError, match="inputs that are no tensors"):
        load(odd[1], compile_on_load=True)


def test_the_file_tells_what_it_is(seed, seed_package, tmp_path):
    sniffed = ModelConfig(name="m", platform="torch_aoti")
    kinds = [archives.inspect(path).kind for path in (seed, seed_package)]
    assert [of_content(sniffed, False, kind).platform for kind in kinds] == [
        "torch_export",
        "torch_aoti",
    ]
    assert of_content(sniffed, True, "exported").platform == "torch_aoti"  # somebody has said so
    stated = complete(seed).model_copy(update={"platform": "torch_aoti"})
    with pytest.raises(ConfigError, match='set platform: "torch_export"'):
        load(seed, stated)
    with pytest.raises(ConfigError, match='set platform: "torch_aoti"'):
        complete(seed_package)
    script = models.save_torchscript(models.add_sub(), tmp_path)
    with pytest.raises(ConfigError, match='platform: "pytorch_libtorch"'):
        complete(script.rename(script.with_suffix(".pt2")))


# --- what may be loaded --------------------------------------------------------------------------


def rewrite(path: Path, target: Path, changes) -> Path:
    """A copy in which `changes` have seen each record."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as copy:
        for info in source.infolist():
            name = info.filename.partition("/")[2]
            copy.writestr(info.filename, changes(name, source.read(info)))
    return target


def described(path: Path, target: Path, more) -> Path:
    """A copy whose program says `more`."""
    return rewrite(
        path,
        target,
        lambda name, data: (
            json.dumps({**json.loads(data), **more}).encode()
            if name == "models/model.json"
            else data
        ),
    )


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/manta-was-here"),))


def test_pickles_are_refused(seed, tmp_path):
    """torch.export.load would run them; the control is the same archive without."""
    vetting.check(seed, "m")

    def evil(name, data):
        return pickle.dumps(Evil()) if name == "data/sample_inputs/model.pt" else data

    with pytest.raises(ConfigError, match="not loaded: its sample inputs hold more than plain"):
        load(rewrite(seed, tmp_path / "model.pt2", evil), complete(seed))
    assert not Path("/tmp/manta-was-here").exists()


def test_weights_that_are_pickles_are_refused(odd, tmp_path):
    def pickled(name, data):
        if not name.endswith("model_weights_config.json"):
            return data
        listed = json.loads(data)
        next(iter(listed["config"].values()))["use_pickle"] = True
        return json.dumps(listed).encode()

    with pytest.raises(ConfigError, match="is a pickle, and unpickling runs code"):
        load(rewrite(odd[1], tmp_path / "model.pt2", pickled), complete(odd[1]))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model/data/constants/opaque_obj_evil", "is a pickle"),
        ("model/data/constants/custom_obj_0", "is a pickle"),
        ("model/data/weights/an-other.pt", "is a pickle"),
        ("model/models/other.json", "'models/other.json' in it is not part of the program"),
        ("model/models/MODEL.JSON", "'models/MODEL.JSON' in it is not part of the program"),
        ("model/data/sample_inputs/other.pt", "not part of the program"),
        ("elsewhere/models/model.json", "cannot be read"),
        ("version", "torch 2.7"),
    ],
)
def test_what_torch_would_load_beside_the_program(seed, tmp_path, name, reason):
    """The control: a file among the extra ones, which torch only reads."""
    with zipfile.ZipFile(seed) as archive:
        root = archive.namelist()[0].partition("/")[0]
    for added in (f"{root}/extra/notes.txt", name.replace("model/", f"{root}/", 1)):
        path = rewrite(seed, tmp_path / "model.pt2", lambda _, data: data)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(added, pickle.dumps(Evil()))
        if "/extra/" in added:
            vetting.check(path, "m")
    with pytest.raises(ConfigError, match=f"not loaded: .*{reason}"):
        vetting.check(path, "m")


def test_constants_that_name_a_pickle_are_refused(seed, tmp_path):
    """Wherever it lies: torch unpickles what a constant's path says."""
    entry = {"path_name": "opaque_obj_/../../../extra/evil", "use_pickle": False}

    def named(name, data):
        if not name.endswith("model_constants_config.json"):
            return data
        return json.dumps({"config": {"c": entry}}).encode()

    with pytest.raises(ConfigError, match="'c' is a pickle"):
        vetting.check(rewrite(seed, tmp_path / "model.pt2", named), "m")


ENUM = json.dumps({"__enum__": True, "fqn": "antigravity:x", "name": "y"})
ENUM_SPEC = json.dumps(
    [
        1,
        {
            "type": "builtins.tuple",
            "context": ENUM.replace("__en", "\\u005f_en"),
            "children_spec": [],
        },
    ]
)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"extra": [{"as_operator": "torch.hub.load"}]}, "none of torch's operators"),
        ({"extra": [{"in_spec": ENUM_SPEC}]}, "names a module to import"),
        ({"guards_code": ["__import__('os').getpid()"]}, "guard .* more than a comparison"),
        ({"guards_code": ["L['x'].numpy().tofile('a') == 1"]}, "guard .* more than a comparison"),
        ({"extra": [{"expr_str": "exec('1')"}]}, "no expression of sizes"),
        ({"extra": [{"expr_str": "9**9**9**9"}]}, "no expression of sizes"),
        ({"extra": [{"target": "torch.hub.load"}]}, "none of torch's operators"),
        ({"extra": [{"target": "torch.ops.load_library"}]}, "none of torch's operators"),
        ({"extra": [{"target": "torch.ops.aten.__class__.x"}]}, "none of torch's operators"),
        ({"extra": [{"target": "torch.ops.aten.from_file.default"}]}, "none of torch's operators"),
        ({"extra": [{"target": "_operator.methodcaller"}]}, "none of torch's operators"),
        ({"extra": [{"name": "x): import os"}]}, "no name"),
        ({"extra": [{"parameter_name": 'a")'}]}, "no name"),
    ],
)
def test_texts_that_would_be_evaluated(seed, tmp_path, change, reason):
    with pytest.raises(ConfigError, match=reason):
        vetting.check(described(seed, tmp_path / "model.pt2", change), "m/1/model.pt2")


def test_texts_of_real_programs_pass(odd, tmp_path):
    for guard in ("Mod(L['x'].size()[0], 2) == 0", "L['a']['b'].stride()[1] >= math.floor(2.5)"):
        document = {"guards_code": [guard], "extra": [{"expr_str": "Mul(Integer(2), s0)"}]}
        vetting.check(described(odd[1], tmp_path / "model.pt2", document), "m")


def test_other_files(tmp_path):
    path = models.version_folder(tmp_path) / "model.pt2"
    path.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="not readable as a .pt2 archive"):
        exported.describe(path, "m/1/model.pt2")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/models/model.json", "{}")
    with pytest.raises(ConfigError, match=r"m/1/model.pt2: .* cannot be read \(KeyError\)"):
        exported.describe(path, "m/1/model.pt2")


# --- compiled when it loads ----------------------------------------------------------------------


@pytest.fixture
def compiled(seed_package, seed, tmp_path, monkeypatch):
    """The cache, with the seed's package in it as if it had been compiled there."""
    monkeypatch.setenv(compiling.FOLDER, str(tmp_path / "kept"))
    kept = compiling._private(tmp_path / "kept") / f"{compiling.key(seed, CPU)}.pt2"
    kept.write_bytes(seed_package.read_bytes())
    return kept


CPU = torch.device("cpu")


def test_what_is_in_the_cache_is_not_compiled_again(seed, compiled, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no compiler
    runtime = load(seed, compile_on_load=True)
    assert runtime.label == "AOT Inductor"
    values = [torch.rand(2, 16) for _ in range(6)]
    for mine, theirs in zip(runtime.run(values), load(seed).run(values), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)
    monkeypatch.setenv("TORCHINDUCTOR_FREEZING", "1")  # other code would come of it
    with pytest.raises(ConfigError, match="COMPILE_ON_LOAD needs a C.. compiler and none is"):
        load(seed, compile_on_load=True)


def test_another_program_has_another_key(seed, odd):
    keys = {compiling.key(path, device) for path in (seed, odd[1]) for device in (CPU,)}
    assert len(keys) == 2 and compiling.key(seed, CPU) in keys


def test_who_waits_for_a_compilation_finds_its_package(tmp_path):
    """The control: without the lock it would be compiled twice."""
    kept = tmp_path / "key.pt2"
    with compiling._alone(kept):
        waiting = threading.Thread(
            target=compiling._compile, args=(tmp_path / "missing.pt2", kept, "cpu", "cpu")
        )
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        kept.write_bytes(b"made meanwhile")
    waiting.join(30)
    assert kept.read_bytes() == b"made meanwhile"
    kept.unlink()
    with pytest.raises(FileNotFoundError):
        compiling._compile(tmp_path / "missing.pt2", kept, "cpu", "cpu")


def test_a_folder_that_others_can_write_to_is_refused(seed, tmp_path, monkeypatch):
    monkeypatch.setenv(compiling.FOLDER, str(tmp_path))
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match="can be written by, another user"):
        load(seed, compile_on_load=True)


def test_where_packages_are_kept():
    assert compiling.folder({compiling.FOLDER: "/x"}) == Path("/x")
    assert compiling.folder({"XDG_CACHE_HOME": "/c"}) == Path("/c/manta/compiled")
