"""Which way of computing the two passes a step takes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from partialfc.head.compiled import compiled_for
from partialfc.head.margins import Margin
from partialfc.head.softmax import Path
from partialfc.head.softmax_chunked import ChunkedPath


@cache
def _triton_path(device: torch.device) -> Path | None:
    """The GPU's path; None without Triton (PyTorch brings it along on Linux), or on a GPU without bfloat16 products."""
    try:
        from partialfc.head.softmax_triton import TritonPath
    except ImportError:
        return None
    return TritonPath() if torch.cuda.get_device_capability(device) >= (8, 0) else None


def choose_path(centers: Tensor, embeddings: Tensor, margin: Margin) -> Path:
    """The fastest path that takes these centers (L × K, D), embeddings (B, D) and this margin."""
    plain = margin.sub_centers == 1 and not margin.reweights_negatives and embeddings.dtype != torch.float64
    if plain and compiled_for(centers) is not None:
        from partialfc.head.softmax_cpu import CPUPath

        return CPUPath()
    if plain and centers.is_cuda and centers.dtype in (torch.float32, torch.bfloat16):
        return _triton_path(centers.device) or ChunkedPath()
    return ChunkedPath()
