"""Whether the compiled row loops are there: numba is an extra (`pip install 'partialfc[cpu]'`)."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor


@cache
def row_loops() -> ModuleType | None:
    """`partialfc.head.backends.cpu_kernels`, None without numba."""
    try:
        from partialfc.head.backends import cpu_kernels
    except ImportError:
        return None
    return cpu_kernels


def numba_kernels_for(*tensors: Tensor) -> ModuleType | None:
    """The row loops, if they take tensors such as these: float32 on a CPU."""
    if all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors):
        return row_loops()
    return None
