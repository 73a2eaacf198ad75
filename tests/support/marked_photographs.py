"""Photographs with five coloured discs for the points of a face, and a detector that finds them."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from partialfc.data.align import TEMPLATE
from partialfc.data.photographs.face import Face, Pixels

COLORS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255]])
BITS = np.array([1, 2, 4])  # of a colour's channels
GREY = 90


def placed(scale: float, degrees: float, center: tuple[float, float]) -> np.ndarray:
    """The template's points (5, 2), scaled, turned and with their middle at `center`."""
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    points: np.ndarray = (TEMPLATE.numpy() - 56) * scale @ turn + center
    return points


def photograph(width: int, height: int, *faces: np.ndarray) -> Pixels:
    """A grey image with a disc at each point of each face."""
    image = np.full((height, width, 3), GREY, np.uint8)
    y, x = np.mgrid[:height, :width]
    for points in faces:
        radius = np.linalg.norm(points[1] - points[0]) / 8
        for (left, top), color in zip(points, COLORS, strict=True):
            image[(x - left) ** 2 + (y - top) ** 2 <= radius**2] = color
    return image


class DiscDetector:
    """Finds one face in the left half of an image and one in the right."""

    facts: dict[str, Any] = {"name": "discs", "licence": "none", "sha256": {"discs": "0" * 64}}  # noqa: RUF012

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, image: Pixels) -> list[Face]:
        self.calls += 1
        half = image.shape[1] // 2
        found = [self._face(image[:, :half], 0), self._face(image[:, half:], half)]
        return [face for face in found if face is not None]

    def _face(self, part: Pixels, left: int) -> Face | None:
        codes = (part > 150) @ BITS
        places = [np.argwhere(codes == code) for code in (COLORS > 150) @ BITS]
        if not all(map(len, places)):
            return None
        points = np.array([(place[:, 1].mean() + left, place[:, 0].mean()) for place in places])
        return Face(np.concatenate([points.min(0), points.max(0)]), points, 0.99)


def centers(crop: Pixels) -> np.ndarray:
    """The points (5, 2) of the discs in a crop."""
    face = DiscDetector()._face(crop, 0)
    assert face is not None
    return face.points


def package_file(package: str, path: str) -> Path:
    """A file of an installed package, which is not imported; the test is skipped without it."""
    try:
        return Path(str(metadata.distribution(package).locate_file(path)))
    except metadata.PackageNotFoundError:
        pytest.skip(f"needs a file of {package}: pip install --no-deps {package}")
