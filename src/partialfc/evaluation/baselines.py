"""Baselines without learning, raw pixels and colours: a benchmark that they solve is too easy.

Each function turns images into "embeddings", which are evaluated by the same protocol as those of a model.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Images = NDArray[np.uint8]

_BATCH_SIZE = 512


def pixel_embeddings(images: Images, *, size: int = 32, window: int = 9) -> Tensor:
    """Grey images at `size` × `size` with locally normalised contrast, which cancels brightness and light.

    A pixel becomes (pixel - mean) / standard deviation over the window around it. As for a model, the embedding of the
    mirrored image is added.

    Args:
        images: uint8 (N, H, W, 3) RGB, aligned.
        size: side of the small image.
        window: side of the square over which a pixel is normalised, odd.

    Returns:
        float32 (N, size²).
    """
    return torch.cat([_pixels(images[start : start + _BATCH_SIZE], size, window) for start in _batch_starts(images)])


def _pixels(images: Images, size: int, window: int) -> Tensor:
    weights = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601 luma
    grey = F.adaptive_avg_pool2d(torch.from_numpy(images.astype(np.float32) @ weights)[:, None], size)
    deviation = grey - _window_mean(grey, window)
    contrast = _window_mean(deviation.square(), window).sqrt()
    # Contrast of a few grey levels is noise, and is not amplified to that of a feature.
    normalised = deviation / (contrast + 4.0)
    return (normalised + normalised.flip(3)).flatten(1)


def _window_mean(maps: Tensor, window: int) -> Tensor:
    """The mean over the part of the window that lies in the image: (N, 1, S, S) to the same shape."""
    return F.avg_pool2d(maps, window, stride=1, padding=window // 2, count_include_pad=False)


def color_embeddings(images: Images, *, bins: int = 8) -> Tensor:
    """The square roots of each image's joint RGB histogram, less their mean over all images.

    The inner product of two roots is the Bhattacharyya coefficient of the histograms. Without the mean, it compares
    only what is not common to all images.

    Args:
        images: uint8 (N, H, W, 3) RGB.
        bins: bins a channel.

    Returns:
        float32 (N, bins³).
    """
    roots = torch.cat([_root_histograms(images[start : start + _BATCH_SIZE], bins) for start in _batch_starts(images)])
    return roots - roots.mean(dim=0)


def _root_histograms(images: Images, bins: int) -> Tensor:
    levels = images.astype(np.int64) * bins // 256
    codes = ((levels[..., 0] * bins + levels[..., 1]) * bins + levels[..., 2]).reshape(len(images), -1)
    rows = np.arange(len(images))[:, None] * bins**3
    counts = np.bincount((rows + codes).ravel(), minlength=len(images) * bins**3).reshape(len(images), bins**3)
    return torch.from_numpy(np.sqrt(counts / codes.shape[1]).astype(np.float32))


def _batch_starts(images: Images) -> range:
    """The first image of each batch: wider numbers than uint8 take room."""
    return range(0, len(images), _BATCH_SIZE)
