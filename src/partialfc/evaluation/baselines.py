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

_AT_ONCE = 512


def pixel_embeddings(images: Images, *, size: int = 32, window: int = 9) -> Tensor:
    """Grey images at `size` × `size` with locally normalised contrast, so that brightness and light cancel.

    From each pixel the mean of the window around it is subtracted, and the difference divided by the window's standard
    deviation. As for a model, the mirror image's embedding is added.

    Args:
        images: uint8 (N, H, W, 3) RGB, aligned.
        size: side of the small image.
        window: side of the square over which a pixel is normalised, odd.

    Returns:
        float32 (N, size²).
    """
    return torch.cat([_pixels(images[start : start + _AT_ONCE], size, window) for start in _starts(images)])


def _pixels(images: Images, size: int, window: int) -> Tensor:
    weights = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601 luma
    grey = F.adaptive_avg_pool2d(torch.from_numpy(images.astype(np.float32) @ weights)[:, None], size)
    deviation = grey - _window_mean(grey, window)
    contrast = _window_mean(deviation.square(), window).sqrt()
    # Below a few grey levels, contrast is noise: it is not blown up to that of a feature.
    normalised = deviation / (contrast + 4.0)
    return (normalised + normalised.flip(3)).flatten(1)


def _window_mean(maps: Tensor, window: int) -> Tensor:
    """The mean over the window around each pixel, as far as it lies in the image: (N, 1, S, S) to the same."""
    return F.avg_pool2d(maps, window, stride=1, padding=window // 2, count_include_pad=False)


def color_embeddings(images: Images, *, bins: int = 8) -> Tensor:
    """The square roots of each image's joint RGB histogram, less their mean over all images.

    The inner product of two such roots is the Bhattacharyya coefficient of the histograms; without the mean, it is what
    sets the two apart from the rest that counts.

    Args:
        images: uint8 (N, H, W, 3) RGB.
        bins: bins a channel.

    Returns:
        float32 (N, bins³).
    """
    roots = torch.cat([_root_histograms(images[start : start + _AT_ONCE], bins) for start in _starts(images)])
    return roots - roots.mean(dim=0)


def _root_histograms(images: Images, bins: int) -> Tensor:
    levels = images.astype(np.int64) * bins // 256
    codes = ((levels[..., 0] * bins + levels[..., 1]) * bins + levels[..., 2]).reshape(len(images), -1)
    rows = np.arange(len(images))[:, None] * bins**3
    counts = np.bincount((rows + codes).ravel(), minlength=len(images) * bins**3).reshape(len(images), bins**3)
    return torch.from_numpy(np.sqrt(counts / codes.shape[1]).astype(np.float32))


def _starts(images: Images) -> range:
    """Where each part of the images begins that is small enough to be turned into wider numbers."""
    return range(0, len(images), _AT_ONCE)
