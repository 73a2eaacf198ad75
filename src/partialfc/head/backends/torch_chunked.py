"""The two passes in plain PyTorch, tile by tile: any device, any margin; the reference for the faster backends."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from partialfc.head.backends.base import CenterGradient, NegativeSums, ShardBatch, tile_bounds
from partialfc.head.backends.tile_sizes import CHUNKED_CPU_SCRATCH_BYTES, chunked_tile_classes
from partialfc.head.loss import normalise_centers


@dataclass(frozen=True)
class Tile:
    """The contribution of one tile.

    Attributes:
        unit_centers: (s × K, D) and center_norms: (s × K,), of the tile's rows.
        weights: (G, s × K), exp(s c − shift) times the derivative of a raised negative; 0 where left out.
        sums: (G,), this tile's part of Z exp(−shift).
        conflicts: (), the number of negatives above the conflict threshold.
    """

    unit_centers: Tensor
    center_norms: Tensor
    weights: Tensor
    sums: Tensor
    conflicts: Tensor


def compute_tile(centers: Tensor, batch: ShardBatch, first: int, last: int) -> Tile:
    """The tile of `batch.classes[first:last]`, from centers (L × K, D) that are not normalised."""
    config, margin = batch.config, batch.config.margin
    unit_centers, norms = normalise_centers(centers[batch.rows(first, last)].to(batch.embeddings.dtype))
    cosine = _product(batch.embeddings, unit_centers.T, batch) if centers.is_cuda else batch.embeddings @ unit_centers.T
    nearest: Tensor | None = None
    if margin.sub_centers > 1:
        cosine, nearest = cosine.view(len(cosine), last - first, -1).max(dim=2)
    left_out = torch.zeros_like(cosine, dtype=torch.bool)
    if config.conflict_threshold is not None:
        left_out = cosine > config.conflict_threshold
    samples = ((batch.target_positions >= first) & (batch.target_positions < last)).nonzero()[:, 0]
    targets = samples, batch.target_positions[samples] - first
    left_out[targets] = False
    conflicts = left_out.sum()
    logits, slope = cosine, None
    if batch.hard_negatives is not None:
        limits, t = batch.hard_negatives
        is_hard = cosine > limits[:, None]
        logits, slope = torch.where(is_hard, cosine * (t + cosine), cosine), torch.where(is_hard, t + 2 * cosine, 1.0)
    exponentials = logits.mul(config.scale).sub_(config.shift).exp_()
    weights = exponentials.masked_fill(left_out, 0.0)
    weights[targets] = 0.0
    sums = weights.sum(dim=1)
    if config.conflict_as_zero_logit:
        sums = sums + left_out.sum(dim=1) * math.exp(-config.shift)
    if slope is not None:
        weights = weights * slope
    if nearest is not None:
        per_center = weights.new_zeros((*weights.shape, margin.sub_centers))
        weights = per_center.scatter_(2, nearest[..., None], weights[..., None]).flatten(1)
    return Tile(unit_centers, norms, weights, sums, conflicts)


def _scratch_bytes(batch: ShardBatch) -> int:
    """The limit on the bytes of tiles in use, and again of those kept."""
    limit = batch.config.scratch_bytes
    return min(limit, CHUNKED_CPU_SCRATCH_BYTES) if batch.embeddings.device.type == "cpu" else limit


class ChunkedBackend:
    """`Backend` in plain PyTorch."""

    supports_padding: ClassVar[bool] = False
    uses_thread_pool: ClassVar[bool] = False

    def tile_classes(self, batch: ShardBatch) -> int:
        samples, width = batch.embeddings.shape
        class_bytes = batch.config.margin.sub_centers * batch.embeddings.element_size()
        return chunked_tile_classes(samples, width, class_bytes, _scratch_bytes(batch))

    def sum_negatives(self, centers: Tensor, batch: ShardBatch, *, keep: bool) -> NegativeSums:
        result = NegativeSums.zeros(batch.embeddings)
        kept: dict[int, Tile] = {}
        budget = _scratch_bytes(batch) if keep else 0
        for first, last in tile_bounds(self, batch):
            tile = compute_tile(centers, batch, first, last)
            result.sums += tile.sums
            result.weighted_centers += _product(tile.weights, tile.unit_centers, batch)
            result.conflicts += tile.conflicts
            tile_bytes = (tile.weights.numel() + tile.unit_centers.numel()) * tile.weights.element_size()
            if tile_bytes <= budget:
                budget -= tile_bytes
                kept[first] = tile
        result.kept = kept
        return result

    def tile_gradient(self, gradient: CenterGradient, centers: Tensor, first: int, last: int) -> Tensor:
        batch = gradient.batch
        tile = (gradient.kept or {}).get(first)
        if tile is None or len(tile.center_norms) != (last - first) * batch.config.margin.sub_centers:
            tile = compute_tile(centers, batch, first, last)
        result = _product(tile.weights.T, gradient.scaled_embeddings, batch)
        result -= (result * tile.unit_centers).sum(dim=1, keepdim=True) * tile.unit_centers
        result /= tile.center_norms[:, None]
        rows = batch.rows(first, last)
        begin, end = torch.searchsorted(gradient.target_rows, torch.stack([rows[0], rows[-1] + 1])).tolist()
        positions = torch.searchsorted(rows, gradient.target_rows[begin:end])
        return result.index_add_(0, positions, gradient.target_gradient[begin:end])


def _product(left: Tensor, right: Tensor, batch: ShardBatch) -> Tensor:
    """left @ right in the compute dtype, with operands rounded to the batch's operand dtype."""
    if batch.operand_dtype == left.dtype:
        return left @ right
    left, right = left.to(batch.operand_dtype), right.to(batch.operand_dtype)
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=batch.embeddings.dtype)
    return (left @ right).to(batch.embeddings.dtype)
