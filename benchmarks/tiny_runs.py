"""Tiny runs: images that a small network can learn, and metrics that are equal for equal runs. Tests use them too."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from partialfc.core import keyed_random
from partialfc.data.images import encode_png

_TIMINGS = ("images_per_second", "data_wait", "peak_bytes", "gpu_peak_bytes")


def without_timings(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of metrics without the figures that depend on the machine and its load."""
    return [{key: value for key, value in line.items() if key not in _TIMINGS} for line in lines]


def pattern_image(identity: str, shot: int, size: int = 16) -> bytes:
    """The PNG of a pattern, a function of the identity's name, with noise, a function of the shot too."""
    pattern = keyed_random.uniform(keyed_random.derive_key(identity), torch.arange(48)).view(4, 4, 3)
    pattern = pattern.repeat_interleave(size // 4, 0).repeat_interleave(size // 4, 1)
    noise = keyed_random.uniform(keyed_random.derive_key(identity, shot), torch.arange(size * size * 3))
    return encode_png((pattern * 200 + noise.view(size, size, 3) * 55).to(torch.uint8).numpy())


def write_images(folder: Path, identities: Iterable[str], shots: int = 4, size: int = 16) -> Path:
    """A folder of identity folders with `shots` images each."""
    for identity in identities:
        (folder / identity).mkdir(parents=True)
        for shot in range(shots):
            (folder / identity / f"{shot}.png").write_bytes(pattern_image(identity, shot, size))
    return folder
