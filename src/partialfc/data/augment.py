"""From uint8 images to the input of a network, in batches, on the device of the images."""

from __future__ import annotations

import torch
from torch import Tensor

from partialfc.core import keyed_random
from partialfc.data.augmentations import PRESETS

_PART = 16  # images that stay in a CPU's cache from one operation to the next


def normalise(images: Tensor) -> Tensor:
    """(x / 255 - 0.5) / 0.5.

    Args:
        images: uint8 (B, H, W, 3).

    Returns:
        float32 (B, 3, H, W) in [-1, 1], in channels-last memory format.
    """
    return images.permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0)


def augment(images: Tensor, positions: Tensor, seed: int, *, flip: bool = True, preset: str = "flip") -> Tensor:
    """Mirror a random half of the images, apply the augmentations of a preset, and normalise all.

    A sample's augmentation depends on (seed, position) alone: not on the rank, the batch or earlier draws.

    Args:
        images: uint8 (B, S, S, 3).
        positions: int64 (B,), on the CPU, each sample's position in the sample stream (`Batch.positions`).
        seed: the run's seed.
        flip: False mirrors none.
        preset: a key of `PRESETS`.

    Returns:
        As `normalise`.
    """
    if flip:
        mirrored = keyed_random.bits(keyed_random.derive_key(seed, "flip"), positions.to(images.device)) < 0
    outputs = torch.empty(images.shape, dtype=torch.float32, device=images.device).permute(0, 3, 1, 2)
    size = _PART if images.device.type == "cpu" else max(1, len(images))
    for part in (slice(start, start + size) for start in range(0, len(images), size)):
        inputs = _mirror(images[part], mirrored[part]) if flip else images[part]
        inputs = _augment(inputs.permute(0, 3, 1, 2).to(torch.float32), positions[part], seed, preset)
        torch.div(inputs, 127.5, out=outputs[part]).sub_(1.0)
    return outputs


def _mirror(images: Tensor, mirrored: Tensor) -> Tensor:
    # Selecting whole rows of both versions is several times as fast as torch.where on a CPU, and a boolean mask
    # would make a GPU wait for the host.
    rows = torch.arange(len(images), device=images.device) + len(images) * mirrored
    return torch.cat((images, images.flip(2))).index_select(0, rows)


def _augment(inputs: Tensor, positions: Tensor, seed: int, preset: str) -> Tensor:
    """Apply the augmentations of a preset to float32 (B, 3, S, S) in [0, 255], in place."""
    for augmentation, probability in PRESETS[preset]:
        name = augmentation.__name__

        def uniform(purpose: str, of: Tensor, name: str = name) -> Tensor:
            return keyed_random.uniform(keyed_random.derive_key(seed, name, purpose), of)

        # Drawn on the CPU, so that a GPU does not wait for the host to learn which images are chosen.
        chosen = (uniform("chosen", positions) < probability).nonzero()[:, 0]
        if not len(chosen):
            continue

        def draw(purpose: str, of: Tensor = positions[chosen]) -> Tensor:
            return uniform(purpose, of).float().to(inputs.device, non_blocking=True)

        rows = chosen.to(inputs.device, non_blocking=True)
        inputs[rows] = augmentation(inputs[rows].contiguous(), draw)
    return inputs


def augmented_sheet(images: Tensor, seed: int, *, flip: bool = True, rows: int = 3) -> Tensor:
    """Images as they are, and below them `rows` rows of each preset but "flip": uint8 (height, width, 3).

    Args:
        images: uint8 (B, S, S, 3), B of them beside each other.
        seed: of the augmentations.
        flip: as in `augment`.
    """
    sheet = [images]
    for preset in PRESETS:
        for row in range(rows if preset != "flip" else 0):
            positions = torch.arange(len(images)) + row * len(images)
            inputs = augment(images, positions, seed, flip=flip, preset=preset)
            sheet.append(inputs.add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1))
    return torch.cat([torch.cat(list(row), dim=1) for row in sheet])
