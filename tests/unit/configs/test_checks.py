"""What must hold inside one configuration."""

from __future__ import annotations

import pytest

from configs.checks import check, check_strings
from configs.dtypes import DATATYPES
from configs.errors import ConfigError
from configs.model import (
    DynamicBatching,
    InstanceGroup,
    ModelConfig,
    ModelInput,
    ModelOutput,
    Reshape,
    VersionPolicy,
)

GOOD = ModelConfig(
    name="m",
    max_batch_size=8,
    input=(ModelInput(name="a", data_type="TYPE_FP32", dims=(2, -1)),),
    output=(ModelOutput(name="a", data_type="TYPE_FP32", dims=(4,)),),
)


def _input(**changes):
    return (GOOD.input[0].model_copy(update=changes),)


def _groups(*groups):
    return tuple(InstanceGroup(**group) for group in groups)


CASES = [
    ({"platform": "libtorch"}, "platform", "unexpected platform 'libtorch'"),
    ({"platform": "ensemble"}, "platform", "ensembles are not supported"),
    ({"backend": "onnxruntime"}, "backend", "backend 'onnxruntime' is not supported"),
    (
        {"backend": "python", "platform": "torch_aoti"},
        "platform",
        "platform 'torch_aoti' does not go with backend 'python'",
    ),
    (
        {"backend": "python", "platform": "", "runtime": "model.py"},
        "runtime",
        "runtime 'model.py' does not go with backend 'python'",
    ),
    ({"runtime": "lib.so"}, "runtime", "runtime 'lib.so' is not supported"),
    ({"runtime": "model.py", "platform": "torch_aoti"}, "runtime", "does not run platform"),
    (
        {"runtime": "model.py", "default_model_filename": "a.pt2"},
        "default_model_filename",
        "does not load .pt2",
    ),
    ({"max_batch_size": -1}, "max_batch_size", "0 or greater"),
    (
        {"output": ()},
        "output",
        "model configuration must contain at least one output, none were specified",
    ),
    (
        {"input": ()},
        "input",
        "model configuration must contain at least one input, none were specified",
    ),
    ({"input": _input(name=" ")}, "input[0].name", "must specify 'name'"),
    ({"input": GOOD.input * 2}, "input[1].name", "listed more than once"),
    ({"output": GOOD.output * 2}, "output[1].name", "listed more than once"),
    ({"input": _input(data_type="TYPE_INVALID")}, "input[0].data_type", "'data_type'"),
    ({"input": _input(dims=())}, "input[0].dims", "must specify 'dims'"),
    ({"input": _input(dims=(3, -2))}, "input[0].dims[1]", "-2 must be at least 1, or -1"),
    (
        {"input": _input(reshape=Reshape(shape=(0,)))},
        "input[0].reshape.shape[0]",
        "0 must be at least 1",
    ),
    ({"input": _input(reshape=Reshape())}, "input[0].reshape", "empty reshape"),
    ({"input": _input(dims=(-1,), reshape=Reshape())}, "input[0].reshape", "empty reshape"),
    (
        {"input": _input(dims=(1,), reshape=Reshape()), "max_batch_size": 0},
        "input[0].reshape",
        "empty reshape needs batching",
    ),
    (
        {"input": _input(dims=(2, -1, 3), reshape=Reshape(shape=(3, -1, 2)))},
        "input[0].reshape",
        "same number of elements",
    ),
    ({"input": _input(format="FORMAT_NHWC")}, "input[0].format", "exactly 3 dims"),
    (
        {"version_policy": VersionPolicy(latest=0)},
        "version_policy.latest.num_versions",
        "at least 1",
    ),
    ({"version_policy": VersionPolicy(specific=())}, "version_policy.specific", "at least one"),
    (
        {"version_policy": VersionPolicy(specific=(1, 0))},
        "version_policy.specific.versions[1]",
        "0 must be",
    ),
    (
        {"dynamic_batching": DynamicBatching(preferred_batch_size=(4, 0))},
        "dynamic_batching.preferred_batch_size[1]",
        "must be positive",
    ),
    (
        {"dynamic_batching": DynamicBatching(preferred_batch_size=(9,))},
        "dynamic_batching.preferred_batch_size[0]",
        "<= max batch size 8",
    ),
    (
        {"instance_group": _groups({"name": "g"}, {"name": "g"})},
        "instance_group[1]",
        "'g' is listed more than once",
    ),
    (
        {"instance_group": _groups({"kind": "KIND_MODEL", "gpus": (0,)})},
        "instance_group[0].gpus",
        "'m_0' of model 'm' has kind KIND_MODEL but specifies one or more GPUs",
    ),
    *(
        (
            {"instance_group": _groups({"kind": kind, "host_policy": policy})},
            "instance_group[0].host_policy",
            f"host policy '{policy}' is not supported",
        )
        for kind, policy in (
            ("KIND_CPU", "numa_0"),
            ("KIND_CPU", "gpu_0"),
            ("KIND_GPU", "gpu_"),
            ("KIND_GPU", "cpu"),
            ("KIND_MODEL", "models"),
            ("KIND_AUTO", "fast"),
        )
    ),
    *(
        ({"cc_model_filenames": files}, f'cc_model_filenames["{next(iter(files))}"]', reason)
        for files, reason in (
            ({"9.0": "../x.pt"}, "must be relative"),
            ({"8.6": "x.pt", "9.0": "y.pt"} | {"8.6": "/x.pt"}, "must be relative"),
            ({"9.0": ""}, "must name a file"),
            ({"sm_90": "x.pt"}, "'sm_90' is no compute capability"),
            ({"9": "x.pt"}, "'9' is no compute capability"),
        )
    ),
    (
        {"runtime": "model.py", "cc_model_filenames": {"9.0": "x.py"}},
        "cc_model_filenames",
        "only TorchScript and AOT Inductor models",
    ),
    ({"instance_group": _groups({"gpus": (0, 0)})}, "instance_group[0].gpus", "each gpu once"),
    ({"instance_group": _groups({"gpus": (-1,)})}, "instance_group[0].gpus", "index from 0"),
    *(
        ({"default_model_filename": name}, "default_model_filename", "must be relative")
        for name in ("/etc/x", "../x.pt", "a/../../x", "a\\..\\x", "a\0b", "a\nb")
    ),
]


@pytest.mark.parametrize(("changes", "field", "reason"), CASES)
def test_refuses(changes, field, reason):
    with pytest.raises(ConfigError) as caught:
        check(GOOD.model_copy(update=changes))
    assert caught.value.args[2] == field
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_batch_size": 0, "input": _input(data_type="TYPE_STRING", dims=(-1,))},
        {"input": _input(data_type="TYPE_STRING", dims=(1,), reshape=Reshape())},
        {"input": _input(dims=(2, -1, 3), reshape=Reshape(shape=(1, 2, -1, 3, 1)))},
        {"input": _input(dims=(3, 2, 2), format="FORMAT_NCHW")},
        {"default_model_filename": "weights/a..b.pt"},
        {"runtime": "model.py", "default_model_filename": "net.py"},
        {"cc_model_filenames": {"9.0": "h.pt", "10.0": "sub/b.pt"}},
        {
            "instance_group": _groups(
                {"kind": "KIND_CPU", "host_policy": "cpu"},
                {"kind": "KIND_GPU", "gpus": (3,), "host_policy": "gpu_3"},
                {"kind": "KIND_MODEL", "host_policy": "model"},
                {"host_policy": "gpu_12"},
            )
        },
        {"dynamic_batching": DynamicBatching(), "max_batch_size": 0},
    ],
)
def test_accepts(changes):
    check(GOOD.model_copy(update=changes))


@pytest.mark.parametrize(
    "data_type", [one.config for one in DATATYPES], ids=lambda data_type: str(data_type)
)
def test_every_datatype_is_accepted(data_type):
    config = GOOD.model_copy(update={"input": _input(data_type=data_type, dims=(-1, 2))})
    check(config)
    check_strings(config, "eager")


def test_strings_are_lists_for_torchscript_anything_for_python_and_nothing_for_packages():
    config = GOOD.model_copy(
        update={"max_batch_size": 0, "input": _input(data_type="TYPE_STRING", dims=(-1,))}
    )
    for kind in ("torchscript", "eager"):
        check_strings(config, kind)
    for kind in ("aoti", "exported"):
        with pytest.raises(ConfigError, match="unsupported datatype TYPE_STRING for input 'a'"):
            check_strings(config, kind)
    config = config.model_copy(update={"max_batch_size": 8})
    check_strings(config, "eager")
    with pytest.raises(ConfigError, match="only 1-dimensional List of String .* input for 'a'"):
        check_strings(config, "torchscript")
