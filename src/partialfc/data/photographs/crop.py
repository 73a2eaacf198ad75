"""A face cut from a photograph of any size by a similarity."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from partialfc.data.align import (
    TEMPLATE_SIZE,
    invert_similarity,
    scaled_template,
    similarity_transform,
    transform_points,
    warp,
)
from partialfc.data.photographs.face import Pixels


def align_face(image: Pixels, points: np.ndarray, size: int = TEMPLATE_SIZE) -> Pixels:
    """The aligned crop of a face, uint8 (size, size, 3), black outside the image.

    Args:
        image: uint8 (H, W, 3).
        points: its five points (5, 2), in pixels.
        size: side of the crop in pixels.

    Raises:
        ValueError: the points coincide.
    """
    matrix = similarity_transform(torch.from_numpy(points)[None].double(), scaled_template(size))
    return cut(image, matrix, size).numpy()


def cut(image: Pixels, matrix: Tensor, size: int) -> Tensor:
    """The part of an image that a similarity maps to `size` x `size` pixels, without aliasing.

    Bilinear samples that are k pixels apart would miss those between, so that the image is averaged over blocks of
    k x k pixels first. Where the similarity shrinks less than twice, that is `warp` alone.

    Args:
        image: uint8 (H, W, 3).
        matrix: float64 (1, 2, 3), from pixels of the image to pixels of the output.
        size: side of the output in pixels.

    Returns:
        uint8 (size, size, 3), black outside the image.
    """
    inverse = invert_similarity(matrix)
    block = max(1, int(torch.linalg.vector_norm(inverse[0, :, 0]) + 1e-6))
    corners = torch.tensor([[[x, y] for x in (0, size) for y in (0, size)]], dtype=torch.float64)
    reach = transform_points(inverse, corners)[0]
    limits = torch.tensor([image.shape[1], image.shape[0]])
    start = (reach.amin(0).floor().long() - 2 * block).clamp(min=0).minimum(limits)
    stop = (reach.amax(0).ceil().long() + 2 * block).clamp(min=0).minimum(limits)
    (left, top), (right, bottom) = start.tolist(), stop.tolist()
    if left >= right or top >= bottom:
        return torch.zeros(size, size, 3, dtype=torch.uint8)
    part = Image.fromarray(np.ascontiguousarray(image[top:bottom, left:right])).reduce(block)
    linear = matrix[:, :, :2]
    shift = matrix[:, :, 2] + (linear @ (start.double() + (block - 1) / 2)[:, None]).squeeze(2)
    reduced = torch.cat([linear * block, shift[:, :, None]], dim=2)
    return warp(torch.from_numpy(np.array(part))[None], reduced, size)[0]
