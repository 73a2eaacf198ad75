"""Alignment: the similarity that maps five landmarks to the template, and the bilinear warp that applies it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Image-left eye, image-right eye, nose tip, left and right mouth corner, in pixels of a 112 x 112 image.
TEMPLATE = torch.tensor(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]],
    dtype=torch.float64,
)
TEMPLATE_SIZE = 112
MIRRORED = [1, 0, 2, 4, 3]  # the order of the landmarks of a mirrored face


def scaled_template(size: int) -> Tensor:
    """The five template landmarks of a `size` x `size` image: float64 (5, 2), pixels."""
    return TEMPLATE * (size / TEMPLATE_SIZE)


def similarity_transform(source: Tensor, target: Tensor) -> Tensor:
    """The least-squares similarity (rotation, one scale, shift; no reflection) from `source` to `target`.

    Umeyama (PAMI 1991), in the plane, where no singular value decomposition is needed: with centred points as complex
    numbers s and t, the best rotation and scale is sum(conj(s) t) / sum(|s|^2).

    Args:
        source: points (B, N, 2), N at least 2.
        target: points (N, 2) or (B, N, 2).

    Returns:
        Matrices (B, 2, 3), dtype and device of `source`, with target ~ matrix[:, :2] @ point + matrix[:, 2].

    Raises:
        ValueError: the shapes do not fit, or the points of a sample all coincide.
    """
    if source.ndim != 3 or source.shape[-1] != 2 or source.shape[1] < 2 or target.shape[-2:] != source.shape[-2:]:
        raise ValueError(f"points of shape {tuple(source.shape)} do not fit a target of {tuple(target.shape)}")
    points = source.double()
    targets = target.to(points).expand_as(points)
    point_mean, target_mean = points.mean(1), targets.mean(1)
    s, t = points - point_mean[:, None], targets - target_mean[:, None]
    spread = (s**2).sum((1, 2))
    if bool((spread <= 0).any()):
        raise ValueError("the points of a sample coincide, so that no similarity is determined")
    cosine = (s * t).sum((1, 2)) / spread
    sine = (s[..., 0] * t[..., 1] - s[..., 1] * t[..., 0]).sum(1) / spread
    shift_x = target_mean[:, 0] - (cosine * point_mean[:, 0] - sine * point_mean[:, 1])
    shift_y = target_mean[:, 1] - (sine * point_mean[:, 0] + cosine * point_mean[:, 1])
    rows = torch.stack([cosine, -sine, shift_x, sine, cosine, shift_y], dim=1)
    return rows.view(-1, 2, 3).to(source.dtype)


def invert_similarity(matrices: Tensor) -> Tensor:
    """The inverses (B, 2, 3) of similarities (B, 2, 3)."""
    cosine, sine = matrices[:, 0, 0], matrices[:, 1, 0]
    square = cosine**2 + sine**2
    cosine, sine = cosine / square, sine / square
    shift_x = -(cosine * matrices[:, 0, 2] + sine * matrices[:, 1, 2])
    shift_y = sine * matrices[:, 0, 2] - cosine * matrices[:, 1, 2]
    return torch.stack([cosine, sine, shift_x, -sine, cosine, shift_y], dim=1).view(-1, 2, 3)


def transform_points(matrices: Tensor, points: Tensor) -> Tensor:
    """Points (B, N, 2) transformed by affine matrices (B, 2, 3)."""
    x, y = points[..., 0, None], points[..., 1, None]
    return x * matrices[:, None, :, 0] + y * matrices[:, None, :, 1] + matrices[:, None, :, 2]


def warp(images: Tensor, matrices: Tensor, size: int) -> Tensor:
    """Images warped by similarities to `size` x `size`: bilinear, black outside the source.

    Args:
        images: uint8 (B, H, W, 3).
        matrices: float (B, 2, 3), from source pixels to output pixels (pixel centres at integers).
        size: side of the output in pixels.

    Returns:
        uint8 (B, size, size, 3).

    Raises:
        ValueError: the shapes do not fit, or the images are not uint8.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be uint8 (B, H, W, 3), not {images.dtype} {tuple(images.shape)}")
    if matrices.shape != (len(images), 2, 3):
        raise ValueError(f"{len(images)} images need matrices ({len(images)}, 2, 3), not {tuple(matrices.shape)}")
    height, width = images.shape[1:3]
    axis = torch.arange(size, dtype=torch.float64, device=images.device)
    pixels = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).view(1, -1, 2)
    inverse = invert_similarity(matrices.double())
    source = transform_points(inverse, pixels.expand(len(images), -1, -1)).view(-1, size, size, 2)
    extent = torch.tensor([width, height], dtype=torch.float64, device=images.device)
    grid = ((2 * source + 1) / extent - 1).float()
    planes = images.permute(0, 3, 1, 2).float()
    warped = F.grid_sample(planes, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return warped.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def align_faces(images: Tensor, landmarks: Tensor, size: int = TEMPLATE_SIZE) -> Tensor:
    """Images uint8 (B, H, W, 3) with landmarks (B, 5, 2) in pixels, aligned: uint8 (B, size, size, 3)."""
    return warp(images, similarity_transform(landmarks, scaled_template(size).to(landmarks.device)), size)
