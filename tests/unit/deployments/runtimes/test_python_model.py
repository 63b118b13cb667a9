"""Loading a TritonPythonModel: its arguments, and reasons without a path of this host."""

from __future__ import annotations

import json
import sys

import pytest

from configs.errors import ConfigError
from configs.parameters import ModelParameters
from deployments.runtimes import autocomplete, python_model
from tests import models
from tests.models import config

MODEL = config({"x": (4,)}, {"y": (4,)}, name="m", backend="python", platform="")

KEEPS = """
import json
import triton_python_backend_utils as pb_utils
import beside

class TritonPythonModel:
    def initialize(self, args):
        self.args = args
        self.beside = beside.WORD
        self.dir = pb_utils.get_model_dir()
    def execute(self, requests):
        import later
        return [self.args, self.beside, self.dir, later.WORD]
    def finalize(self):
        self.args["gone"] = "yes"
"""


@pytest.fixture
def load(tmp_path):
    opened: list[python_model.PythonModel] = []

    def make(source: str, **options):
        path = models.save_eager(source, tmp_path, "m")
        (path.parent / "beside.py").write_text("WORD = 'beside'")
        (path.parent / "later.py").write_text("WORD = 'later'")
        options = {"device": "cpu", "kind": "KIND_CPU", "instance_name": "m_0_0", **options}
        opened.append(python_model.load(path, options.pop("made", MODEL), **options))
        return opened[-1]

    before = list(sys.path)
    yield make
    for one in opened:
        one.finalize()
    assert sys.path == before
    for name in ("beside", "later"):
        sys.modules.pop(name, None)


def test_initialize_is_told_what_triton_tells(load, tmp_path):
    model = load(KEEPS)
    args, beside, folder, later = model.execute([])
    assert (beside, later) == ("beside", "later")
    assert folder == str(tmp_path / "m" / "1")
    assert all(isinstance(value, str) for value in args.values())
    known = json.loads(args.pop("model_config"))
    assert known["name"] == "m" and known["max_batch_size"] == 8
    assert known["input"][0]["dims"] == [4]
    assert args == {
        "model_instance_kind": "CPU",
        "model_instance_name": "m_0_0",
        "model_instance_device_id": "0",
        "model_repository": str(tmp_path / "m"),
        "model_version": "1",
        "model_name": "m",
    }
    model.finalize()
    assert args["gone"] == "yes"


def test_a_gpu_is_the_one_that_the_replica_sees(load):
    args = load(KEEPS, device="cuda:0", kind="KIND_GPU").execute([])[0]
    assert (args["model_instance_kind"], args["model_instance_device_id"]) == ("GPU", "0")
    args = load(KEEPS, kind="KIND_MODEL").execute([])[0]
    assert args["model_instance_kind"] == "MODEL"


def test_execute_may_be_a_coroutine(load):
    source = (
        "import asyncio\nclass TritonPythonModel:\n"
        "    async def execute(self, requests):\n"
        "        self.loop = getattr(self, 'loop', asyncio.get_running_loop())\n"
        "        await asyncio.sleep(0)\n"
        "        return [self.loop is asyncio.get_running_loop()]\n"
    )
    model = load(source)
    assert model.execute([]) == [True] and model.execute([]) == [True]


def test_finalize_that_raises_is_logged(load, caplog):
    source = (
        "class TritonPythonModel:\n    def execute(self, requests): ...\n"
        "    def finalize(self):\n        raise ValueError('late')\n"
    )
    load(source).finalize()
    assert "finalize of the model failed" in caplog.text


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("x = 1", "no class TritonPythonModel found"),
        ("TritonPythonModel = 1", "no class TritonPythonModel found"),
        ("class TritonPythonModel: ...", "class TritonPythonModel has no method execute"),
        ("import nothing_of_that_name", "import failed: ModuleNotFoundError: No module named"),
        ("def f(:", "import failed: SyntaxError: "),
        ("import sys; sys.path[:] = sys.path[2:]; x = 1", "no class TritonPythonModel found"),
        ("import sys; sys.exit(3)", r"import failed: the model called sys.exit\(3\)"),
        (
            "class TritonPythonModel:\n    def __init__(self): raise KeyError('k')\n"
            "    def execute(self, requests): ...",
            r"TritonPythonModel\(\) failed: KeyError: 'k'",
        ),
        (
            "class TritonPythonModel:\n    def execute(self, requests): ...\n"
            "    def initialize(self, args): open(args['model_repository'] + '/weights.bin')",
            "initialize failed: FileNotFoundError: .*'weights.bin'",
        ),
        (
            "import triton_python_backend_utils as p\nclass TritonPythonModel:\n"
            "    def execute(self, requests): ...\n"
            "    def initialize(self, args): raise p.TritonModelException('not today')",
            "initialize failed: TritonModelException: not today",
        ),
    ],
)
def test_reasons_are_told_and_paths_are_not(load, tmp_path, source, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        load(source)
    assert caught.value.args[1] == "m/1/model.py"
    assert str(tmp_path) not in str(caught.value)


def test_a_model_file_may_lie_deeper(tmp_path):
    folder = models.version_folder(tmp_path, "m") / "code"
    folder.mkdir()
    (folder / "net.py").write_text(
        KEEPS.replace("import beside", "beside = type('B', (), {'WORD': 1})")
    )
    made = MODEL.model_copy(update={"default_model_filename": "code/net.py"})
    model = python_model.load(folder / "net.py", made, "cpu", "KIND_CPU", "i")
    assert model.version == 1
    model.finalize()


# --- auto_complete_config -------------------------------------------------------------------------

COMPLETES = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        config.set_max_batch_size(8)
        config.set_dynamic_batching()
        config.add_input({"name": "x", "data_type": "TYPE_FP32", "dims": [4]})
        config.add_output({"name": "y", "data_type": "TYPE_STRING", "dims": [-1, 2]})
        return config
    def execute(self, requests): ...
"""
BARE = config({}, {}, name="m", backend="python", platform="", max_batch_size=0)


def completed(tmp_path, source, made=BARE):
    path = models.save_eager(source, tmp_path, "m")
    before = list(sys.path)
    try:
        return python_model.completed(path, made)
    finally:
        assert sys.path == before


def test_the_model_completes_a_bare_configuration(tmp_path):
    found = completed(tmp_path, COMPLETES)
    assert found.max_batch_size == 8 and found.dynamic_batching is not None
    assert [(one.name, one.data_type, one.dims) for one in (*found.input, *found.output)] == [
        ("x", "TYPE_FP32", (4,)),
        ("y", "TYPE_STRING", (-1, 2)),
    ]
    assert completed(tmp_path, COMPLETES, found) == found


def test_what_the_user_wrote_wins(tmp_path):
    written = config({"x": (4,)}, {}, name="m", backend="python", platform="", max_batch_size=4)
    found = completed(tmp_path, COMPLETES, written)
    assert found.max_batch_size == 4 and found.input == written.input
    wider = config({"x": (5,)}, {}, name="m", backend="python", platform="")
    with pytest.raises(ConfigError, match=r"input 'x' of model 'm' has dims \[5\] in the"):
        completed(tmp_path, COMPLETES, wider)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("return None", "must return the pb_utils.ModelConfig, and returned NoneType"),
        ("raise KeyError('k')", "auto_complete_config failed: KeyError: 'k'"),
        (
            "config.add_input({'name': 'x', 'data_type': 'FP32', 'dims': [1]}); return config",
            "auto_complete_config: .*Invalid enum value FP32",
        ),
        (
            "pb_utils.is_model_ready('other'); return config",
            "TritonModelException: other models cannot be reached from here",
        ),
    ],
)
def test_what_it_cannot_say(tmp_path, line, reason):
    source = (
        "import triton_python_backend_utils as pb_utils\nclass TritonPythonModel:\n"
        f"    def execute(self, requests): ...\n    @staticmethod\n"
        f"    def auto_complete_config(config):\n        {line}\n"
    )
    with pytest.raises(ConfigError, match=reason) as caught:
        completed(tmp_path, source)
    assert caught.value.args[1] == "m/1/model.py"


def test_a_model_without_it_is_left_as_it_is(tmp_path):
    source = "class TritonPythonModel:\n    def execute(self, requests): ...\n"
    assert completed(tmp_path, source) == BARE
    path = tmp_path / "m" / "1" / "model.py"
    assert not python_model.completes(path)
    path.write_text(COMPLETES)
    assert python_model.completes(path)


def test_the_door_of_all_kinds_asks_the_model(tmp_path):
    path = models.save_eager(COMPLETES, tmp_path, "m")
    open_batch = BARE.model_copy(update={"open_batch": True})
    found = autocomplete.complete(path, open_batch, ModelParameters(), "cpu", "KIND_CPU")
    assert found.max_batch_size == 8 and not found.open_batch
    assert found.dynamic_batching is not None
    assert found.dynamic_batching.preferred_batch_size == (8,)
    path.write_text("class TritonPythonModel:\n    def execute(self, requests): ...\n")
    with pytest.raises(ConfigError, match="at least one input"):
        autocomplete.complete(path, open_batch, ModelParameters(), "cpu", "KIND_CPU")
