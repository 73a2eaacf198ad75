"""From uint8 images to the input of a network, in batches, on the device of the images."""

from __future__ import annotations

import torch
from torch import Tensor

from partialfc.core import keyed_random


def normalise(images: Tensor) -> Tensor:
    """(x / 255 - 0.5) / 0.5.

    Args:
        images: uint8 (B, H, W, 3).

    Returns:
        float32 (B, 3, H, W) in [-1, 1], in channels-last memory format.
    """
    return images.permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0)


def augment(images: Tensor, positions: Tensor, seed: int, *, flip: bool = True) -> Tensor:
    """Mirror a random half of the images and normalise all.

    A sample's augmentation depends on (seed, position) alone: not on the rank, the batch or earlier draws.

    Args:
        images: uint8 (B, H, W, 3).
        positions: int64 (B,), each sample's position in the sample stream (`Batch.positions`).
        seed: the run's seed.
        flip: False mirrors none.

    Returns:
        As `normalise`.
    """
    if not flip:
        return normalise(images)
    mirrored = keyed_random.bits(keyed_random.derive_key(seed, "flip"), positions.to(images.device)) < 0
    # Selecting whole rows of both versions is several times as fast as torch.where on a CPU, and a boolean mask would
    # make a GPU wait for the host.
    rows = torch.arange(len(images), device=images.device) + len(images) * mirrored
    return normalise(torch.cat((images, images.flip(2))).index_select(0, rows))
