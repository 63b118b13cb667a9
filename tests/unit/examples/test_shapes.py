"""The drawn shapes, the classifier that learns them, and the picture that ships."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from examples.client import HERE, read_picture
from examples.models import shapes


def test_outline_of_a_star_runs_from_tip_to_inner_corner():
    angles = torch.tensor([0.0, math.pi / 5])
    assert torch.allclose(shapes.outline(5, 0.4, angles), torch.tensor([1.0, 0.4]), atol=1e-6)


def test_outline_of_a_square_is_a_square():
    angle = torch.linspace(0, 2 * math.pi, 100)
    radius = shapes.outline(*shapes.SHAPES["square"][:2], angle)
    taxi = (radius * torch.cos(angle)).abs() + (radius * torch.sin(angle)).abs()
    assert torch.allclose(taxi, torch.ones(100), atol=1e-5)


def test_drawings_are_the_same_for_the_same_seed():
    kinds = torch.arange(10) % len(shapes.LABELS)
    one = shapes.draw(kinds, torch.Generator().manual_seed(3))
    other = shapes.draw(kinds, torch.Generator().manual_seed(3))
    assert torch.equal(one, other)
    assert one.shape == (10, 3, shapes.SIDE, shapes.SIDE)
    assert 0 <= float(one.min()) and float(one.max()) <= 1


def test_a_short_training_names_the_picture_that_ships():
    pytest.importorskip("PIL")
    model = shapes.train(steps=150)
    assert shapes.accuracy(model) > 0.6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is old, and meant
        scripted = torch.jit.script(model)
    with torch.inference_mode():
        image = torch.from_numpy(read_picture(HERE / "picture.png"))
        probabilities = scripted(image)[0]
    assert shapes.LABELS[int(probabilities.argmax())] == "star"
    assert float(probabilities.sum()) == pytest.approx(1)
