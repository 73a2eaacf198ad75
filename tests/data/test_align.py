"""The similarity against known motions and numpy's least squares; the warp against pixels moved by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from partialfc.data.align import (
    TEMPLATE,
    align_faces,
    invert_similarity,
    scaled_template,
    similarity_transform,
    transform_points,
    warp,
)


def moved(points: Tensor, scale: float, angle: float, x: float, y: float) -> Tensor:
    cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
    turn = torch.tensor([[cosine, -sine], [sine, cosine]], dtype=points.dtype)
    return points @ turn.T + torch.tensor([x, y], dtype=points.dtype)


@settings(max_examples=30, deadline=None)
@given(
    scale=st.floats(0.05, 20),
    angle=st.floats(-math.pi, math.pi),
    x=st.floats(-500, 500),
    y=st.floats(-500, 500),
)
def test_a_similarity_is_found_again(scale: float, angle: float, x: float, y: float) -> None:
    source = moved(TEMPLATE, scale, angle, x, y)[None]
    matrix = similarity_transform(source, TEMPLATE)
    assert torch.allclose(transform_points(matrix, source)[0], TEMPLATE, atol=1e-6)
    assert float(torch.linalg.det(matrix[0, :, :2])) == pytest.approx(1 / scale**2, rel=1e-6)


def test_noisy_points_get_the_least_squares_similarity() -> None:
    source = torch.randn(6, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 20
    matrices = similarity_transform(source, TEMPLATE)
    for points, matrix in zip(source.numpy(), matrices.numpy(), strict=True):
        x, y = points[:, 0], points[:, 1]
        zeros, ones = np.zeros(5), np.ones(5)
        rows = np.concatenate([np.stack([x, -y, ones, zeros], 1), np.stack([y, x, zeros, ones], 1)])
        goal = np.concatenate([TEMPLATE[:, 0].numpy(), TEMPLATE[:, 1].numpy()])
        cosine, sine, shift_x, shift_y = np.linalg.lstsq(rows, goal, rcond=None)[0]
        assert np.allclose(matrix, [[cosine, -sine, shift_x], [sine, cosine, shift_y]])


def test_a_mirrored_face_is_not_mirrored_back() -> None:
    mirrored = TEMPLATE * torch.tensor([-1.0, 1.0])
    matrix = similarity_transform(mirrored[None], TEMPLATE)
    assert float(torch.linalg.det(matrix[0, :, :2])) > 0


def test_the_type_and_device_of_the_points_are_kept() -> None:
    assert similarity_transform(TEMPLATE[None].float(), TEMPLATE).dtype == torch.float32
    assert similarity_transform(TEMPLATE[None], TEMPLATE[None]).dtype == torch.float64


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.zeros(2, 5, 2), TEMPLATE),
        (TEMPLATE, TEMPLATE),
        (TEMPLATE[None, :, :1], TEMPLATE),
        (TEMPLATE[None, :1], TEMPLATE[:1]),
        (TEMPLATE[None, :4], TEMPLATE),
    ],
)
def test_points_that_determine_nothing_are_refused(source: Tensor, target: Tensor) -> None:
    with pytest.raises(ValueError, match=r"coincide|do not fit"):
        similarity_transform(source, target)


def test_an_inverse_undoes_its_matrix() -> None:
    matrices = similarity_transform(moved(TEMPLATE, 2.5, 0.4, 7, -3)[None], TEMPLATE)
    there = transform_points(matrices, TEMPLATE[None])
    assert torch.allclose(transform_points(invert_similarity(matrices), there)[0], TEMPLATE)


def ramp_images(height: int = 9, width: int = 12) -> Tensor:
    x, y = torch.arange(width) * 10, torch.arange(height)[:, None] * 20
    plane = (x + y).clamp(0, 255).to(torch.uint8)
    return plane[None, :, :, None].expand(1, height, width, 3).contiguous()


def test_the_identity_copies_and_pads_with_black() -> None:
    images = ramp_images()
    out = warp(images, torch.tensor([[[1.0, 0, 0], [0, 1, 0]]]), 14)
    assert torch.equal(out[0, :9, :12], images[0])
    assert int(out[0, 9:].max()) == 0
    assert int(out[0, :, 12:].max()) == 0


def test_half_a_pixel_to_the_right_averages_neighbours() -> None:
    out = warp(ramp_images(), torch.tensor([[[1.0, 0, -0.5], [0, 1, 0]]]), 8)
    assert out[0, 2, :8, 0].tolist() == [45 + 10 * step for step in range(8)]


def test_a_quarter_turn_permutes_pixels() -> None:
    images = torch.arange(4 * 4 * 3, dtype=torch.uint8).view(1, 4, 4, 3)
    out = warp(images, torch.tensor([[[0.0, -1, 3], [1, 0, 0]]]), 4)
    assert torch.equal(out[0], images[0].rot90(-1))


@pytest.mark.parametrize(
    ("images", "matrices"),
    [
        (torch.zeros(1, 4, 4, 3), torch.zeros(1, 2, 3)),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, 2, 3)),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(1, 2, 3)),
    ],
)
def test_images_that_cannot_be_warped_are_refused(images: Tensor, matrices: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be uint8|need matrices"):
        warp(images, matrices, 8)


def test_aligning_brings_the_marked_spots_onto_the_template() -> None:
    landmarks = moved(TEMPLATE, 1.7, 0.3, 60, 20)
    image = torch.zeros(1, 300, 300, 3, dtype=torch.uint8)
    for x, y in landmarks.round().long().tolist():
        image[0, y - 2 : y + 3, x - 2 : x + 3] = 255
    aligned = align_faces(image, landmarks[None], size=224)
    for x, y in scaled_template(224).round().long().tolist():
        assert int(aligned[0, y, x, 0]) > 150
