"""The two passes on a GPU, tile by tile: matrix products by cuBLAS, the work between them by Triton's kernels.

The kernel that multiplies embeddings and unit centers writes the weights of a tile, which are small enough to stay in
the cache until the next product has read them: no array of samples × sampled classes is stored. Every shape follows
from the batch size and the bound on the sampled classes; values that only the device knows (the number of classes,
whether a batch was bad) stay there. So a step can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
import triton
from torch import Tensor

from partialfc.head.backends.base import CenterGradient, NegativeSums, SGDRule, ShardBatch, tile_bounds
from partialfc.head.backends.gpu_kernels import finish_kernel, unit_kernel, weights_kernel
from partialfc.head.backends.tile_sizes import gpu_tile_classes
from partialfc.head.loss import NO_THRESHOLD

ROW_ELEMENTS = 4096  # elements of rows in one program of the memory-bound kernels
# Samples, classes and columns of a block of the product, warps, and stages of the pipeline, the best first: the first
# whose operands fit in a block's shared memory is taken (docs/decisions.md has the compiler's figures for each).
PRODUCT_BLOCKS = ((128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (64, 64, 64, 4, 2))


class GPUBackend:
    """`Backend` for float32 or bfloat16 centers, one per class, and margins that leave negatives unchanged."""

    uses_thread_pool: ClassVar[bool] = False
    supports_padding: ClassVar[bool] = True

    def tile_classes(self, batch: ShardBatch) -> int:
        samples, width = batch.embeddings.shape
        return gpu_tile_classes(samples, width, batch.operand_dtype.itemsize, batch.config.scratch_bytes)

    def sum_negatives(self, centers: Tensor, batch: ShardBatch, *, keep: bool) -> NegativeSums:
        result = NegativeSums.zeros(batch.embeddings)
        if not len(batch.classes):
            return result
        tile = _Tile(self.tile_classes(batch), centers, batch)
        for first, last in tile_bounds(self, batch):
            tile.gather(first, last)
            tile.compute_weights(first, last)
            _add_product(result.weighted_centers, tile.weights, tile.unit)
        totals = tile.totals.sum(dim=1, dtype=torch.float64)
        result.sums = totals[0]
        if batch.config.conflict_threshold is not None:
            result.conflicts = totals[1].sum()
        return result

    def tile_gradient(self, gradient: CenterGradient, centers: Tensor, first: int, last: int) -> Tensor:
        tile = _Tile(last - first, centers, gradient.batch)
        operand, slots = _scaled_operand(gradient), _target_slots(gradient)
        return tile.gradient(gradient, operand, slots, (first, last), None, None)[: last - first]

    def fused_update(
        self, gradient: CenterGradient, centers: Tensor, momentum_buffer: Tensor | None, rule: SGDRule
    ) -> None:
        """The second pass and the step of SGD in one: no gradient is stored, and nothing is read back."""
        batch = gradient.batch
        if not len(batch.classes):
            return
        tile = _Tile(self.tile_classes(batch), centers, batch)
        operand, slots = _scaled_operand(gradient), _target_slots(gradient)
        rule = rule if rule.skip is not None else replace(rule, skip=torch.zeros_like(tile.count))
        for bounds in tile_bounds(self, batch):
            tile.gradient(gradient, operand, slots, bounds, momentum_buffer, rule)


class _Tile:
    """The arrays of a tile of N classes, reused by all tiles of a pass.

    Attributes:
        operand: (G, D) operand dtype, unit embeddings.
        count: () on the device, the number of the batch's classes without padding.
        unit: (N, D) operand dtype, unit centers, and inverse: (N,) float32, 1 over their norms.
        weights: (G, N) operand dtype.
        totals: (1, n, G) float32, partial sums of Z; (2, n, G) with those of the conflicts where there is a threshold.
        blocks: compile-time arguments of `weights_kernel`.
    """

    def __init__(self, classes: int, centers: Tensor, batch: ShardBatch) -> None:
        samples, width = batch.embeddings.shape
        size = min(classes, len(batch.classes))
        size += -size % 16  # aligns rows of the weights to 16 bytes
        dtype, device = batch.operand_dtype, batch.embeddings.device
        has_threshold = batch.config.conflict_threshold is not None
        self.centers, self.batch = centers.detach(), batch
        self.operand = batch.embeddings.to(dtype)
        self.count = torch.full((), len(batch.classes), device=device) if batch.count is None else batch.count
        self.unit = torch.empty(size, width, dtype=dtype, device=device)
        self.inverse = torch.empty(size, dtype=torch.float32, device=device)
        self.weights = torch.empty(samples, size, dtype=dtype, device=device)
        # cuBLAS computes float32 products: Triton's take longer.
        self.blocks = _product_blocks(device, samples, dtype != torch.float32, has_threshold)
        self.totals = torch.zeros(1 + has_threshold, triton.cdiv(size, self.blocks["BN"]), samples, device=device)

    def gather(self, first: int, last: int) -> None:
        """The unit centers of `classes[first:last]`."""
        size, width = self.unit.shape
        rows = _row_blocks(width)
        unit_kernel[(triton.cdiv(size, rows["BN"]),)](
            self.centers, self.batch.classes, self.unit, self.inverse, self.count, first, last, size, width, **rows
        )

    def compute_weights(self, first: int, last: int, *, sums: bool = True) -> None:
        """Fill `weights` from `unit`, and add their sums to `totals`."""
        batch, config, (samples, size) = self.batch, self.batch.config, self.weights.shape
        product = batch.operand_dtype != torch.float32
        if not product:
            torch.mm(self.operand, self.unit.T, out=self.weights)
        grid = triton.cdiv(samples, self.blocks["BG"]) * triton.cdiv(size, self.blocks["BN"])
        weights_kernel[(grid,)](
            self.operand, self.unit, batch.target_positions, self.weights, self.totals[0], self.totals[-1], self.count,
            first, last, samples, size, config.scale, config.shift,
            NO_THRESHOLD if config.conflict_threshold is None else config.conflict_threshold,
            math.exp(-config.shift) if config.conflict_as_zero_logit else 0.0,
            D=self.unit.shape[1], PRODUCT=product, UPCAST=batch.embeddings.device.type == "cpu", SUMS=sums,
            CONFLICTS=config.conflict_threshold is not None, **self.blocks,
        )  # fmt: skip

    def gradient(
        self,
        gradient: CenterGradient,
        operand: Tensor,
        slots: Tensor,
        bounds: tuple[int, int],
        momentum_buffer: Tensor | None,
        rule: SGDRule | None,
    ) -> Tensor:
        """(N, D) float32, the gradient of the classes in `bounds`; with a rule, their rows are updated instead."""
        first, last = bounds
        self.gather(first, last)
        self.compute_weights(first, last, sums=False)
        product = _product(self.weights.T, operand)
        rows, width = _row_blocks(self.unit.shape[1]), self.unit.shape[1]
        unused = self.count  # stands for a pointer that is not followed
        finish_kernel[(triton.cdiv(len(self.unit), rows["BN"]),)](
            self.centers, self.batch.classes, self.inverse, product, slots, gradient.target_gradient,
            product if momentum_buffer is None else momentum_buffer, unused if rule is None else rule.keys,
            unused if rule is None else rule.skip, self.count, 0.0 if rule is None else rule.lr, first, last, width,
            *((0.0, 0.0, 0) if rule is None else (rule.momentum, rule.weight_decay, rule.first_row)),
            UPDATE=rule is not None, RATE_ON_DEVICE=rule is not None and isinstance(rule.lr, Tensor),
            MOMENTUM=momentum_buffer is not None, **rows,
        )  # fmt: skip
        return product


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed in float32."""
    if left.dtype == torch.float32 or total.device.type == "cpu":
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32, summed in float32."""
    if left.dtype == torch.float32 or left.device.type == "cpu":
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)


def _scaled_operand(gradient: CenterGradient) -> Tensor:
    return gradient.scaled_embeddings.to(gradient.batch.operand_dtype)


def _target_slots(gradient: CenterGradient) -> Tensor:
    """(S + 1,) int32: each class's row of `target_gradient`, −1 for none; the last entry is a dummy."""
    classes, rows = gradient.batch.classes, gradient.target_rows
    slots = torch.full((len(classes) + 1,), -1, dtype=torch.int32, device=classes.device)
    positions = torch.searchsorted(classes, rows)
    is_sampled = classes[positions.clamp_max(len(classes) - 1)] == rows
    numbers = torch.arange(len(rows), dtype=torch.int32, device=classes.device)
    return slots.scatter_(0, torch.where(is_sampled, positions, len(classes)), numbers)


def _row_blocks(width: int) -> dict[str, Any]:
    """Compile-time arguments of `unit_kernel` and `finish_kernel`."""
    columns = triton.next_power_of_2(width)
    return {"BN": max(1, ROW_ELEMENTS // columns), "BD": columns, "num_warps": 8}


def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may use; the interpreter has no limit."""
    if device.type != "cuda":
        return 1 << 40
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def _product_blocks(device: torch.device, samples: int, product: bool, conflicts: bool) -> dict[str, Any]:
    """Compile-time arguments of `weights_kernel`; a product needs at least 16 samples, classes and columns."""
    fewest = max(16, triton.next_power_of_2(samples))
    if not product:
        return {"BG": min(16, fewest), "BN": 256, "BK": 64, "num_warps": 8, "num_stages": 1}
    available = _shared_memory(device)
    candidates = PRODUCT_BLOCKS[conflicts:]  # counting conflicts leaves no registers for the largest
    fitting = [sizes for sizes in candidates if 2 * sizes[4] * (sizes[0] + sizes[1]) * sizes[2] <= available]
    bg, bn, bk, warps, stages = (fitting or candidates[-1:])[0]
    return {"BG": min(bg, fewest), "BN": bn, "BK": bk, "num_warps": warps, "num_stages": stages}
