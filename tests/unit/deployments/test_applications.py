"""Names of model applications; what they escape comes back."""

from __future__ import annotations

import pytest

from deployments.applications import application_name, is_model, parse_application


@pytest.mark.parametrize("model", ["mlp", "a.b", "ü-~@", "a=b", "a%2Eb", "x_y+z,w:v", "..."])
def test_names_come_back(model: str) -> None:
    name = application_name(model, 3, 17)
    assert is_model(name) and parse_application(name) == (model, 3)
    assert name.count(".") == 3 and "#" not in name and "/" not in name


@pytest.mark.parametrize("name", ["manta", "manta.mlp.1", "other.mlp.1.2", "manta.mlp.x.2", ""])
def test_other_applications_are_left_alone(name: str) -> None:
    assert not is_model(name)
