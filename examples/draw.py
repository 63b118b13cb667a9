"""Draws examples/picture.png, the picture that the client asks about. Needs Pillow.

python examples/draw.py
"""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, ImageDraw

SIDE, ZOOM = 256, 4  # drawn four times as large, then shrunk, for smooth edges


def picture() -> Image.Image:
    """An amber star, a little turned, above the middle of a dusk-blue ground."""
    side = SIDE * ZOOM
    image = Image.new("RGB", (side, side))
    pen = ImageDraw.Draw(image)
    for row in range(side):
        shade = row / side
        pen.line([(0, row), (side, row)], fill=(28, 40 + int(40 * shade), 90 + int(60 * shade)))
    corners = []
    for corner in range(10):
        angle = math.radians(36 * corner - 78)
        radius = side * (0.33 if corner % 2 == 0 else 0.14)
        corners.append(
            (side * 0.52 + radius * math.cos(angle), side * 0.47 + radius * math.sin(angle))
        )
    pen.polygon(corners, fill=(250, 190, 50))
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    picture().save(Path(__file__).with_name("picture.png"), optimize=True)
