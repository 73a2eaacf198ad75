"""The two passes in plain PyTorch, tile by tile: any device, any margin; what the faster paths are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from partialfc.head.backends.tile_sizes import CHUNKED_CPU_SCRATCH_BYTES, chunked_tile_classes
from partialfc.head.loss import CenterGradient, NegativeSums, SGDRule, ShardBatch, tile_bounds
from partialfc.head.targets import normalise_rows

T = TypeVar("T")


@dataclass(frozen=True)
class Tile:
    """What one tile contributes.

    Attributes:
        unit_centers: (s × K, D) and center_norms: (s × K,), of the tile's rows.
        weights: (G, s × K), exp(s c − shift) times the derivative of a re-weighted negative; 0 where left out.
        sums: (G,), this tile's part of Z exp(−shift).
        conflicts: (), negatives above the conflict threshold.
    """

    unit_centers: Tensor
    center_norms: Tensor
    weights: Tensor
    sums: Tensor
    conflicts: Tensor


def compute_tile(centers: Tensor, batch: ShardBatch, first: int, last: int) -> Tile:
    """The tile of `batch.classes[first:last]`, from raw centers (L × K, D)."""
    unit_centers, norms = normalise_rows(centers[batch.rows(first, last)].to(batch.embeddings.dtype))
    cosine = _product(batch.embeddings, unit_centers.T, batch) if centers.is_cuda else batch.embeddings @ unit_centers.T
    nearest: Tensor | None = None
    if batch.margin.sub_centers > 1:
        cosine, nearest = cosine.view(len(cosine), last - first, -1).max(dim=2)
    left_out = torch.zeros_like(cosine, dtype=torch.bool)
    if batch.conflict_threshold is not None:
        left_out = cosine > batch.conflict_threshold
    own = ((batch.target_places >= first) & (batch.target_places < last)).nonzero()[:, 0]
    left_out[own, batch.target_places[own] - first] = False
    conflicts = left_out.sum()
    slope: Tensor | None = None
    logits = cosine
    if batch.margin.reweights_negatives:
        logits, slope = _reweighted(cosine, batch)
    exponentials = logits.mul(batch.scale).sub_(batch.shift).exp_()
    weights = exponentials.masked_fill(left_out, 0.0)
    weights[own, batch.target_places[own] - first] = 0.0
    sums = weights.sum(dim=1)
    if batch.conflict_as_zero_logit:
        sums = sums + left_out.sum(dim=1) * math.exp(-batch.shift)
    if slope is not None:
        weights = weights * slope
    if nearest is not None:
        spread = weights.new_zeros((*weights.shape, batch.margin.sub_centers))
        weights = spread.scatter_(2, nearest[..., None], weights[..., None]).flatten(1)
    return Tile(unit_centers, norms, weights, sums, conflicts)


def _reweighted(cosine: Tensor, batch: ShardBatch) -> tuple[Tensor, Tensor]:
    """The margin's logits of a tile of negatives and their elementwise derivative with respect to the cosine."""
    with torch.enable_grad():
        variable = cosine.detach().requires_grad_()
        target_cosine = batch.target_cosine[:, None].to(cosine.dtype)
        logits = batch.margin.negatives(variable, target_cosine, batch.margin_batch)
        (slope,) = torch.autograd.grad(logits.sum(), variable)
    return logits.detach(), slope


def _scratch_bytes(batch: ShardBatch) -> int:
    """The bytes that tiles at work may take, and kept ones again."""
    return (
        min(batch.scratch_bytes, CHUNKED_CPU_SCRATCH_BYTES)
        if batch.embeddings.device.type == "cpu"
        else batch.scratch_bytes
    )


class ChunkedBackend:
    """`Path` in plain PyTorch."""

    supports_padding: ClassVar[bool] = False
    uses_thread_pool: ClassVar[bool] = False

    def tile_classes(self, batch: ShardBatch) -> int:
        class_bytes = batch.margin.sub_centers * batch.embeddings.element_size()
        return chunked_tile_classes(*batch.embeddings.shape, class_bytes, _scratch_bytes(batch))

    def sum_negatives(self, centers: Tensor, batch: ShardBatch, *, keep: bool) -> NegativeSums:
        result = NegativeSums.zeros(batch.embeddings)
        kept: dict[int, Tile] = {}
        budget = _scratch_bytes(batch) if keep else 0
        for first, last in tile_bounds(self, batch):
            tile = compute_tile(centers, batch, first, last)
            result.sums += tile.sums
            result.pull += _product(tile.weights, tile.unit_centers, batch)
            result.conflicts += tile.conflicts
            bytes_kept = (tile.weights.numel() + tile.unit_centers.numel()) * tile.weights.element_size()
            if bytes_kept <= budget:
                budget -= bytes_kept
                kept[first] = tile
        result.kept = kept
        return result

    def update(self, gradient: CenterGradient, centers: Tensor, momentum_buffer: Tensor, rule: SGDRule) -> bool:
        return False

    def spread(self, work: Callable[[T], None], items: Iterable[T]) -> None:
        for item in items:
            work(item)

    def tile_gradient(self, gradient: CenterGradient, centers: Tensor, first: int, last: int) -> Tensor:
        batch = gradient.batch
        tile = (gradient.kept or {}).get(first)
        if tile is None or len(tile.center_norms) != (last - first) * batch.margin.sub_centers:
            tile = compute_tile(centers, batch, first, last)
        result = _product(tile.weights.T, gradient.scaled_embeddings, batch)
        result -= (result * tile.unit_centers).sum(dim=1, keepdim=True) * tile.unit_centers
        result /= tile.center_norms[:, None]
        rows = batch.rows(first, last)
        begin, end = torch.searchsorted(gradient.target_rows, torch.stack([rows[0], rows[-1] + 1])).tolist()
        places = torch.searchsorted(rows, gradient.target_rows[begin:end])
        return result.index_add_(0, places, gradient.target_gradient[begin:end])


def _product(left: Tensor, right: Tensor, batch: ShardBatch) -> Tensor:
    """left @ right in the compute dtype, the operands rounded to the batch's operand dtype."""
    if batch.operand_dtype == left.dtype:
        return left @ right
    left, right = left.to(batch.operand_dtype), right.to(batch.operand_dtype)
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=batch.embeddings.dtype)
    return (left @ right).to(batch.embeddings.dtype)
