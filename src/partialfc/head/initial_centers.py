"""Where centers begin: a function of the seed and the class, wherever the class lives."""

from __future__ import annotations

import torch
from torch import Tensor

from partialfc.core import keyed_random

_DEVIATION = 0.01
_CHUNK = 1 << 20  # elements drawn at once


def initial_centers(
    rows: range, width: int, seed: int, device: torch.device | str | None, dtype: torch.dtype
) -> Tensor:
    """(len(rows), width) normal with deviation 0.01: rows `rows` of the whole head, the same at any world size."""
    centers = torch.empty(len(rows), width, dtype=dtype, device=device)
    key = keyed_random.derive_key(seed, "centers")
    step = max(1, _CHUNK // width)
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        values = keyed_random.normal_rows(key, start, stop, width, device=centers.device)
        centers[start - rows.start : stop - rows.start] = values * _DEVIATION
    return centers
