"""Which way of computing the two passes a step takes."""

from __future__ import annotations

import torch
from torch import Tensor

from partialfc.head.compiled import compiled_for
from partialfc.head.margins import Margin
from partialfc.head.softmax import Path
from partialfc.head.softmax_chunked import ChunkedPath


def choose_path(centers: Tensor, embeddings: Tensor, margin: Margin) -> Path:
    """The fastest path that takes these centers (L × K, D), embeddings (B, D) and this margin."""
    plain = margin.sub_centers == 1 and not margin.reweights_negatives
    if plain and embeddings.dtype != torch.float64 and compiled_for(centers) is not None:
        from partialfc.head.softmax_cpu import CPUPath

        return CPUPath()
    return ChunkedPath()
