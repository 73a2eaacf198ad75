"""The two passes on a GPU, tile by tile: matrix products by cuBLAS, what stands between them by Triton's kernels.

A tile's weights, exp of the cosines, are written by the kernel that multiplies embeddings and unit centers, and are
small enough to stay in the cache until the next product has read them: nothing of the size samples × sampled classes is
stored. Every shape follows from the batch's size and the bound on the sampled classes, and what only the device knows
(how many classes, whether a batch was bad) stays there: a step can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
import triton
from torch import Tensor

from partialfc.head.backends.gpu_kernels import finish_kernel, unit_kernel, weights_kernel
from partialfc.head.backends.tile_sizes import gpu_tile_classes
from partialfc.head.loss import CenterGradient, NegativeSums, SGDRule, ShardBatch, tile_bounds

T = TypeVar("T")
_NO_THRESHOLD = 2.0  # no cosine is above it
_ELEMENTS = 4096  # of the rows that one program of the memory-bound kernels takes
# Samples, classes and columns of a block of the product, warps, and stages of the pipeline, the best first: the first
# whose operands fit a block's shared memory is taken (docs/decisions.md has what the compiler says of them).
_BLOCKS = ((128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (64, 64, 64, 4, 2))


class GPUBackend:
    """`Path` for centers of float32 or bfloat16, one a class, and margins that leave negatives as they are."""

    uses_thread_pool: ClassVar[bool] = False
    supports_padding: ClassVar[bool] = True

    def tile_classes(self, batch: ShardBatch) -> int:
        return gpu_tile_classes(*batch.embeddings.shape, batch.operand_dtype.itemsize, batch.scratch_bytes)

    def spread(self, work: Callable[[T], None], items: Iterable[T]) -> None:
        for item in items:
            work(item)

    def sum_negatives(self, centers: Tensor, batch: ShardBatch, *, keep: bool) -> NegativeSums:
        result = NegativeSums.zeros(batch.embeddings)
        if not len(batch.classes):
            return result
        tile = _Tile.of(self.tile_classes(batch), centers, batch)
        for first, last in tile_bounds(self, batch):
            tile.gather(first, last)
            tile.compute_weights(first, last)
            _add_product(result.pull, tile.weights, tile.unit)
        totals = tile.totals.sum(dim=1, dtype=torch.float64)
        result.sums = totals[0]
        if batch.conflict_threshold is not None:
            result.conflicts = totals[1].sum()
        return result

    def tile_gradient(self, gradient: CenterGradient, centers: Tensor, first: int, last: int) -> Tensor:
        tile = _Tile.of(last - first, centers, gradient.batch)
        scaled, slots = _scaled_operand(gradient), _slots(gradient)
        return tile.gradient(gradient, scaled, slots, (first, last), None, None)[: last - first]

    def update(self, gradient: CenterGradient, centers: Tensor, momentum_buffer: Tensor, rule: SGDRule) -> bool:
        batch = gradient.batch
        if not len(batch.classes):
            return True
        tile = _Tile.of(self.tile_classes(batch), centers, batch)
        scaled, slots = _scaled_operand(gradient), _slots(gradient)
        rule = rule if rule.skip is not None else replace(rule, skip=torch.zeros_like(tile.count))
        for bounds in tile_bounds(self, batch):
            tile.gradient(gradient, scaled, slots, bounds, momentum_buffer, rule)
        return True


@dataclass(frozen=True)
class _Tile:
    """The arrays of a tile of N classes, the same for all tiles of a pass.

    Attributes:
        operand: (G, D) operand dtype, unit embeddings.
        count: () on the device, the classes of the batch that are no padding.
        unit: (N, D) operand dtype, unit centers, and inverse: (N,) float32, 1 over their norms.
        weights: (G, N) operand dtype.
        totals: (1, n, G) float32, parts of Z, and of the conflicts in a second row where there is a threshold.
        blocks: compile-time arguments of the kernel of the weights.
    """

    centers: Tensor
    batch: ShardBatch
    operand: Tensor
    count: Tensor
    unit: Tensor
    inverse: Tensor
    weights: Tensor
    totals: Tensor
    blocks: dict[str, Any]

    @staticmethod
    def of(classes: int, centers: Tensor, batch: ShardBatch) -> _Tile:
        samples, width = batch.embeddings.shape
        size = min(classes, len(batch.classes))
        size += -size % 16  # rows of the weights then begin where 16 bytes do
        dtype, device = batch.operand_dtype, batch.embeddings.device
        has_threshold = batch.conflict_threshold is not None
        # Products of float32 are cuBLAS's: Triton's take longer.
        blocks = _product_blocks(device, samples, dtype != torch.float32, has_threshold)
        return _Tile(
            centers=centers.detach(),
            batch=batch,
            operand=batch.embeddings.to(dtype),
            count=torch.full((), len(batch.classes), device=device) if batch.count is None else batch.count,
            unit=torch.empty(size, width, dtype=dtype, device=device),
            inverse=torch.empty(size, dtype=torch.float32, device=device),
            weights=torch.empty(samples, size, dtype=dtype, device=device),
            totals=torch.zeros(1 + has_threshold, triton.cdiv(size, blocks["BN"]), samples, device=device),
            blocks=blocks,
        )

    def gather(self, first: int, last: int) -> None:
        """The unit centers of `classes[first:last]`."""
        size, width = self.unit.shape
        rows = _row_blocks(width)
        unit_kernel[(triton.cdiv(size, rows["BN"]),)](
            self.centers, self.batch.classes, self.unit, self.inverse, self.count, first, last, size, width, **rows
        )

    def compute_weights(self, first: int, last: int, *, sums: bool = True) -> None:
        """Fill `weights` from `unit`, and add their sums to `totals`."""
        batch, (samples, size) = self.batch, self.weights.shape
        product = batch.operand_dtype != torch.float32
        if not product:
            torch.mm(self.operand, self.unit.T, out=self.weights)
        grid = triton.cdiv(samples, self.blocks["BG"]) * triton.cdiv(size, self.blocks["BN"])
        weights_kernel[(grid,)](
            self.operand, self.unit, batch.target_places, self.weights, self.totals[0], self.totals[-1], self.count,
            first, last, samples, size, batch.scale, batch.shift,
            _NO_THRESHOLD if batch.conflict_threshold is None else batch.conflict_threshold,
            math.exp(-batch.shift) if batch.conflict_as_zero_logit else 0.0,
            D=self.unit.shape[1], PRODUCT=product, UPCAST=batch.embeddings.device.type == "cpu", SUMS=sums,
            CONFLICTS=batch.conflict_threshold is not None, **self.blocks,
        )  # fmt: skip

    def gradient(
        self,
        gradient: CenterGradient,
        scaled: Tensor,
        slots: Tensor,
        bounds: tuple[int, int],
        momentum_buffer: Tensor | None,
        rule: SGDRule | None,
    ) -> Tensor:
        """(N, D) float32: the gradient of `classes[first:last]`, or with a rule the update of their rows."""
        first, last = bounds
        self.gather(first, last)
        self.compute_weights(first, last, sums=False)
        product = _product(self.weights.T, scaled)
        rows, width = _row_blocks(self.unit.shape[1]), self.unit.shape[1]
        nothing = self.count  # stands for a pointer that is not followed
        finish_kernel[(triton.cdiv(len(self.unit), rows["BN"]),)](
            self.centers, self.batch.classes, self.inverse, product, slots, gradient.target_gradient,
            product if momentum_buffer is None else momentum_buffer, nothing if rule is None else rule.keys,
            nothing if rule is None else rule.skip, self.count, 0.0 if rule is None else rule.lr, first, last, width,
            *((0.0, 0.0, 0) if rule is None else (rule.momentum, rule.weight_decay, rule.first_row)),
            UPDATE=rule is not None, RATE_ON_DEVICE=rule is not None and isinstance(rule.lr, Tensor), **rows,
        )  # fmt: skip
        return product


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed in float32."""
    if left.dtype == torch.float32 or total.device.type == "cpu":
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, float32 and summed in it."""
    if left.dtype == torch.float32 or left.device.type == "cpu":
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)


def _scaled_operand(gradient: CenterGradient) -> Tensor:
    return gradient.scaled_embeddings.to(gradient.batch.operand_dtype)


def _slots(gradient: CenterGradient) -> Tensor:
    """(S + 1,) int32: where each class's part of `target_gradient` stands, −1 for none; the last is a dump."""
    classes, rows = gradient.batch.classes, gradient.target_rows
    slots = torch.full((len(classes) + 1,), -1, dtype=torch.int32, device=classes.device)
    places = torch.searchsorted(classes, rows)
    found = classes[places.clamp_max(len(classes) - 1)] == rows
    numbers = torch.arange(len(rows), dtype=torch.int32, device=classes.device)
    return slots.scatter_(0, torch.where(found, places, len(classes)), numbers)


def _row_blocks(width: int) -> dict[str, Any]:
    """The compile-time arguments of the kernels that go over rows."""
    columns = triton.next_power_of_2(width)
    return {"BN": max(1, _ELEMENTS // columns), "BD": columns, "num_warps": 8}


def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have; the interpreter has no limit."""
    if device.type != "cuda":
        return 1 << 40
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def _product_blocks(device: torch.device, samples: int, product: bool, conflicts: bool) -> dict[str, Any]:
    """The compile-time arguments of the kernel of the weights; a product wants at least 16 of each."""
    fewest = max(16, triton.next_power_of_2(samples))
    if not product:
        return {"BG": min(16, fewest), "BN": 256, "BK": 64, "num_warps": 8, "num_stages": 1}
    available = _shared_memory(device)
    candidates = _BLOCKS[conflicts:]  # counting them leaves the largest no registers
    fitting = [sizes for sizes in candidates if 2 * sizes[4] * (sizes[0] + sizes[1]) * sizes[2] <= available]
    bg, bn, bk, warps, stages = (fitting or candidates[-1:])[0]
    return {"BG": min(bg, fewest), "BN": bn, "BK": bk, "num_warps": warps, "num_stages": stages}
