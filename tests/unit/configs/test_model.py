"""The mirrors carry the proto's names and survive the way between processes."""

from __future__ import annotations

import pickle

import pytest
from tritonclient.grpc import model_config_pb2 as pb

from configs import model


@pytest.mark.parametrize(
    ("mirror", "official"),
    [
        (model.ModelConfig, pb.ModelConfig),
        (model.ModelInput, pb.ModelInput),
        (model.ModelOutput, pb.ModelOutput),
        (model.InstanceGroup, pb.ModelInstanceGroup),
        (model.DynamicBatching, pb.ModelDynamicBatching),
        (model.Optimization, pb.ModelOptimizationPolicy),
        (model.VersionPolicy, pb.ModelVersionPolicy),
        (model.Reshape, pb.ModelTensorReshape),
    ],
)
def test_field_names_are_the_protos(mirror, official):
    written = {name for name, field in mirror.model_fields.items() if not field.exclude}
    assert written <= set(official.DESCRIPTOR.fields_by_name)


def test_pickles_and_forbids_unknown_fields():
    config = model.ModelConfig(name="m", input=(model.ModelInput(name="a", dims=(1,)),))
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(ValueError, match="default_model_name"):
        model.ModelConfig.model_validate({"default_model_name": "x"})
