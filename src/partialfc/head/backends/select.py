"""Which way of computing the two passes a step takes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from partialfc.head.backends.compiled import numba_kernels_for
from partialfc.head.backends.torch_chunked import ChunkedBackend
from partialfc.head.loss import Path
from partialfc.head.margins.base import Margin


@cache
def _triton_path(device: torch.device) -> Path | None:
    """The GPU's path; None without Triton (PyTorch brings it along on Linux), or on a GPU without bfloat16 products."""
    try:
        from partialfc.head.backends.gpu import GPUBackend
    except ImportError:
        return None
    return GPUBackend() if torch.cuda.get_device_capability(device) >= (8, 0) else None


def select_backend(centers: Tensor, embeddings: Tensor, margin: Margin) -> Path:
    """The fastest path that takes these centers (L × K, D), embeddings (B, D) and this margin."""
    plain = margin.sub_centers == 1 and not margin.reweights_negatives and embeddings.dtype != torch.float64
    if plain and numba_kernels_for(centers) is not None:
        from partialfc.head.backends.cpu import CPUBackend

        return CPUBackend()
    if plain and centers.is_cuda and centers.dtype in (torch.float32, torch.bfloat16):
        return _triton_path(centers.device) or ChunkedBackend()
    return ChunkedBackend()
