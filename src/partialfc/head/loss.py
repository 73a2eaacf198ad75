"""The margin softmax over sampled classes: the formulas of its loss and gradients, as pure functions of tensors.

Notation, for one sample i with target y: ê and ŵ are unit vectors, c_ij = ê_i · ŵ_j, s is the scale, t_i the target's
logit with its margin, Z_i = Σ_{j ≠ y} exp(s c_ij) over the sampled classes of all shards. The loss is written as

    loss_i = softplus(log Z_i − s t_i),      with gradients      ∂/∂t_i = −s q_i,   ∂/∂c_ij = s q_i exp(s c_ij) / Z_i,

where q_i = sigmoid(log Z_i − s t_i) is the probability of all negatives together. In float32 the usual
logsumexp − target loses most of the gradient once the target's probability is near one; q_i does not, since the target
never enters a sum. Targets need G × D operations and are computed in float64, in shapes that do not depend on which
shard owns them. The backends sum the negatives in tiles of classes, in the compute dtype (`backends/`). |c| ≤ 1, so exp
needs no running maximum: a constant shift suffices, and only where scale × bound would leave the range of float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor

from partialfc.core.errors import InputError
from partialfc.head.margins.base import Margin, MarginBatch

SMALLEST_NORM = 1e-12
NO_THRESHOLD = 2.0  # a conflict threshold that no cosine exceeds
_LARGEST_EXPONENT = 85.0  # exp(88.7) is the largest float32; the sum over a tile's samples stays below it
_SMALLEST_EXPONENT = -87.3  # below it e^x is subnormal, which the backends round to 0
_WIDEST_REWEIGHTED = 200.0
_DIGITS = 17.0  # e^-17 is below the last digit of float32 beside 1


@dataclass(frozen=True)
class LossConfig:
    """The constants of a head's loss; see `PartialFC`.

    Raises:
        InputError: a value is out of its range.
    """

    num_classes: int
    margin: Margin
    scale: float
    conflict_threshold: float | None
    conflict_as_zero_logit: bool
    operand_dtype: torch.dtype
    scratch_bytes: int

    def __post_init__(self) -> None:
        if not (isinstance(self.scale, Real) and math.isfinite(self.scale) and self.scale > 0):
            raise InputError(f"scale is {self.scale!r}; it must be a positive number, such as 64.")
        # The sum of negatives must neither overflow if all cosines are 1 nor underflow to 0 if all are -1. Where a
        # margin raises negatives, a sum that underflows is an error of the step.
        widest = self.scale * (1 + self.margin.negatives_bound)
        allowed = _LARGEST_EXPONENT - _SMALLEST_EXPONENT - math.log(self.num_classes)
        if self.margin.negatives_bound > 1:
            allowed = _WIDEST_REWEIGHTED
        if widest > allowed:
            raise InputError(
                f"scale {self.scale} would underflow: with {type(self.margin).__name__} the logits spread over "
                f"{widest:g}, and float32's exponentials allow {allowed:.1f} for {self.num_classes} classes; the scale "
                f"is at most {allowed / (1 + self.margin.negatives_bound):.1f}."
            )
        threshold = self.conflict_threshold
        if threshold is not None and not (isinstance(threshold, Real) and -1 <= threshold <= 1):
            raise InputError(f"conflict_threshold is {threshold!r}; it is a cosine in [-1, 1], such as 0.4.")
        if threshold == 1:  # no cosine exceeds it but by rounding
            object.__setattr__(self, "conflict_threshold", None)
        if self.operand_dtype not in (torch.float32, torch.bfloat16):
            raise InputError(f"operand_dtype is {self.operand_dtype}; it is torch.float32 or torch.bfloat16.")

    @property
    def shift(self) -> float:
        """Subtracted from every scaled logit, so that the sum of C exponentials stays finite in float32."""
        bound = self.scale * self.margin.negatives_bound
        return max(0.0, bound + math.log(self.num_classes) - _LARGEST_EXPONENT)

    @property
    def smallest_target(self) -> float:
        """The smallest target logit, not scaled, beside which negatives that underflow are below float32's digits."""
        return (self.shift + _SMALLEST_EXPONENT + math.log(self.num_classes) + _DIGITS) / self.scale


def normalise_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows (…, D) and the norms (…) of `rows`; a row of zeros stays zero."""
    norms = torch.linalg.vector_norm(rows, dim=-1).clamp_min(SMALLEST_NORM)
    return rows / norms[..., None], norms


def normalise_centers(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The same for centers, where a row without a direction (zero, infinite or NaN) becomes NaN: the loss shows it."""
    unit, norms = normalise_rows(rows)
    unsound = ~((norms > SMALLEST_NORM) & norms.isfinite())
    return unit.masked_fill_(unsound[..., None], torch.nan), norms


def class_rows(classes: Tensor, sub_centers: int) -> Tensor:
    """(s × K,) numbers of the rows that hold the centers of (s,) classes."""
    if sub_centers == 1:
        return classes
    return (classes[:, None] * sub_centers + torch.arange(sub_centers, device=classes.device)).flatten()


@dataclass(frozen=True)
class TargetTerms:
    """The targets of the global batch on one shard, in float64; zeros where another shard owns the class.

    Attributes:
        owned: (G,) bool.
        rows: (G,) int64, local row of the (nearest) center; the number of rows where not owned.
        unit_centers: (G, D) and center_norms: (G,), 1 where not owned.
        cosine: (G,).
    """

    owned: Tensor
    rows: Tensor
    unit_centers: Tensor
    center_norms: Tensor
    cosine: Tensor


def target_terms(
    centers: Tensor, unit_embeddings: Tensor, owned: Tensor, classes: Tensor, sub_centers: int
) -> TargetTerms:
    """The cosines between the samples and their own classes.

    Args:
        centers: (L × K, D), not normalised.
        unit_embeddings: (G, D) float64.
        owned: (G,) bool, whether this shard owns the class of a sample.
        classes: (G,) int64 local class numbers; any value where not owned.
        sub_centers: K.
    """
    if not len(centers):
        zeros = torch.zeros_like(unit_embeddings)
        return TargetTerms(owned, torch.zeros_like(classes), zeros, torch.ones_like(zeros[:, 0]), zeros[:, 0])
    rows = class_rows(torch.where(owned, classes, 0), sub_centers).view(-1, sub_centers)
    unit_centers, norms = normalise_centers(centers[rows].double())
    cosine, nearest = (unit_centers @ unit_embeddings[:, :, None])[..., 0].max(dim=1)
    pick = torch.arange(len(rows), device=rows.device), nearest
    return TargetTerms(
        owned=owned,
        rows=torch.where(owned, rows[pick], len(centers)),
        unit_centers=torch.where(owned[:, None], unit_centers[pick], 0.0),
        center_norms=torch.where(owned, norms[pick], 1.0),
        cosine=torch.where(owned, cosine.clamp(-1.0, 1.0), 0.0),
    )


@dataclass(frozen=True)
class LossTerms:
    """Loss of each sample and its derivatives, (G,) float64 each.

    Attributes:
        loss: softplus(log Z − s t), plus the margin's regulariser.
        target_slope: ∂ loss / ∂ (target cosine).
        negative_factor: times the weight of a negative gives ∂ loss / ∂ c_ij.
        norm_slope: ∂ loss / ∂ (embedding norm), 0 for margins that do not depend on it.
    """

    loss: Tensor
    target_slope: Tensor
    negative_factor: Tensor
    norm_slope: Tensor


def loss_terms(sums: Tensor, target_cosine: Tensor, batch: MarginBatch, config: LossConfig) -> LossTerms:
    """Losses and derivatives from the sums over all shards.

    Args:
        sums: (G,) float64, Z exp(−shift).
        target_cosine: (G,) float64.
    """
    scale = config.scale
    with torch.enable_grad():
        cosine = target_cosine.detach().requires_grad_()
        norms = batch.norms.detach().requires_grad_()
        batch = replace(batch, norms=norms)
        logit = config.margin.target(cosine, batch)
        regulariser = config.margin.regulariser(batch)
        logit_by_cosine, logit_by_norm = _gradients(logit, [cosine, norms])
        (regulariser_by_norm,) = _gradients(regulariser, [norms])
    excess = torch.log(sums) + config.shift - scale * logit.detach()
    negatives = torch.sigmoid(excess)
    # Past its threshold softplus(x) is x: e^-40 is below the last digit of float64, e^-20 (the default) is not.
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
    weighted_centers: Tensor, targets: TargetTerms, terms: LossTerms, unit_embeddings: Tensor, norms: Tensor
) -> Tensor:
    """(G, D) compute dtype: this shard's part of ∂ (sum of losses) / ∂ embeddings, without the slope of the norm.

    Args:
        weighted_centers: (G, D) compute dtype, Σ_j weight_ij ŵ_j over the shard's negatives.
        unit_embeddings: (G, D) float64.
        norms: (G,) float64.
    """
    dtype = weighted_centers.dtype
    rounded = unit_embeddings.to(dtype)
    gradient = weighted_centers * terms.negative_factor.to(dtype)[:, None]
    gradient -= (gradient * rounded).sum(dim=1, keepdim=True) * rounded
    # ŵ − cos ê is the projected target center: in float64, since it is small where cos is near 1.
    tangent = targets.unit_centers - targets.cosine[:, None] * unit_embeddings
    gradient += torch.where(targets.owned[:, None], terms.target_slope[:, None] * tangent, 0.0).to(dtype)
    # An embedding of zeros has no direction: without this its gradient would be divided by SMALLEST_NORM.
    return gradient.masked_fill_(norms[:, None] <= SMALLEST_NORM, 0.0) / norms.to(dtype)[:, None]


def target_center_gradient(
    targets: TargetTerms, terms: LossTerms, unit_embeddings: Tensor, factor: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    """The targets' part of ∂ loss / ∂ centers, summed by row in an order that does not vary.

    Args:
        unit_embeddings: (G, D) float64.
        factor: () float64, the gradient of the mean loss over the size of the global batch.
        rows: the number of the shard's rows.

    Returns:
        (G,) int64, the distinct local rows in order, padded with `rows`; and (G, D) float64, their gradients.
    """
    slope = terms.target_slope * factor / targets.center_norms
    contributions = slope[:, None] * (unit_embeddings - targets.cosine[:, None] * targets.unit_centers)
    return segment_sum(targets.rows, contributions, rows)


def segment_sum(rows: Tensor, values: Tensor, padding_row: int) -> tuple[Tensor, Tensor]:
    """Sums of the values that belong to one row, always in the same order.

    Args:
        rows: (G,) int64, at most `padding_row`.
        values: (G, D).

    Returns:
        (G,) int64, the distinct rows in order, padded with `padding_row`; and (G, D), their sums.
    """
    ordered, order = rows.sort(stable=True)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    segments = is_first.cumsum(0) - 1
    distinct = torch.full_like(rows, padding_row).scatter_(0, segments, ordered)
    bounds = torch.searchsorted(segments, torch.arange(len(rows) + 1, device=rows.device))
    # Unlike index_add_, whose order of additions on a GPU varies from run to run; unsafe avoids a host read.
    return distinct, torch.segment_reduce(values[order], "sum", offsets=bounds, unsafe=True)
