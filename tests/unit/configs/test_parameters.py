"""Typed parameters: rules, scope, warnings, log lines."""

from __future__ import annotations

import pytest

from configs.errors import ConfigError
from configs.model import InstanceGroup, ModelConfig
from configs.parameters import RULES, ModelParameters, log_lines, parse_parameters

ENGINES = {
    "torchscript": {"platform": "pytorch_libtorch"},
    "aoti": {"platform": "torch_aoti"},
    "eager": {"runtime": "model.py"},
    "python": {"backend": "python"},
}


def _config(kind, **parameters):
    return ModelConfig(name="m", parameters=parameters, **ENGINES[kind])


def _parse(kind, **parameters):
    return parse_parameters(_config(kind, **parameters))


def test_every_rule_has_its_field():
    assert {key.lower() for key in RULES} == set(ModelParameters.model_fields)


def test_defaults():
    parameters, warnings = _parse("torchscript")
    assert parameters == ModelParameters()
    assert parameters.inference_mode and parameters.num_threads == 1
    assert warnings == []


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("ON", True), ("1", True), ("False", False), ("off", False), ("0", False)],
)
def test_booleans(text, value):
    parameters, _ = _parse("torchscript", DISABLE_CUDNN=text, ENABLE_JIT_EXECUTOR=text)
    assert parameters.disable_cudnn is parameters.enable_jit_executor is value


@pytest.mark.parametrize("text", ["", "yes", " true", "2"])
def test_other_booleans_are_refused(text):
    with pytest.raises(ConfigError) as caught:
        _parse("aoti", INFERENCE_MODE=text)
    assert caught.value.args[2] == 'parameters["INFERENCE_MODE"]'
    assert f"failed to convert '{text}' to boolean" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4),
        ("  4x", 4),
        ("\t\n\v\f\r 4 5", 4),
        ("+2", 2),
        ("007", 7),
        ("0" * 40 + "3", 3),
        ("4.9", 4),
        ("2147483647", 2147483647),
    ],
)
def test_integers_are_read_as_in_cpp(text, value):
    assert _parse("aoti", INTRA_OP_THREAD_COUNT=text)[0].intra_op_thread_count == value


@pytest.mark.parametrize("text", ["", " ", "x4", "+", "+-4", "- 4", "\u00a04", "\u0664"])
def test_other_integers_are_refused(text):
    with pytest.raises(ConfigError) as caught:
        _parse("torchscript", INTER_OP_THREAD_COUNT=text)
    assert caught.value.reason.endswith(f"failed to convert '{text}' to integral number")
    assert caught.value.args[2] == 'parameters["INTER_OP_THREAD_COUNT"]'


@pytest.mark.parametrize("text", ["2147483648", "-2147483649", "99999999999x", "9" * 5000])
def test_integers_out_of_range_are_refused(text):
    with pytest.raises(ConfigError, match="to integral number: it is out of range"):
        _parse("aoti", INTRA_OP_THREAD_COUNT=text)


def test_thread_counts_below_one_have_no_effect_and_say_so():
    parameters, warnings = _parse("torchscript", INTER_OP_THREAD_COUNT="0")
    assert parameters.inter_op_thread_count is None
    assert warnings == [
        "parameter 'INTER_OP_THREAD_COUNT' of model 'm' has no effect: 0 is not a number of threads"
    ]


def test_eager():
    parameters, warnings = _parse(
        "eager",
        NUM_THREADS="2",
        NUM_INTEROP_THREADS="3",
        TORCH_COMPILE_OPTIONAL_PARAMETERS='{"disable": true}',
    )
    assert (parameters.num_threads, parameters.num_interop_threads) == (2, 3)
    assert parameters.torch_compile_optional_parameters == {"disable": True}
    assert warnings == []


@pytest.mark.parametrize(
    ("key", "text", "reason"),
    [
        ("NUM_THREADS", "4x", "to integral number"),
        ("NUM_THREADS", "0", "at least 1"),
        ("TORCH_COMPILE_OPTIONAL_PARAMETERS", '{"model": 1}', "'model' is not an optional"),
        ("TORCH_COMPILE_OPTIONAL_PARAMETERS", "{", "failed to parse as JSON"),
        ("TORCH_COMPILE_OPTIONAL_PARAMETERS", "[" * 100_000, "failed to parse as JSON"),
        ("TORCH_COMPILE_OPTIONAL_PARAMETERS", "[]", "must be a JSON object"),
        ("GPU_FRACTION", "0", "must be greater than 0"),
        ("GPU_FRACTION", "1.5", "at most 1"),
        ("GPU_FRACTION", "nan", "must be greater"),
        ("GPU_FRACTION", "half", "to a number"),
        ("CPU_FRACTION", "inf", "must be greater"),
        ("MODEL_GPUS", "0.5", "to integral number"),
        ("EXECUTION_ENV_PATH", "x.tar.gz", "packed execution environments"),
    ],
)
def test_refused_values(key, text, reason):
    with pytest.raises(ConfigError, match=reason):
        _parse("eager", **{key: text})


def test_ours():
    parameters, _ = _parse("aoti", GPU_FRACTION="0.33333", CPU_FRACTION="1.5", MODEL_GPUS="2")
    assert parameters.gpu_fraction == 0.3333
    assert (parameters.cpu_fraction, parameters.model_gpus) == (1.5, 2)


@pytest.mark.parametrize(
    ("kind", "key", "part"),
    [
        ("torchscript", "NUM_THREADS", "did you mean 'INTRA_OP_THREAD_COUNT'?"),
        ("eager", "INTER_OP_THREAD_COUNT", "did you mean 'NUM_INTEROP_THREADS'?"),
        ("eager", "INFERENCE_MODE", "has no effect on the runtime 'eager'"),
        ("eager", "ENABLE_WEIGHT_SHARING", "has no effect on the runtime 'eager'"),
        ("aoti", "ENABLE_JIT_PROFILING", "has no effect on the runtime 'aoti'"),
        (
            "torchscript",
            "INFERENCE_MOD",
            "is unknown and is ignored; did you mean 'INFERENCE_MODE'",
        ),
        ("torchscript", "enable_weight_sharing", "did you mean 'ENABLE_WEIGHT_SHARING'?"),
        ("torchscript", "zzz", "'zzz' of model 'm' is unknown and is ignored"),
        ("torchscript", "ENABLE_NVFUSER", "has been removed from PyTorch and is ignored"),
    ],
)
def test_what_has_no_effect_is_warned_of_once(kind, key, part):
    parameters, warnings = _parse(kind, **{key: "not even parsed"})
    assert parameters == ModelParameters()
    assert len(warnings) == 1 and part in warnings[0]


def test_shares_of_devices_that_no_group_uses():
    config = _config("aoti", GPU_FRACTION="0.5", MODEL_GPUS="1").model_copy(
        update={"instance_group": (InstanceGroup(kind="KIND_CPU"),)}
    )
    _, warnings = parse_parameters(config)
    assert [w.rpartition(": ")[2] for w in warnings] == [
        "no instance group is KIND_GPU",
        "no instance group is KIND_MODEL",
    ]


def _log(kind, **parameters):
    config = _config(kind, **parameters)
    return log_lines(config, parse_parameters(config)[0])


def test_compute_on_request():
    """Off unless asked for: they change the last digits, or run a model more often."""
    parameters, warnings = _parse("torchscript", ENABLE_FREEZING="1", ENABLE_CUDA_GRAPHS="on")
    assert parameters.enable_freezing and parameters.enable_cuda_graphs and warnings == []
    assert not ModelParameters().enable_freezing and not ModelParameters().enable_cuda_graphs
    assert "'ENABLE_FREEZING'" in _parse("aoti", ENABLE_FREEZING="1")[1][0]
    assert "Freezing is enabled for model 'm'" in _log("torchscript", ENABLE_FREEZING="1")
    with pytest.raises(ConfigError, match="ENABLE_CUDA_GRAPHS: .* ENABLE_WEIGHT_SHARING"):
        _parse("torchscript", ENABLE_CUDA_GRAPHS="1", ENABLE_WEIGHT_SHARING="1")


def test_log_lines():
    assert _log("torchscript") == [
        "Optimized execution is enabled for model 'm'",
        "Inference Mode is enabled for model 'm'",
        "cuDNN is enabled for model 'm'",
        "Cache Cleaning is disabled for model 'm'",
    ]
    assert _log(
        "aoti", DISABLE_CUDNN="1", ENABLE_WEIGHT_SHARING="1", INTRA_OP_THREAD_COUNT="3"
    ) == [  # how many threads came of it is said where torch has been asked
        "Inference Mode is enabled for model 'm'",
        "cuDNN is disabled for model 'm'",
        "Cache Cleaning is disabled for model 'm'",
        "Weight sharing is enabled for model 'm'",
    ]
    assert "Optimized execution is disabled for model 'm'" in _log(
        "torchscript", DISABLE_OPTIMIZED_EXECUTION="on"
    )
    assert "Jit profiling is disabled for model 'm'" in _log(
        "torchscript", ENABLE_JIT_PROFILING="off"
    )
    assert _log("eager", TORCH_COMPILE_OPTIONAL_PARAMETERS='{"disable": true}') == [
        "Torch parallelism settings for 'm': NUM_THREADS = 1; NUM_INTEROP_THREADS = 1;",
        "'torch.compile' optional parameter(s) for 'm': {'disable': True}",
    ]


# --- the Python backend ---------------------------------------------------------------------------


def test_a_python_model_has_parameters_of_its_own():
    parameters, warnings = _parse(
        "python",
        threshold="0.5",
        NUM_THREADS="many",
        INFERENCE_MODE="perhaps",
        FORCE_CPU_ONLY_INPUT_TENSORS="no",
        CPU_FRACTION="0.5",
    )
    assert warnings == []
    assert not parameters.force_cpu_only_input_tensors and parameters.cpu_fraction == 0.5
    assert _log("python", threshold="0.5") == []


@pytest.mark.parametrize(
    ("key", "text", "reason"),
    [
        ("EXECUTION_ENV_PATH", "env.tar.gz", "packed execution environments are not supported"),
        ("FORCE_CPU_ONLY_INPUT_TENSORS", "maybe", "'maybe' is neither yes nor no"),
        ("GPU_FRACTION", "2", "at most 1"),
    ],
)
def test_what_a_python_model_cannot_say(key, text, reason):
    with pytest.raises(ConfigError, match=reason):
        _parse("python", **{key: text})


def test_control_elsewhere_those_are_no_parameters():
    _, warnings = _parse("torchscript", threshold="0.5")
    assert "'threshold' of model 'm' is unknown" in warnings[0]
    with pytest.raises(ConfigError, match="a parameter of the backend 'python'"):
        _parse("torchscript", FORCE_CPU_ONLY_INPUT_TENSORS="no")
