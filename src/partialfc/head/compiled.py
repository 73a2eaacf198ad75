"""Whether the compiled row loops are there: numba is an extra (`pip install 'partialfc[cpu]'`)."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor


@cache
def row_loops() -> ModuleType | None:
    """`partialfc.head.kernels_cpu`, None without numba."""
    try:
        from partialfc.head import kernels_cpu
    except ImportError:
        return None
    return kernels_cpu


def compiled_for(*tensors: Tensor) -> ModuleType | None:
    """The row loops, if they take tensors such as these: float32 on a CPU."""
    if all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors):
        return row_loops()
    return None
