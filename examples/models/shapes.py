"""The two small nets that are built on the spot: add/sub, and a classifier of drawn shapes.

Also draws what the classifier learns from: every shape is a star with some number of points, and
a regular polygon is a star whose inner corners lie on its edges. Called by `examples/build.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

SIDE = 64
# label -> (points, radius of the inner corners, radius of the hole); 0 points: a disc
SHAPES: dict[str, tuple[int, float, float]] = {
    "circle": (0, 1.0, 0.0),
    "ring": (0, 1.0, 0.55),
    "triangle": (3, math.cos(math.pi / 3), 0.0),
    "square": (4, math.cos(math.pi / 4), 0.0),
    "star": (5, 0.4, 0.0),
}
LABELS = tuple(SHAPES)


class AddSub(nn.Module):
    """INPUT0, INPUT1: [batch, 16] -> their sum and their difference."""

    def forward(self, INPUT0: Tensor, INPUT1: Tensor) -> tuple[Tensor, Tensor]:
        return INPUT0 + INPUT1, INPUT0 - INPUT1


class Classifier(nn.Module):
    """image: FP32 [batch, 3, 64, 64], RGB from 0 to 1 -> probabilities [batch, len(LABELS)]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 8, 16, 32, 64)
        blocks: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            blocks += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
        self.features = nn.Sequential(*blocks)
        self.head = nn.Linear(2 * widths[-1], len(LABELS))

    def logits(self, image: Tensor) -> Tensor:
        # How far each pixel is from the colour of the border: colours no longer matter, and a
        # few seconds of training are enough.
        top, left = image[:, :, 0], image[:, :, :, 0]
        border = torch.cat((top, image[:, :, -1], left, image[:, :, :, -1]), 2).mean(2)
        contrast = (image - border[:, :, None, None]).square().sum(1, keepdim=True)
        maps = self.features(nn.functional.instance_norm(contrast))
        scores: Tensor = self.head(torch.cat((maps.amax((2, 3)), maps.mean((2, 3))), 1))
        return scores

    def forward(self, image: Tensor) -> Tensor:
        return torch.softmax(self.logits(image), 1)


def outline(points: int, inner: float, angle: Tensor) -> Tensor:
    """The distance from the middle to the edge of a star, in the direction `angle`."""
    if points == 0:
        return torch.ones_like(angle)
    half = math.pi / points
    folded = (torch.remainder(angle, 2 * half) - half).abs()  # 0 at an inner corner, half at a tip
    x, y = math.cos(half), math.sin(half)  # a tip; the inner corner lies at (inner, 0)
    return inner * y / (y * torch.cos(folded) - (x - inner) * torch.sin(folded))


def draw(kinds: Tensor, generator: torch.Generator) -> Tensor:
    """One image [3, 64, 64] per entry of `kinds` (indices into LABELS), at random but seeded."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    count = len(kinds)
    axis = torch.linspace(-1, 1, SIDE)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    x = x - uniform(-0.3, 0.3, count, 1, 1)
    y = y - uniform(-0.3, 0.3, count, 1, 1)
    size = uniform(0.35, 0.75, count, 1, 1)
    distance = torch.hypot(x, y) / size
    angle = torch.atan2(y, x) + uniform(0, 2 * math.pi, count, 1, 1)
    cover = torch.zeros(count, SIDE, SIDE)
    for index, (points, inner, hole) in enumerate(SHAPES.values()):
        chosen = kinds == index
        edge = outline(points, inner, angle[chosen])
        inside = (edge - distance[chosen]) * size[chosen]
        outside = (distance[chosen] - hole) * size[chosen]
        # about one pixel wide, as an anti-aliased edge is
        cover[chosen] = torch.sigmoid(torch.minimum(inside, outside) * 2 * SIDE)
    front, back = uniform(0, 1, count, 3, 1, 1), uniform(0, 1, count, 3, 1, 1)
    # A pair of colours that nobody can tell apart teaches nothing.
    near = (front - back).abs().amax(1, keepdim=True) < 0.3
    front = torch.where(near, (back + 0.5) % 1.0, front)
    slope = uniform(-0.2, 0.2, count, 3, 1, 1) * axis[:, None]
    image = back + slope + (front - back - slope) * cover[:, None]
    noise = uniform(0, 0.05, count, 1, 1, 1) * torch.randn(
        count, 1, SIDE, SIDE, generator=generator
    )
    return (image + noise).clamp(0, 1)


def train(steps: int = 300, batch: int = 32, seed: int = 1) -> Classifier:
    """A classifier that has seen `steps * batch` drawings; the same one for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=8e-3, total_steps=steps)
    threads = torch.get_num_threads()
    # Operations are short: threads that wait for each other on a busy machine cost ten times more.
    torch.set_num_threads(1)
    try:
        for _ in range(steps):
            kinds = torch.randint(len(LABELS), (batch,), generator=generator)
            loss = nn.functional.cross_entropy(model.logits(draw(kinds, generator)), kinds)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    finally:
        torch.set_num_threads(threads)
    return model.eval()


def accuracy(model: Classifier, count: int = 256, seed: int = 2) -> float:
    """The share of `count` fresh drawings that get the right label."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.arange(count) % len(LABELS)
    with torch.inference_mode():
        return float((model(draw(kinds, generator)).argmax(1) == kinds).float().mean())
