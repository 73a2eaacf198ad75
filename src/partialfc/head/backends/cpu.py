"""The two passes on a CPU: matrix products by PyTorch, row loops between them by numba, tiles spread over threads.

The arrays of a tile fit in a core's cache, and a thread runs all stages of its tiles, so that no stage waits for
another thread and only the weights kept for the second pass go through memory. The work is split into a fixed number of
parts, summed in order: the result does not depend on the number of threads.
"""

from __future__ import annotations

import math
import threading
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from partialfc.core.threads import run_parallel
from partialfc.head.backends import cpu_kernels
from partialfc.head.backends.base import CenterGradient, NegativeSums, ScratchView, ShardBatch, tile_bounds
from partialfc.head.backends.tile_sizes import CPU_PARTS, cpu_kept_classes, cpu_tile_classes
from partialfc.head.loss import NO_THRESHOLD


class CPUBackend:
    """`Backend` for float32 centers, one per class."""

    supports_padding: ClassVar[bool] = False
    uses_thread_pool: ClassVar[bool] = True

    def tile_classes(self, batch: ShardBatch) -> int:
        samples, width = batch.embeddings.shape
        return cpu_tile_classes(samples, width, batch.config.scratch_bytes)

    def sum_negatives(self, centers: Tensor, batch: ShardBatch, *, keep: bool) -> NegativeSums:
        bounds = list(tile_bounds(self, batch))
        total = NegativeSums.zeros(batch.embeddings)
        if not bounds:
            return total
        kept = _acquire_weights(batch) if keep else None
        parts = [bounds[len(bounds) * k // CPU_PARTS : len(bounds) * (k + 1) // CPU_PARTS] for k in range(CPU_PARTS)]
        for part in run_parallel(lambda part: _sum_part(centers, batch, part, kept), [part for part in parts if part]):
            total.sums += part.sums
            total.weighted_centers += part.weighted_centers
            total.conflicts += part.conflicts
        total.kept = kept
        return total

    def tile_gradient(self, gradient: CenterGradient, centers: Tensor, first: int, last: int) -> Tensor:
        batch, kept = gradient.batch, gradient.kept
        arrays = _tile_arrays(batch, last - first)
        if kept is not None and last <= len(kept.values):
            weights = kept.values[first:last]
        else:
            weights = arrays.weights
            _compute_weights(centers, batch, first, last, arrays, weights, None)
        operand = gradient.scaled_embeddings.to(batch.operand_dtype)
        result = arrays.unit
        if batch.operand_dtype == torch.float32:
            torch.mm(weights, operand, out=result)
        else:
            torch.mm(weights, operand, out=arrays.rounded)
            result.copy_(arrays.rounded)
        cpu_kernels.finish_gradient(
            centers.detach().numpy(),
            batch.classes[first:last].numpy(),
            result.numpy(),
            gradient.target_rows.numpy(),
            gradient.target_gradient.numpy(),
        )
        return result


def _acquire_weights(batch: ShardBatch) -> ScratchView | None:
    """Memory for the weights of as many classes as the scratch budget holds, (n, G) in the operands' dtype."""
    samples, dtype = len(batch.embeddings), batch.operand_dtype
    classes = min(len(batch.classes), cpu_kept_classes(samples, dtype.itemsize, batch.config.scratch_bytes))
    return batch.scratch.acquire((classes, samples), dtype, batch.embeddings.device)


def _sum_part(
    centers: Tensor, batch: ShardBatch, bounds: list[tuple[int, int]], kept: ScratchView | None
) -> NegativeSums:
    """The first pass over some tiles, in this thread."""
    result = NegativeSums.zeros(batch.embeddings)
    rounds = batch.operand_dtype != torch.float32
    product = torch.empty_like(batch.embeddings, dtype=batch.operand_dtype) if rounds else None
    for first, last in bounds:
        arrays = _tile_arrays(batch, last - first)
        keeps = kept is not None and last <= len(kept.values)
        weights = kept.values[first:last] if keeps else arrays.weights  # type: ignore[union-attr]
        _compute_weights(centers, batch, first, last, arrays, weights, result)
        if product is None:
            result.weighted_centers.addmm_(weights.T, arrays.unit)
        else:
            result.weighted_centers += torch.mm(weights.T, arrays.rounded, out=product)
    return result


def _compute_weights(
    centers: Tensor,
    batch: ShardBatch,
    first: int,
    last: int,
    arrays: _TileArrays,
    weights: Tensor,
    result: NegativeSums | None,
) -> None:
    """Fill weights (n, G) of the classes [first, last) and their unit centers in `arrays`; add the sums to `result`.

    The cosines are float32 products whatever the operand dtype: here these cost little more, and the exponential
    multiplies their error by the scale.
    """
    config = batch.config
    raw, rows = centers.detach().numpy(), batch.classes[first:last].numpy()
    threshold = NO_THRESHOLD if config.conflict_threshold is None else config.conflict_threshold
    constants = np.float32(config.scale), np.float32(config.shift), np.float32(threshold)
    sums, left_out = arrays.sums.zero_(), arrays.left_out.zero_()
    cosine, rounded_unit, rounded = weights, None, None
    if batch.operand_dtype != torch.float32:
        cosine, rounded_unit, rounded = arrays.cosine, _bits(arrays.rounded), _bits(weights)
    cpu_kernels.gather_unit_rows(raw, rows, arrays.unit.numpy(), rounded_unit)
    torch.mm(arrays.unit, batch.embeddings.T, out=cosine)
    cpu_kernels.mark_own_classes(cosine.numpy(), batch.target_positions.numpy(), first)
    limits, t = (None, np.float32(0)) if batch.hard_negatives is None else batch.hard_negatives
    hard = None if limits is None else limits.numpy(), np.float32(t)
    cpu_kernels.exponentials(cosine.numpy(), *constants, *hard, sums.numpy(), left_out.numpy(), rounded)
    if result is not None:
        result.sums += sums
        result.conflicts += left_out.sum()
        if config.conflict_as_zero_logit:
            result.sums += left_out * math.exp(-config.shift)


def _bits(values: Tensor) -> np.ndarray:
    """The bits of a bfloat16 tensor as uint16, since numpy has no bfloat16."""
    return values.view(torch.uint16).numpy()


class _TileArrays:
    """A thread's working memory for a tile of n classes.

    Attributes:
        unit: (n, D) float32, unit centers, then their gradient; rounded: (n, D) operand dtype, the same.
        cosine: (n, G) float32; weights: (n, G) operand dtype.
        sums: (G,) float32; left_out: (G,) int32.
    """

    def __init__(self, memory: dict[str, Tensor], classes: int) -> None:
        self.unit, self.rounded = memory["unit"][:classes], memory["rounded"][:classes]
        self.cosine, self.weights = memory["cosine"][:classes], memory["weights"][:classes]
        self.sums, self.left_out = memory["sums"], memory["left_out"]


_local = threading.local()


def _tile_arrays(batch: ShardBatch, classes: int) -> _TileArrays:
    """This thread's arrays for a tile of `classes` classes: the same memory in every tile and step."""
    samples, width = batch.embeddings.shape
    form = samples, width, batch.operand_dtype
    if getattr(_local, "form", None) != form or len(_local.memory["unit"]) < classes:
        _local.form = form
        _local.memory = {
            "unit": torch.empty(classes, width),
            "rounded": torch.empty(classes, width, dtype=batch.operand_dtype),
            "cosine": torch.empty(classes, samples),
            "weights": torch.empty(classes, samples, dtype=batch.operand_dtype),
            "sums": torch.empty(samples),
            "left_out": torch.empty(samples, dtype=torch.int32),
        }
    return _TileArrays(_local.memory, classes)
