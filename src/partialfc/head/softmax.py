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
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from partialfc.head.margins import Margin, MarginBatch

_LARGEST_EXPONENT = 85.0  # exp(88.7) is the largest float32; a sum over the batch's tile stays below it
_TINY = 1e-12
T = TypeVar("T")


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
        operand_dtype: what the operands of the large products are rounded to; sums are float32 at least.
        scratch: memory for what the first pass keeps for the second.
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
    operand_dtype: torch.dtype
    scratch: Scratch
    scratch_bytes: int

    def rows(self, first: int, last: int) -> Tensor:
        """((last − first) × K,) int64, sorted: the local rows of `classes[first:last]`."""
        return class_rows(self.classes[first:last], self.margin.sub_centers)


@dataclass(eq=False)
class Loan:
    """A piece of a head's scratch memory; it is free again when the last reference to the loan is gone."""

    values: Tensor


class Scratch:
    """One buffer that a head uses step after step: fresh pages cost a CPU more than what is computed into them."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._borrower: Callable[[], Loan | None] = lambda: None

    def lend(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Loan | None:
        """An array of any content, or None while a former loan is out."""
        if self._borrower() is not None:
            return None
        size = math.prod(shape) * dtype.itemsize
        if self._buffer.numel() < size or self._buffer.device != device:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self._buffer = torch.empty(size, dtype=torch.uint8, device=device)
        loan = Loan(self._buffer[:size].view(dtype).view(shape))
        self._borrower = weakref.ref(loan)
        return loan


@dataclass
class NegativeSums:
    """What the first pass leaves behind.

    Attributes:
        sums: (G,) float64, this shard's part of Z exp(−shift).
        pull: (G, D) compute dtype, Σ_j weight_ij ŵ_j over this shard: the embeddings' gradient but for its factor.
        conflicts: () float64, negatives above the conflict threshold.
        kept: what the path that computed them wants to see again in the second pass.
    """

    sums: Tensor
    pull: Tensor
    conflicts: Tensor
    kept: Any = None

    @staticmethod
    def zeros(embeddings: Tensor) -> NegativeSums:
        """Sums over no class; `embeddings` (G, D)."""
        return NegativeSums(
            sums=torch.zeros(len(embeddings), dtype=torch.float64, device=embeddings.device),
            pull=torch.zeros_like(embeddings),
            conflicts=torch.zeros((), dtype=torch.float64, device=embeddings.device),
        )


@dataclass(frozen=True)
class SGDRule:
    """One step of SGD with momentum and weight decay on rows.

    Attributes:
        lr, momentum, weight_decay: as in torch.optim.SGD.
        first_row: global number of the shard's first row.
        center_key, momentum_key: what rounding to bfloat16 draws from.
        skip: (1,) int32 on the device, not 0 if nothing is to change; None for never.
    """

    lr: float
    momentum: float
    weight_decay: float
    first_row: int
    center_key: int
    momentum_key: int
    skip: Tensor | None = None

    def numbers(self) -> tuple[float, float, float, int, int, int]:
        """All but `skip`."""
        return self.lr, self.momentum, self.weight_decay, self.first_row, self.center_key, self.momentum_key


class Path(Protocol):
    """One way to compute the two passes over the sampled classes.

    Attributes:
        in_threads: whether it spreads tiles over threads, beside which operations should not spread themselves.
    """

    in_threads: ClassVar[bool]

    def tile_classes(self, batch: ShardBatch) -> int:
        """The most classes in a tile."""

    def sum_negatives(self, centers: Tensor, batch: ShardBatch, *, keep: bool) -> NegativeSums:
        """First pass: the sums of the loss and the embeddings' gradient in one sweep.

        Args:
            centers: (L × K, D), raw.
            keep: leave in `kept` what spares the second pass work, within the scratch budget.
        """

    def spread(self, work: Callable[[T], None], items: Iterable[T]) -> None:
        """Run `work` on each item, in the threads that suit this path."""

    def tile_gradient(self, gradient: CenterGradient, centers: Tensor, first: int, last: int) -> Tensor:
        """((last − first) × K, D): gradient of the rows of `classes[first:last]`; valid until this thread's next."""

    def update(self, gradient: CenterGradient, centers: Tensor, momentum_buffer: Tensor, rule: SGDRule) -> bool:
        """Do the second pass and the step of SGD at once; False, and nothing done, for a path that cannot."""


RowVisitor = Callable[[Tensor, Tensor], None]  # rows (n,) int64, sorted and distinct, and their gradient (n, D)


def tile_bounds(path: Path, batch: ShardBatch) -> Iterator[tuple[int, int]]:
    """First and last class of each tile."""
    size = path.tile_classes(batch)
    for first in range(0, len(batch.classes), size):
        yield first, min(first + size, len(batch.classes))


def class_rows(classes: Tensor, sub_centers: int) -> Tensor:
    """(s × K,) numbers of the rows that hold the centers of (s,) classes."""
    if sub_centers == 1:
        return classes
    return (classes[:, None] * sub_centers + torch.arange(sub_centers, device=classes.device)).flatten()


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
        watched = replace(batch, norms=norms)
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
        path: what computes it.
        kept: what the path's first pass left for it.
    """

    batch: ShardBatch
    scaled_embeddings: Tensor
    target_rows: Tensor
    target_gradient: Tensor
    path: Path
    kept: Any

    def visit(self, centers: Tensor, visit: RowVisitor) -> None:
        """Compute the gradient tile by tile and show each tile to `visit`, maybe in several threads at once.

        A tile depends on its own rows only, which the visitor may change.
        """

        def work(bounds: tuple[int, int]) -> None:
            visit(self.batch.rows(*bounds), self.tile(centers, *bounds))

        self.path.spread(work, tile_bounds(self.path, self.batch))

    def tile(self, centers: Tensor, first: int, last: int) -> Tensor:
        """`Path.tile_gradient` of this gradient."""
        return self.path.tile_gradient(self, centers, first, last)


def center_gradient(
    targets: TargetTerms,
    terms: LossTerms,
    batch: ShardBatch,
    unit_embeddings: Tensor,
    factor: Tensor,
    path: Path,
    kept: Any,
) -> CenterGradient:
    """The second pass, prepared; `factor` () is the caller's gradient over the size of the global batch."""
    dtype = batch.embeddings.dtype
    slope = terms.target_slope[targets.samples] * factor
    tangent = unit_embeddings[targets.samples] - targets.cosine[:, None] * targets.unit_centers
    contributions = (slope / targets.center_norms)[:, None] * tangent
    target_rows, places = targets.rows.unique(return_inverse=True)
    summed = contributions.new_zeros((len(target_rows), contributions.shape[1])).index_add_(0, places, contributions)
    scaled = batch.embeddings * (terms.negative_factor * factor).to(dtype)[:, None]
    return CenterGradient(batch, scaled, target_rows, summed.to(dtype), path, kept)
