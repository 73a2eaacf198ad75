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

_BATCH_SIZE = 512  # wider numbers than uint8 take room
_SIDE = 32  # of the small image
_WINDOW = 9  # side of the square over which a pixel is normalised
_BINS = 8  # a channel


def pixel_embeddings(images: Images, *, flip: bool = True) -> Tensor:
    """Grey images at 32 × 32 with locally normalised contrast, which cancels brightness and light.

    A pixel becomes (pixel - mean) / standard deviation over the 9 × 9 window around it.

    Args:
        images: uint8 (N, H, W, 3) RGB, aligned.
        flip: add the embedding of the mirrored image, as for the model that it stands beside (`ModelConfig.flip`).

    Returns:
        float32 (N, 1024).
    """
    return torch.cat([_pixels(batch, flip) for batch in _batches(images)])


def _pixels(images: Images, flip: bool) -> Tensor:
    weights = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601 luma
    grey = F.adaptive_avg_pool2d(torch.from_numpy(images.astype(np.float32) @ weights)[:, None], _SIDE)
    deviation = grey - _window_mean(grey)
    contrast = _window_mean(deviation.square()).sqrt()
    # Contrast of a few grey levels is noise, and is not amplified to that of a feature.
    normalised = deviation / (contrast + 4.0)
    return (normalised + normalised.flip(3) if flip else normalised).flatten(1)


def _window_mean(maps: Tensor) -> Tensor:
    """The mean over the part of the window that lies in the image: (N, 1, S, S) to the same shape."""
    return F.avg_pool2d(maps, _WINDOW, stride=1, padding=_WINDOW // 2, count_include_pad=False)


def color_embeddings(images: Images) -> Tensor:
    """The square roots of each image's joint RGB histogram, less their mean over all images.

    The inner product of two roots is the Bhattacharyya coefficient of the histograms. Without the mean, it compares
    only what is not common to all images. A mirrored image has the same histogram.

    Args:
        images: uint8 (N, H, W, 3) RGB.

    Returns:
        float32 (N, 512), one for each of 8³ bins.
    """
    roots = torch.cat([_root_histograms(batch) for batch in _batches(images)])
    return roots - roots.mean(dim=0)


def _root_histograms(images: Images) -> Tensor:
    levels = images.astype(np.int64) * _BINS // 256
    codes = ((levels[..., 0] * _BINS + levels[..., 1]) * _BINS + levels[..., 2]).reshape(len(images), -1)
    rows = np.arange(len(images))[:, None] * _BINS**3
    counts = np.bincount((rows + codes).ravel(), minlength=len(images) * _BINS**3).reshape(len(images), -1)
    return torch.from_numpy(np.sqrt(counts / codes.shape[1]).astype(np.float32))


def _batches(images: Images) -> list[Images]:
    return np.split(images, range(_BATCH_SIZE, len(images), _BATCH_SIZE))
