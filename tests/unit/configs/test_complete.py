"""What normalise fills in."""

from __future__ import annotations

import pytest

from configs.complete import (
    artifact_filename,
    artifact_filenames,
    normalise,
    normalise_version,
    of_version,
    runtime_kind,
)
from configs.errors import ConfigError
from configs.model import DynamicBatching, InstanceGroup, ModelConfig, ModelInput, ModelOutput

BASE = ModelConfig(
    name="m",
    input=(ModelInput(name="a", data_type="TYPE_FP32", dims=(4,)),),
    output=(ModelOutput(name="b", data_type="TYPE_FP32", dims=(4,)),),
)


def _normal(files=("model.pt",), has_gpu=False, **changes):
    return normalise(BASE.model_copy(update=changes), files, has_gpu)


PT, PT2, PY = "model.pt", "model.pt2", "model.py"


@pytest.mark.parametrize(
    ("given", "files", "platform", "runtime", "filename", "kind", "artifact"),
    [
        # sniffed from the directory
        ({}, (PT,), "pytorch_libtorch", "", "", "torchscript", PT),
        ({}, (PT2,), "torch_aoti", "", PT2, "aoti", PT2),
        ({}, (PT, PT2, PY), "pytorch_libtorch", "", "", "torchscript", PT),
        ({}, (PY,), "pytorch_libtorch", PY, "", "eager", PY),
        ({"backend": "pytorch"}, (PT,), "pytorch_libtorch", "", PT, "torchscript", PT),
        ({"backend": "pytorch"}, (PT2,), "torch_aoti", "", PT2, "aoti", PT2),
        ({"backend": "pytorch"}, (PY,), "pytorch_libtorch", PY, "", "eager", PY),
        ({"backend": "pytorch"}, (), "pytorch_libtorch", "", PT, "torchscript", PT),
        # stated
        ({"platform": "pytorch_libtorch"}, (), "pytorch_libtorch", "", "", "torchscript", PT),
        ({"platform": "torch_aoti"}, (PT,), "torch_aoti", "", PT2, "aoti", PT2),
        ({"default_model_filename": PT}, (), "pytorch_libtorch", "", PT, "torchscript", PT),
        ({"default_model_filename": PT2}, (), "torch_aoti", "", PT2, "aoti", PT2),
        (
            {"platform": "torch_aoti", "default_model_filename": "n.pt2"},
            (),
            "torch_aoti",
            "",
            "n.pt2",
            "aoti",
            "n.pt2",
        ),
        # the Python runtime never gets a file name
        ({"runtime": PY}, (PY, PT), "pytorch_libtorch", PY, "", "eager", PY),
        (
            {"runtime": PY, "backend": "pytorch"},
            (PT,),
            "pytorch_libtorch",
            PY,
            "",
            "torchscript",
            PT,
        ),
        (
            {"runtime": PY, "default_model_filename": PT},
            (PY, PT),
            "pytorch_libtorch",
            PY,
            PT,
            "torchscript",
            PT,
        ),
    ],
)
def test_engine(given, files, platform, runtime, filename, kind, artifact):
    config = _normal(files, **given)
    assert config.backend == "pytorch"
    assert (config.platform, config.runtime) == (platform, runtime)
    assert config.default_model_filename == filename
    assert runtime_kind(config, files) == kind
    assert artifact_filename(config, files) == artifact
    assert normalise(config, files, False) == config


@pytest.mark.parametrize(
    ("given", "files", "kind"),
    [
        ({"platform": "pytorch_libtorch"}, (PT2,), "aoti"),
        ({"backend": "pytorch"}, (PT2,), "aoti"),
        ({"default_model_filename": PT}, (PT2,), "aoti"),
        ({"runtime": PY}, (PT2,), "aoti"),
        ({}, (PT2,), "aoti"),
        # what the configuration means is there, or nothing is
        ({"platform": "pytorch_libtorch"}, (PT, PT2), "torchscript"),
        ({"runtime": PY}, (PY, PT2), "eager"),
        ({"runtime": PY}, (PT, PT2), "torchscript"),
        ({"platform": "pytorch_libtorch"}, (), "torchscript"),
        # a name that somebody chose stays
        ({"backend": "pytorch", "default_model_filename": "net.pt"}, (PT2,), "torchscript"),
    ],
)
def test_a_version_may_be_a_package_beside_other_kinds(given, files, kind):
    """The first version is not one: only the files of the version itself tell."""
    config = _normal(PT if "runtime" not in given else (PY,), **given)
    version = of_version(config, files)
    assert runtime_kind(version, files) == kind
    assert of_version(version, files) == version
    if kind == "aoti":
        assert artifact_filename(version, files) == PT2
        assert (version.platform, version.runtime) == ("torch_aoti", "")
    else:
        assert version == config


FILES = {"9.0": "hopper.pt", "8.6": "ampere.pt"}


@pytest.mark.parametrize(
    ("capability", "file"),
    [("9.0", "hopper.pt"), ("8.6", "ampere.pt"), ("8.9", PT), ("", PT)],
)
def test_the_file_of_a_compute_capability(capability, file):
    config = _normal(cc_model_filenames=FILES)
    assert artifact_filename(config, (PT, *FILES.values()), capability) == file
    named = _normal(cc_model_filenames=FILES, default_model_filename="net.pt", backend="pytorch")
    assert artifact_filename(named, (), capability) == (file if file != PT else "net.pt")


def test_which_files_may_be_wanted():
    gpu = InstanceGroup(kind="KIND_GPU")
    assert artifact_filenames(_normal(cc_model_filenames=FILES)) == [PT]
    only_gpus = _normal(has_gpu=True, cc_model_filenames=FILES, instance_group=(gpu,))
    assert artifact_filenames(only_gpus) == [PT, "hopper.pt", "ampere.pt"]
    mixed = (gpu, InstanceGroup(kind="KIND_CPU"))
    assert artifact_filenames(only_gpus.model_copy(update={"instance_group": mixed})) == [PT]


def test_a_package_beside_files_of_capabilities():
    config = _normal(cc_model_filenames=FILES)
    assert of_version(config, ("hopper.pt", PT2)) == config
    package = of_version(config, (PT2,))
    assert artifact_filename(package, (PT2,), "9.0") == PT2 and not package.cc_model_filenames


def test_auto_without_a_gpu_is_one_cpu_instance():
    """A25; the control: with a GPU it is KIND_GPU."""
    for groups in ((), (InstanceGroup(),), (InstanceGroup(kind="KIND_AUTO", count=0),)):
        (group,) = _normal(instance_group=groups).instance_group
        assert (group.kind, group.count, group.gpus) == ("KIND_CPU", 1, ())
        (group,) = _normal(has_gpu=True, instance_group=groups).instance_group
        assert (group.kind, group.count) == ("KIND_GPU", 1)


@pytest.mark.parametrize("first", [PT, PT2, PY])
@pytest.mark.parametrize(
    ("own", "kind"),
    [((PT,), "torchscript"), ((PT2,), "aoti"), ((PY,), "eager")],
)
@pytest.mark.parametrize("given", [{}, {"backend": "pytorch"}])
def test_each_version_is_run_by_the_file_that_it_has(first, own, kind, given):
    """Version 10 comes before 9 where names are sorted as text, and may be of another kind."""
    config = BASE.model_copy(update=given)
    version = normalise_version(config, (first,), own, False)
    assert runtime_kind(version, own) == kind
    assert artifact_filename(version, own) == own[0]


@pytest.mark.parametrize(
    ("given", "first", "own", "kind"),
    [
        # what Triton finds by the first version is there: it is meant
        ({}, PT2, (PT, PT2), "aoti"),
        ({}, PT, (PT, PT2), "torchscript"),
        ({}, PY, (PT, PY), "eager"),
        # what the configuration states is not sniffed
        ({"platform": "torch_aoti"}, PT2, (PT,), "aoti"),
        ({"platform": "pytorch_libtorch"}, PT, (PY,), "torchscript"),
        ({"platform": "pytorch_libtorch"}, PT2, (PT2,), "aoti"),
        ({}, PT, (), "torchscript"),
    ],
)
def test_control_the_first_version_and_the_configuration_come_first(given, first, own, kind):
    version = normalise_version(BASE.model_copy(update=given), (first,), own, False)
    assert runtime_kind(version, own) == kind


def test_nothing_to_go_by_is_an_error_that_says_what_is_missing():
    with pytest.raises(ConfigError, match=r"'m': .* none of model.pt, model.pt2, model.py"):
        _normal(("weights.bin",))
    with pytest.raises(ConfigError, match="must specify 'backend' or 'platform' for model 'm'$"):
        _normal((), default_model_filename="net.pt")


def test_defaults():
    config = _normal(max_batch_size=8, dynamic_batching=DynamicBatching())
    assert config.version_policy.latest == 1
    assert config.dynamic_batching.preferred_batch_size == (8,)
    assert config.optimization.input_pinned_memory.enable
    assert config.instance_group == (InstanceGroup(name="m", kind="KIND_CPU", count=1),)
    assert _normal(dynamic_batching=DynamicBatching()).dynamic_batching == DynamicBatching()


def test_instance_groups():
    groups = _normal(
        has_gpu=True,
        instance_group=(
            InstanceGroup(),
            InstanceGroup(kind="KIND_CPU", count=-3),
            InstanceGroup(name="own", kind="KIND_GPU", count=2, gpus=(1,)),
        ),
    ).instance_group
    assert [(g.name, g.kind, g.count, g.gpus) for g in groups] == [
        ("m_0", "KIND_GPU", 1, ()),
        ("m_1", "KIND_CPU", 1, ()),
        ("own", "KIND_GPU", 2, (1,)),
    ]


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        (InstanceGroup(kind="KIND_GPU"), "'m_0' of model 'm' has kind KIND_GPU but no GPU"),
        (InstanceGroup(gpus=(0,)), "'m_0' of model 'm' has kind KIND_CPU but specifies one or"),
    ],
)
def test_without_a_gpu(group, reason):
    with pytest.raises(ConfigError, match=reason):
        _normal(instance_group=(group,))


def test_strings_are_refused_once_the_runtime_is_known():
    strings = (ModelInput(name="a", data_type="TYPE_STRING", dims=(-1,)),)
    assert _normal((PT,), input=strings).input == strings
    assert _normal((PY,), input=strings).input == strings
    for files in ((PT2,),):
        with pytest.raises(ConfigError, match="unsupported datatype TYPE_STRING"):
            _normal(files, input=strings)


@pytest.mark.parametrize("filename", ["", "net.py"])
def test_the_python_backend_has_no_platform_and_a_model_py(filename):
    config = _normal((PY, PT2), backend="python", default_model_filename=filename)
    assert (config.backend, config.platform, config.runtime) == ("python", "", "")
    assert config.default_model_filename == artifact_filename(config) == (filename or PY)
    assert runtime_kind(config) == "python"
    assert of_version(config, (PT2,)) == config
    assert normalise(config, (PY, PT2), False) == config
