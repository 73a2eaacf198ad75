"""What raw pixels and colours achieve: the measure below which a benchmark would be too easy.

Each function turns images into "embeddings" without any learning; the same protocol as for a model evaluates them.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Images = NDArray[np.uint8]


def pixel_embeddings(images: Images, *, size: int = 16) -> Tensor:
    """Grey images at `size` × `size`, each with its own mean removed and its contrast normalised.

    Args:
        images: uint8 (N, H, W, 3) RGB, aligned.

    Returns:
        float32 (N, size²); the inner product of two of them is their normalised correlation.
    """
    weights = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601 luma
    grey = torch.from_numpy(images.astype(np.float32) @ weights)[:, None]
    pixels = F.adaptive_avg_pool2d(grey, size).flatten(1)
    pixels = pixels + F.adaptive_avg_pool2d(grey.flip(3), size).flatten(1)
    return F.normalize(pixels - pixels.mean(dim=1, keepdim=True))


def color_embeddings(images: Images, *, bins: int = 8) -> Tensor:
    """The square roots of each image's joint RGB histogram: their inner product is the Bhattacharyya coefficient.

    Args:
        images: uint8 (N, H, W, 3) RGB.
        bins: bins a channel.

    Returns:
        float32 (N, bins³).
    """
    levels = images.astype(np.int64) * bins // 256
    codes = ((levels[..., 0] * bins + levels[..., 1]) * bins + levels[..., 2]).reshape(len(images), -1)
    rows = np.arange(len(images))[:, None] * bins**3
    counts = np.bincount((rows + codes).ravel(), minlength=len(images) * bins**3).reshape(len(images), bins**3)
    return torch.from_numpy(np.sqrt(counts / codes.shape[1]).astype(np.float32))
