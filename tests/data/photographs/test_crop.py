"""Crops from large photographs: where the template says, without aliasing, black outside."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from marked_photographs import GREY, centers, photograph, placed

from partialfc.data.align import TEMPLATE, align_faces, similarity_transform
from partialfc.data.photographs.crop import align_face, cut


@pytest.mark.parametrize("scale", [0.7, 2.0, 5.3])
@pytest.mark.parametrize("degrees", [0, 25, 180])
def test_the_points_come_to_the_template(scale: float, degrees: float) -> None:
    middle = 80 * scale
    points = placed(scale, degrees, (middle + 3.3, middle - 2.1))
    crop = align_face(photograph(int(2 * middle), int(2 * middle), points), points)
    assert np.abs(centers(crop) - TEMPLATE.numpy()).max() < 0.5


def test_a_small_face_is_warped_as_everywhere_else() -> None:
    image = np.random.default_rng(0).integers(0, 255, (300, 200, 3), np.uint8)
    points = placed(1.4, -20, (80, 170))
    whole = align_faces(torch.from_numpy(image)[None], torch.from_numpy(points)[None])[0].numpy()
    assert np.abs(align_face(image, points).astype(int) - whole).max() <= 1


def test_fine_patterns_become_grey() -> None:
    image = np.zeros((900, 900, 3), np.uint8)
    image[::2, ::2] = image[1::2, 1::2] = 255
    crop = align_face(image, placed(7, 10, (450, 450)))
    assert np.abs(crop[8:-8, 8:-8].astype(int) - 127).max() <= 4


@pytest.mark.parametrize("center", [(30, 30), (370, 240), (-2000, 100)])
def test_it_is_black_outside(center: tuple[float, float]) -> None:
    image = np.full((250, 400, 3), GREY, np.uint8)
    matrix = similarity_transform(torch.from_numpy(placed(3, 0, center))[None], TEMPLATE)
    crop = cut(image, matrix, 112).numpy()
    x, y = (int(112 / 2 - middle / 3) for middle in center)  # where the corner of the photograph comes to be
    inside = crop[max(y + 2, 0) : max(y + 80, 0), max(x + 2, 0) : max(x + 130, 0)]
    assert (inside == GREY).all()
    assert (crop[: max(y - 2, 0)] == 0).all()
    assert (crop[:, : max(x - 2, 0)] == 0).all()
    assert (crop == 0).any()
