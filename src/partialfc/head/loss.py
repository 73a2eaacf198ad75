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

from partialfc.head.margins.base import Margin, MarginBatch
from partialfc.head.targets import TINY, TargetTerms, class_rows, segment_sum

_LARGEST_EXPONENT = 85.0  # exp(88.7) is the largest float32; a sum over the batch's tile stays below it
T = TypeVar("T")


def exponent_shift(scale: float, bound: float, num_classes: int) -> float:
    """What every scaled logit is lowered by, so that a sum of `num_classes` exponentials stays finite in float32."""
    return max(0.0, scale * bound + math.log(num_classes) - _LARGEST_EXPONENT)


@dataclass(frozen=True)
class ShardBatch:
    """One step as one shard sees it: everything that the two passes over the sampled classes read.

    Attributes:
        embeddings: (G, D) unit embeddings of the global batch, compute dtype.
        classes: (S,) int64, sorted local numbers of the sampled classes; or padded at the end to a size that no label
            changes, with the number of local classes.
        count: () int64 on the device, how many of `classes` are no padding; None for all.
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
    count: Tensor | None
    target_places: Tensor
    target_cosine: Tensor
    margin: Margin
    margin_batch: MarginBatch
    scale: float
    shift: float
    conflict_threshold: float | None
    conflict_as_zero_logit: bool
    operand_dtype: torch.dtype
    scratch: ScratchBuffer
    scratch_bytes: int

    def rows(self, first: int, last: int) -> Tensor:
        """((last − first) × K,) int64, sorted: the local rows of `classes[first:last]`."""
        return class_rows(self.classes[first:last], self.margin.sub_centers)

    def without_padding(self) -> ShardBatch:
        """The same with `classes` of its exact size: a host read where it is padded."""
        if self.count is None:
            return self
        return replace(self, classes=self.classes[: int(self.count)], count=None)


@dataclass(eq=False)
class ScratchView:
    """A piece of a head's scratch memory; it is free again when the last reference to the loan is gone."""

    values: Tensor


class ScratchBuffer:
    """One buffer that a head uses step after step: fresh pages cost a CPU more than what is computed into them."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._borrower: Callable[[], ScratchView | None] = lambda: None

    def __reduce__(self) -> tuple[type[ScratchBuffer], tuple[()]]:
        """A copy of the head begins with a buffer of its own."""
        return ScratchBuffer, ()

    def acquire(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> ScratchView | None:
        """An array of any content, or None while a former loan is out."""
        if self._borrower() is not None:
            return None
        size = math.prod(shape) * dtype.itemsize
        if self._buffer.numel() < size or self._buffer.device != device:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self._buffer = torch.empty(size, dtype=torch.uint8, device=device)
        loan = ScratchView(self._buffer[:size].view(dtype).view(shape))
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
        lr, momentum, weight_decay: as in torch.optim.SGD; lr may be () float32 on the device, for CUDA graphs.
        first_row: global number of the shard's first row.
        keys: (2,) int64 on the device, what centers and momentum draw from when they are rounded to bfloat16.
        skip: (1,) of integers on the device, not 0 if nothing is to change; None for never.
    """

    lr: float | Tensor
    momentum: float
    weight_decay: float
    first_row: int
    keys: Tensor
    skip: Tensor | None = None


class Path(Protocol):
    """One way to compute the two passes over the sampled classes.

    Attributes:
        uses_thread_pool: whether it spreads tiles over threads, beside which operations should not spread themselves.
        supports_padding: whether its first pass takes padded classes, and its `update` a flag to change nothing: a step
            then needs no host read.
    """

    uses_thread_pool: ClassVar[bool]
    supports_padding: ClassVar[bool]

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
    tangent = targets.unit_centers - targets.cosine[:, None] * unit_embeddings
    gradient += torch.where(targets.owned[:, None], terms.target_slope[:, None] * tangent, 0.0).to(dtype)
    # An embedding of zeros has no direction: without this its gradient would be the factor over TINY.
    return gradient.masked_fill_(norms[:, None] <= TINY, 0.0) / norms.to(dtype)[:, None]


@dataclass(frozen=True)
class CenterGradient:
    """Everything needed to compute the centers' gradient, tile by tile, now or at the optimizer's step.

    Attributes:
        batch: the step.
        scaled_embeddings: (G, D) compute dtype, ê times the factor of its negatives.
        target_rows: (G,) int64 local rows, distinct and sorted, then the number of rows to the end, and
            target_gradient: (G, D) compute dtype, already projected.
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

    def without_padding(self) -> CenterGradient:
        """The same of exactly the sampled classes: a host read where they are padded."""
        return self if self.batch.count is None else replace(self, batch=self.batch.without_padding())

    def over(self, scale: Tensor) -> CenterGradient:
        """The same divided by `scale` (), before the products, which the loss's scale might make overflow."""
        scaled, target = self.scaled_embeddings / scale, self.target_gradient / scale
        return replace(self, scaled_embeddings=scaled, target_gradient=target)

    def overflowed(self) -> Tensor:
        """() bool: whether the loss was scaled by too much for the compute dtype."""
        return ~(torch.isfinite(self.scaled_embeddings).all() & torch.isfinite(self.target_gradient).all())

    def tile(self, centers: Tensor, first: int, last: int) -> Tensor:
        """`Path.tile_gradient` of this gradient."""
        return self.path.tile_gradient(self, centers, first, last)


def center_gradient(
    targets: TargetTerms,
    terms: LossTerms,
    batch: ShardBatch,
    unit_embeddings: Tensor,
    factor: Tensor,
    rows: int,
    path: Path,
    kept: Any,
) -> CenterGradient:
    """The second pass, prepared; `factor` () is the caller's gradient over the size of the global batch.

    `rows` is the number of the shard's rows.
    """
    dtype = batch.embeddings.dtype
    slope = terms.target_slope * factor / targets.center_norms
    contributions = slope[:, None] * (unit_embeddings - targets.cosine[:, None] * targets.unit_centers)
    target_rows, summed = segment_sum(targets.rows, contributions, rows)
    scaled = batch.embeddings * (terms.negative_factor * factor).to(dtype)[:, None]
    return CenterGradient(batch, scaled, target_rows, summed.to(dtype), path, kept)
