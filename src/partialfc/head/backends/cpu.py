"""The two passes on a CPU: matrix products by PyTorch, the row loops between them by numba, tiles spread over threads.

A tile's arrays fit a core's cache, and each thread takes whole tiles with all their stages, so that no stage waits for
another thread and no array of samples × classes goes through memory but the weights kept for the second pass. The work
is split in a fixed number of parts, summed in order: the result does not depend on the number of threads.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from partialfc.head.backends import cpu_kernels
from partialfc.head.backends.threads import run_parallel
from partialfc.head.backends.tile_sizes import CPU_PARTS, cpu_kept_classes, cpu_tile_classes
from partialfc.head.loss import CenterGradient, NegativeSums, ScratchView, SGDRule, ShardBatch, tile_bounds

T = TypeVar("T")
_NO_THRESHOLD = 2.0  # no cosine is above it


class CPUBackend:
    """`Path` for float32 centers of one center a class, and margins that leave negatives as they are."""

    supports_padding: ClassVar[bool] = False
    uses_thread_pool: ClassVar[bool] = True

    def tile_classes(self, batch: ShardBatch) -> int:
        return cpu_tile_classes(*batch.embeddings.shape, batch.scratch_bytes)

    def sum_negatives(self, centers: Tensor, batch: ShardBatch, *, keep: bool) -> NegativeSums:
        bounds = list(tile_bounds(self, batch))
        if not bounds:
            return NegativeSums.zeros(batch.embeddings)
        kept = _lend_weights(batch) if keep else None
        parts = [bounds[len(bounds) * k // CPU_PARTS : len(bounds) * (k + 1) // CPU_PARTS] for k in range(CPU_PARTS)]
        results = run_parallel(lambda part: _sum_part(centers, batch, part, kept), [part for part in parts if part])
        total = NegativeSums.zeros(batch.embeddings)
        for result in results:
            total.sums += result.sums
            total.pull += result.pull
            total.conflicts += result.conflicts
        total.kept = kept
        return total

    def update(self, gradient: CenterGradient, centers: Tensor, momentum_buffer: Tensor, rule: SGDRule) -> bool:
        return False

    def spread(self, work: Callable[[T], None], items: Iterable[T]) -> None:
        run_parallel(work, items)

    def tile_gradient(self, gradient: CenterGradient, centers: Tensor, first: int, last: int) -> Tensor:
        batch, kept = gradient.batch, gradient.kept
        rows = batch.classes[first:last]
        arrays = _arrays(batch, last - first)
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
            rows.numpy(),
            result.numpy(),
            gradient.target_rows.numpy(),
            gradient.target_gradient.numpy(),
        )
        return result


def _lend_weights(batch: ShardBatch) -> ScratchView | None:
    """Room for the weights of as many classes as the scratch budget holds, (n, G) in the operands' dtype."""
    samples = len(batch.embeddings)
    kept = cpu_kept_classes(samples, batch.operand_dtype.itemsize, batch.scratch_bytes)
    count = min(len(batch.classes), kept)
    return batch.scratch.acquire((count, samples), batch.operand_dtype, batch.embeddings.device)


def _sum_part(
    centers: Tensor, batch: ShardBatch, bounds: list[tuple[int, int]], kept: ScratchView | None
) -> NegativeSums:
    """The first pass over some tiles, in this thread."""
    result = NegativeSums.zeros(batch.embeddings)
    rounds = batch.operand_dtype != torch.float32
    pulled = torch.empty_like(batch.embeddings, dtype=batch.operand_dtype) if rounds else None
    for first, last in bounds:
        arrays = _arrays(batch, last - first)
        keeps = kept is not None and last <= len(kept.values)
        weights = kept.values[first:last] if keeps else arrays.weights  # type: ignore[union-attr]
        _compute_weights(centers, batch, first, last, arrays, weights, result)
        if pulled is None:
            result.pull.addmm_(weights.T, arrays.unit)
        else:
            result.pull += torch.mm(weights.T, arrays.rounded, out=pulled)
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
    """weights (n, G) of the classes [first, last), their unit centers in `arrays`, and their sums into `result`.

    The cosines are products of float32 whatever the operands' dtype: here they cost little more, and scale × their
    error is what the exponential sees.
    """
    raw, rows = centers.detach().numpy(), batch.classes[first:last].numpy()
    if batch.operand_dtype == torch.float32:
        cpu_kernels.gather_unit_rows(raw, rows, arrays.unit.numpy())
        cosine = weights
    else:
        cpu_kernels.gather_unit_rows_twice(raw, rows, arrays.unit.numpy(), _bits(arrays.rounded))
        cosine = arrays.cosine
    torch.mm(arrays.unit, batch.embeddings.T, out=cosine)
    cpu_kernels.mark_own_classes(cosine.numpy(), batch.target_places.numpy(), first)
    threshold = _NO_THRESHOLD if batch.conflict_threshold is None else batch.conflict_threshold
    numbers = np.float32(batch.scale), np.float32(batch.shift), np.float32(threshold)
    sums, left_out = arrays.sums.zero_(), arrays.left_out.zero_()
    if batch.operand_dtype == torch.float32:
        cpu_kernels.exponentials(cosine.numpy(), *numbers, sums.numpy(), left_out.numpy())
    else:
        cpu_kernels.exponentials_rounded(cosine.numpy(), *numbers, sums.numpy(), left_out.numpy(), _bits(weights))
    if result is not None:
        result.sums += sums
        result.conflicts += left_out.sum()
        if batch.conflict_as_zero_logit:
            result.sums += left_out * math.exp(-batch.shift)


def _bits(values: Tensor) -> np.ndarray:
    """A bfloat16 tensor as numpy sees it: uint16 of the same bits."""
    return values.view(torch.uint16).numpy()


@dataclass(frozen=True)
class _TileArrays:
    """What a thread computes a tile of n classes in.

    Attributes:
        unit: (n, D) float32, unit centers, then their gradient; rounded: (n, D) operand dtype, the same.
        cosine: (n, G) float32; weights: (n, G) operand dtype.
        sums: (G,) float32; left_out: (G,) int32.
    """

    unit: Tensor
    rounded: Tensor
    cosine: Tensor
    weights: Tensor
    sums: Tensor
    left_out: Tensor


_local = threading.local()


def _arrays(batch: ShardBatch, classes: int) -> _TileArrays:
    """This thread's arrays for a tile of `classes` classes: the same memory from tile to tile and step to step."""
    samples, width = batch.embeddings.shape
    form = samples, width, batch.operand_dtype
    if getattr(_local, "form", None) != form or len(_local.arrays.unit) < classes:
        _local.form = form
        _local.arrays = _TileArrays(
            unit=torch.empty(classes, width),
            rounded=torch.empty(classes, width, dtype=batch.operand_dtype),
            cosine=torch.empty(classes, samples),
            weights=torch.empty(classes, samples, dtype=batch.operand_dtype),
            sums=torch.empty(samples),
            left_out=torch.empty(samples, dtype=torch.int32),
        )
    whole: _TileArrays = _local.arrays
    return replace(
        whole,
        unit=whole.unit[:classes],
        rounded=whole.rounded[:classes],
        cosine=whole.cosine[:classes],
        weights=whole.weights[:classes],
    )
