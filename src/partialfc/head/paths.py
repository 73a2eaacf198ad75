"""Which way of computing the two passes a step takes."""

from __future__ import annotations

from torch import Tensor

from partialfc.head.compiled import compiled_for
from partialfc.head.softmax import Path, ShardBatch
from partialfc.head.softmax_chunked import ChunkedPath


def choose_path(centers: Tensor, batch: ShardBatch) -> Path:
    """The fastest path that takes these centers (L × K, D) and this margin."""
    plain = batch.margin.sub_centers == 1 and not batch.margin.reweights_negatives
    if plain and compiled_for(centers, batch.embeddings) is not None:
        from partialfc.head.softmax_cpu import CPUPath

        return CPUPath()
    return ChunkedPath()
