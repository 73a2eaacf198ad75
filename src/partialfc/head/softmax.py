"""The sampled margin softmax in tiles: pure functions of tensors, for one shard of the classes.

Notation, for one sample i with target y: ê and ŵ are unit vectors, c_ij = ê_i · ŵ_j, s the scale, t_i the target's
logit with its margin, Z_i = Σ_{j ≠ y} exp(s c_ij) over the sampled classes of all shards. The loss is written as

    loss_i = softplus(log Z_i − s t_i),      with gradients      ∂/∂t_i = −s q_i,   ∂/∂c_ij = s q_i exp(s c_ij) / Z_i,

where q_i = sigmoid(log Z_i − s t_i) is the probability of all negatives together. In float32 the usual
logsumexp − target loses most of the gradient once the target's probability is near one; q_i does not, since the target
never enters a sum. Targets are B × D work and done in float64; negatives are done in tiles of classes, in the compute
dtype, and no matrix of samples × classes exists beyond the scratch budget. |c| ≤ 1, so exp needs no running maximum: it
is shifted by a constant, and only where the margin's bound times the scale would leave float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from partialfc.head.margins import Margin, MarginBatch

_LARGEST_EXPONENT = 85.0  # exp(88.7) is the largest float32; a sum over the batch's tile stays below it
_TINY = 1e-12
_CPU_SCRATCH = 32 << 20  # fresh pages cost a CPU more than computing a tile again (docs/performance.md)


def normalise_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows (…, D) and their former lengths (…); a row of zeros stays zero."""
    norms = torch.linalg.vector_norm(rows, dim=-1).clamp_min(_TINY)
    return rows / norms[..., None], norms


def exponent_shift(scale: float, bound: float, num_classes: int) -> float:
    """What every scaled logit is lowered by, so that a sum of `num_classes` exponentials stays finite in float32."""
    return max(0.0, scale * bound + math.log(num_classes) - _LARGEST_EXPONENT)


@dataclass(frozen=True)
class ShardBatch:
    """One step as one shard sees it: everything that the two passes over the sampled classes read.

    Attributes:
        embeddings: (G, D) unit embeddings of the global batch, compute dtype.
        classes: (S,) int64, sorted local numbers of the sampled classes.
        target_places: (G,) int64, where the sample's own class stands in `classes`; −1 where another shard owns it.
        target_cosine: (G,) float64.
        margin, margin_batch: the margin and what it may look at.
        scale, shift: s, and the constant subtracted from every exponent.
        conflict_threshold: negatives with a cosine above it are left out of the sum (PFC*, arXiv 2203.15565); None for
            never.
        conflict_as_zero_logit: keep such a negative in the sum with logit 0, as the reference implementation does.
        scratch_bytes: the most that tiles of samples × classes may take.
    """

    embeddings: Tensor
    classes: Tensor
    target_places: Tensor
    target_cosine: Tensor
    margin: Margin
    margin_batch: MarginBatch
    scale: float
    shift: float
    conflict_threshold: float | None
    conflict_as_zero_logit: bool
    scratch_bytes: int

    def tile_classes(self) -> int:
        """The most classes in a tile: about four arrays of (G, tile) and three of (tile, D) live at once."""
        numbers = 4 * len(self.embeddings) + 3 * self.embeddings.shape[1]
        per_class = numbers * self.margin.sub_centers * self.embeddings.element_size()
        return max(1, self.scratch() // per_class)

    def scratch(self) -> int:
        """The bytes that tiles at work may take, and kept ones again."""
        return min(self.scratch_bytes, _CPU_SCRATCH) if self.embeddings.device.type == "cpu" else self.scratch_bytes


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


def class_rows(classes: Tensor, sub_centers: int) -> Tensor:
    """(s × K,) numbers of the rows that hold the centers of (s,) classes."""
    if sub_centers == 1:
        return classes
    return (classes[:, None] * sub_centers + torch.arange(sub_centers, device=classes.device)).flatten()


def compute_tile(centers: Tensor, batch: ShardBatch, first: int, last: int) -> Tile:
    """The tile of `batch.classes[first:last]`, from raw centers (L × K, D)."""
    rows = class_rows(batch.classes[first:last], batch.margin.sub_centers)
    unit_centers, norms = normalise_rows(centers[rows].to(batch.embeddings.dtype))
    cosine = batch.embeddings @ unit_centers.T
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


@dataclass
class NegativeSums:
    """What the first pass leaves behind.

    Attributes:
        sums: (G,) float64, this shard's part of Z exp(−shift).
        pull: (G, D) compute dtype, Σ_j weight_ij ŵ_j over this shard: the embeddings' gradient but for its factor.
        conflicts: () float64, negatives above the conflict threshold.
        tiles: tiles kept for the second pass, by their first class; the rest is computed again.
    """

    sums: Tensor
    pull: Tensor
    conflicts: Tensor
    tiles: dict[int, Tile] = field(default_factory=dict)


def sum_negatives(centers: Tensor, batch: ShardBatch, *, keep_tiles: bool) -> NegativeSums:
    """First pass over the sampled classes: the sums of the loss and the embeddings' gradient in one sweep.

    Args:
        centers: (L × K, D), raw.
        keep_tiles: keep as many tiles as fit the scratch budget for `center_gradient`.
    """
    embeddings = batch.embeddings
    result = NegativeSums(
        sums=torch.zeros(len(embeddings), dtype=torch.float64, device=embeddings.device),
        pull=torch.zeros_like(embeddings),
        conflicts=torch.zeros((), dtype=torch.float64, device=embeddings.device),
    )
    budget = batch.scratch() if keep_tiles else 0
    size = batch.tile_classes()
    for first in range(0, len(batch.classes), size):
        last = min(first + size, len(batch.classes))
        tile = compute_tile(centers, batch, first, last)
        result.sums += tile.sums
        result.pull.addmm_(tile.weights, tile.unit_centers)
        result.conflicts += tile.conflicts
        bytes_kept = (tile.weights.numel() + tile.unit_centers.numel()) * tile.weights.element_size()
        if bytes_kept <= budget:
            budget -= bytes_kept
            result.tiles[first] = tile
    return result


@dataclass(frozen=True)
class TargetTerms:
    """The targets that this shard owns, in float64.

    Attributes:
        samples: (T,) int64, their places in the global batch.
        rows: (T,) int64, local row of the (nearest) center of each.
        unit_centers: (T, D) and center_norms: (T,).
        cosine: (T,).
    """

    samples: Tensor
    rows: Tensor
    unit_centers: Tensor
    center_norms: Tensor
    cosine: Tensor


def target_terms(
    centers: Tensor, unit_embeddings: Tensor, samples: Tensor, classes: Tensor, margin: Margin
) -> TargetTerms:
    """Cosines of the samples' own classes.

    Args:
        centers: (L × K, D), raw.
        unit_embeddings: (G, D) float64.
        samples: (T,) int64, samples of the global batch whose class this shard owns.
        classes: (T,) int64, their local class numbers.
    """
    rows = class_rows(classes, margin.sub_centers).view(-1, margin.sub_centers)
    unit_centers, norms = normalise_rows(centers[rows].double())
    cosine, nearest = (unit_centers @ unit_embeddings[samples][:, :, None])[..., 0].max(dim=1)
    pick = torch.arange(len(samples), device=samples.device), nearest
    return TargetTerms(samples, rows[pick], unit_centers[pick], norms[pick], cosine.clamp(-1.0, 1.0))


@dataclass(frozen=True)
class LossTerms:
    """Per-sample loss and its derivatives, (G,) float64 each.

    Attributes:
        loss: softplus(log Z − s t), and the margin's regulariser.
        target_slope: ∂ loss / ∂ (target cosine).
        negative_factor: what a tile's weight is multiplied with to give ∂ loss / ∂ c_ij.
        norm_slope: ∂ loss / ∂ (embedding norm), 0 for margins that do not look at it.
    """

    loss: Tensor
    target_slope: Tensor
    negative_factor: Tensor
    norm_slope: Tensor


def loss_terms(
    sums: Tensor, target_cosine: Tensor, batch: MarginBatch, margin: Margin, scale: float, shift: float
) -> LossTerms:
    """Losses and derivatives from the sums over all shards.

    Args:
        sums: (G,) float64, Z exp(−shift).
        target_cosine: (G,) float64.
    """
    with torch.enable_grad():
        cosine = target_cosine.detach().requires_grad_()
        norms = batch.norms.detach().requires_grad_()
        watched = MarginBatch(norms, batch.key, batch.state)
        logit = margin.target(cosine, watched)
        regulariser = margin.regulariser(watched)
        logit_by_cosine, logit_by_norm = _gradients(logit, [cosine, norms])
        (regulariser_by_norm,) = _gradients(regulariser, [norms])
    excess = torch.log(sums) + shift - scale * logit.detach()
    negatives = torch.sigmoid(excess)
    # Past its threshold softplus(x) is x: e^-40 is below float64's last digit, e^-20 (the default) is not.
    loss = torch.nn.functional.softplus(excess, threshold=40.0)
    if regulariser is not None:
        loss = loss + regulariser.detach()
    return LossTerms(
        loss=loss,
        target_slope=-scale * negatives * logit_by_cosine,
        # A sample without a single negative has Z = 0 and no gradient.
        negative_factor=torch.where(sums > 0, scale * negatives / sums.clamp_min(torch.finfo(sums.dtype).tiny), 0.0),
        norm_slope=-scale * negatives * logit_by_norm + regulariser_by_norm,
    )


def _gradients(values: Tensor | None, inputs: list[Tensor]) -> list[Tensor]:
    """Derivatives of the sum of `values`; zeros where it does not depend on an input."""
    if values is None or not values.requires_grad:
        return [torch.zeros_like(variable) for variable in inputs]
    gradients = torch.autograd.grad(values.sum(), inputs, allow_unused=True)
    return [torch.zeros_like(v) if g is None else g for v, g in zip(inputs, gradients, strict=True)]


def embedding_gradient(
    negatives: NegativeSums,
    targets: TargetTerms,
    terms: LossTerms,
    batch: ShardBatch,
    unit_embeddings: Tensor,
    norms: Tensor,
) -> Tensor:
    """(G, D) compute dtype: this shard's part of ∂ (sum of losses) / ∂ (raw embeddings), without the norm's own slope.

    Args:
        unit_embeddings: (G, D) float64.
        norms: (G,) float64.
    """
    dtype = batch.embeddings.dtype
    gradient = negatives.pull * terms.negative_factor.to(dtype)[:, None]
    gradient -= (gradient * batch.embeddings).sum(dim=1, keepdim=True) * batch.embeddings
    # ŵ − cos ê is what the projection leaves of a target center: in float64, since it is small where cos is near 1.
    tangent = targets.unit_centers - targets.cosine[:, None] * unit_embeddings[targets.samples]
    gradient[targets.samples] += (terms.target_slope[targets.samples][:, None] * tangent).to(dtype)
    # An embedding of zeros has no direction: without this its gradient would be the factor over _TINY.
    return gradient.masked_fill_(norms[:, None] <= _TINY, 0.0) / norms.to(dtype)[:, None]


@dataclass(frozen=True)
class CenterGradient:
    """Everything needed to compute the centers' gradient, tile by tile, now or at the optimizer's step.

    Attributes:
        batch: the step.
        scaled_embeddings: (G, D) compute dtype, ê times the factor of its negatives.
        target_rows: (T,) int64 sorted and distinct local rows, and target_gradient: (T, D) compute dtype, already
            projected.
        tiles: tiles kept from the first pass; empty for the deferred update.
    """

    batch: ShardBatch
    scaled_embeddings: Tensor
    target_rows: Tensor
    target_gradient: Tensor
    tiles: dict[int, Tile]

    def tile_rows(self, first: int, last: int) -> Tensor:
        """((last − first) × K,) int64, sorted: the local rows of `batch.classes[first:last]`."""
        return class_rows(self.batch.classes[first:last], self.batch.margin.sub_centers)

    def tile_gradient(self, centers: Tensor, first: int, last: int) -> Tensor:
        """((last − first) × K, D): gradient of the rows of `batch.classes[first:last]`."""
        tile = self.tiles.get(first)
        if tile is None or len(tile.center_norms) != (last - first) * self.batch.margin.sub_centers:
            tile = compute_tile(centers, self.batch, first, last)
        gradient = tile.weights.T @ self.scaled_embeddings
        gradient -= (gradient * tile.unit_centers).sum(dim=1, keepdim=True) * tile.unit_centers
        gradient /= tile.center_norms[:, None]
        rows = self.tile_rows(first, last)
        begin, end = torch.searchsorted(self.target_rows, torch.stack([rows[0], rows[-1] + 1])).tolist()
        places = torch.searchsorted(rows, self.target_rows[begin:end])
        return gradient.index_add_(0, places, self.target_gradient[begin:end])

    def tile_bounds(self) -> Iterator[tuple[int, int]]:
        """First and last class of each tile."""
        size = self.batch.tile_classes()
        for first in range(0, len(self.batch.classes), size):
            yield first, min(first + size, len(self.batch.classes))


def center_gradient(
    targets: TargetTerms,
    terms: LossTerms,
    batch: ShardBatch,
    unit_embeddings: Tensor,
    factor: Tensor,
    tiles: dict[int, Tile],
) -> CenterGradient:
    """The second pass, prepared; `factor` () is the caller's gradient over the size of the global batch."""
    dtype = batch.embeddings.dtype
    slope = terms.target_slope[targets.samples] * factor
    tangent = unit_embeddings[targets.samples] - targets.cosine[:, None] * targets.unit_centers
    contributions = (slope / targets.center_norms)[:, None] * tangent
    target_rows, places = targets.rows.unique(return_inverse=True)
    summed = contributions.new_zeros((len(target_rows), contributions.shape[1])).index_add_(0, places, contributions)
    scaled = batch.embeddings * (terms.negative_factor * factor).to(dtype)[:, None]
    return CenterGradient(batch, scaled, target_rows, summed.to(dtype), tiles)
