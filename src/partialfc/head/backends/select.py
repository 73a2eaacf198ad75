"""Which backend computes a step, and whether numba's kernels are there: an extra (`pip install 'partialfc[cpu]'`)."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from partialfc.head.backends.base import Backend
from partialfc.head.backends.torch_chunked import ChunkedBackend
from partialfc.head.margins.base import Margin


@cache
def numba_kernels() -> ModuleType | None:
    """`partialfc.head.backends.cpu_kernels`, None without numba."""
    try:
        from partialfc.head.backends import cpu_kernels
    except ImportError:
        return None
    return cpu_kernels


def numba_kernels_for(*tensors: Tensor) -> ModuleType | None:
    """`numba_kernels` if they accept these tensors: float32 on a CPU."""
    if all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors):
        return numba_kernels()
    return None


@cache
def _gpu_backend(device: torch.device) -> Backend | None:
    """None without Triton (on Linux PyTorch installs it), or on a GPU without bfloat16 products."""
    try:
        from partialfc.head.backends.gpu import GPUBackend
    except ImportError:
        return None
    return GPUBackend() if torch.cuda.get_device_capability(device) >= (8, 0) else None


def select_backend(centers: Tensor, embeddings: Tensor, margin: Margin) -> Backend:
    """The fastest backend that accepts these centers (L × K, D), embeddings (B, D) and this margin."""
    compiled = margin.sub_centers == 1 and embeddings.dtype != torch.float64
    if compiled and numba_kernels_for(centers) is not None:
        from partialfc.head.backends.cpu import CPUBackend

        return CPUBackend()
    compiled &= margin.negatives_bound == 1
    if compiled and centers.is_cuda and centers.dtype in (torch.float32, torch.bfloat16):
        return _gpu_backend(centers.device) or ChunkedBackend()
    return ChunkedBackend()
