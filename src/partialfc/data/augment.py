"""From uint8 images to what a network eats, batched, on the device where the images are."""

from __future__ import annotations

import torch
from torch import Tensor

from partialfc.core import keyed_random


def normalise(images: Tensor) -> Tensor:
    """(x / 255 - 0.5) / 0.5.

    Args:
        images: uint8 (B, H, W, 3).

    Returns:
        float32 (B, 3, H, W) in [-1, 1], in channels-last memory order.
    """
    return images.permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0)


def augment(images: Tensor, positions: Tensor, seed: int, *, flip: bool = True) -> Tensor:
    """Mirror half of the images, chosen by a keyed coin for each position in the endless order, and normalise.

    A sample's augmentation depends on (seed, position) alone: not on the rank, the batch or what was drawn before.

    Args:
        images: uint8 (B, H, W, 3).
        positions: int64 (B,), each sample's place in the endless order (`Batch.positions`).
        seed: the run's seed.
        flip: False leaves the images as they are.

    Returns:
        As `normalise`.
    """
    if not flip:
        return normalise(images)
    mirrored = keyed_random.bits(keyed_random.derive_key(seed, "flip"), positions.to(images.device)) < 0
    # Choosing whole rows of both versions is several times as fast as torch.where on a CPU, and choosing by a mask
    # would make a GPU wait for the host.
    rows = torch.arange(len(images), device=images.device) + len(images) * mirrored
    return normalise(torch.cat((images, images.flip(2))).index_select(0, rows))
