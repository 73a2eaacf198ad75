"""PartialFC: the sharded and sampled margin softmax as an ordinary module."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from partialfc import keyed_random
from partialfc.distributed import Group, Shard, all_reduce, start_gather_rows, start_reduce_scatter_rows
from partialfc.errors import InputError
from partialfc.head import softmax
from partialfc.head.global_batch import Everyone, check_finite, gather_labels
from partialfc.head.initial_centers import initial_centers
from partialfc.head.margins import CosFace, Margin, MarginBatch
from partialfc.head.paths import choose_path
from partialfc.head.row_gradients import RowGradients
from partialfc.head.sampling import sample_classes
from partialfc.head.threads import alone_if

Update = Literal["sparse", "deferred"]
_WIDEST_LOGITS = 200.0  # float32's exponents reach from e^-103 to e^88


@dataclass(frozen=True)
class HeadFigures:
    """Figures of the last forward pass, on the device, the same on all ranks.

    Attributes:
        target_cosine: () mean cosine between embeddings and their own class centers.
        conflict_share: () part of the negatives left out as conflicts.
        sampled: classes that the step used on this rank.
    """

    target_cosine: Tensor
    conflict_share: Tensor
    sampled: int


class PartialFC(nn.Module):
    """Margin-based softmax over sampled classes, sharded by class over the ranks (An et al., CVPR 2022, 2203.15565).

    Never wrap it, or a module that holds it, in DistributedDataParallel or FSDP: each rank owns other rows. Give its
    parameters to `RowwiseSGD` or `RowwiseAdamW`, and those of the backbone to any optimizer.

    Args:
        num_classes: C, over all ranks.
        embedding_dim: D.
        sample_rate: part of the classes that a step uses, in [0, 1]; 0 uses the positives only, 1 all classes.
        margin: `CosFace`, `ArcFace` or another `Margin`.
        scale: s, multiplies every logit.
        conflict_threshold: a negative whose cosine is above it is taken for the same person under another label and
            left out of that sample's denominator (PFC*); the paper uses 0.4. None keeps all.
        conflict_as_zero_logit: the reference implementation's version of it, which counts such a negative as e^0.
        update: "sparse" leaves a sparse gradient of exactly the sampled rows in `centers.grad`; "deferred" stores no
            gradient, and the optimizer's step computes it tile by tile.
        operand_dtype: bfloat16 rounds the operands of the large products, which CPUs and GPUs with bfloat16 units do in
            half the time; sums stay float32 at least. float32 does not round.
        seed: initial centers and negatives are functions of it.
        scratch_bytes: the most memory for tiles of samples × classes.
        group: the processes that share the classes; None for all.

    Attributes:
        centers: (L × K, D), this rank's rows; K = margin.sub_centers, row = local class × K + sub-center.
        shard: which classes are this rank's.
        figures: `HeadFigures` of the last forward pass.

    Raises:
        InputError: an argument is out of its range.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        sample_rate: float = 1.0,
        margin: Margin | None = None,
        scale: float = 64.0,
        conflict_threshold: float | None = None,
        *,
        conflict_as_zero_logit: bool = False,
        update: Update = "sparse",
        operand_dtype: torch.dtype = torch.float32,
        seed: int = 0,
        scratch_bytes: int = 256 << 20,
        group: Group | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_dim = embedding_dim
        self.sample_rate = sample_rate
        self.margin = CosFace() if margin is None else margin
        self.scale = scale
        self.conflict_threshold = conflict_threshold
        self.conflict_as_zero_logit = conflict_as_zero_logit
        self.update = update
        self.operand_dtype = operand_dtype
        self.seed = seed
        self.scratch_bytes = scratch_bytes
        self._check_arguments()
        self.shard = Shard.of(num_classes, group)
        self.centers = nn.Parameter(
            initial_centers(self.shard.rows(self.margin.sub_centers), embedding_dim, seed, device, dtype)
        )
        self.row_gradients = RowGradients(seed, self.shard.start * self.margin.sub_centers)
        self.figures: HeadFigures | None = None
        self._scratch = softmax.Scratch()
        for name, value in self.margin.initial_state().items():
            self.register_buffer(f"margin_{name}", value.to(device))

    def _check_arguments(self) -> None:
        if self.num_classes < 1 or self.embedding_dim < 1:
            raise InputError(
                f"PartialFC needs at least 1 class and 1 dimension, not {self.num_classes} and {self.embedding_dim}."
            )
        if not 0 <= self.sample_rate <= 1:
            raise InputError(
                f"sample_rate is {self.sample_rate}; it is a part of the classes, from 0 (positives only) to 1."
            )
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise InputError(f"scale is {self.scale}; it must be a positive number, such as 64.")
        widest = self.scale * (1 + self.margin.negatives_bound)
        if widest > _WIDEST_LOGITS:
            raise InputError(
                f"scale {self.scale} would overflow: with {type(self.margin).__name__} the logits spread over "
                f"{widest:g}, and float32's exponentials allow {_WIDEST_LOGITS:g}; lower the scale."
            )
        if self.conflict_threshold is not None and not -1 <= self.conflict_threshold <= 1:
            raise InputError(
                f"conflict_threshold is {self.conflict_threshold}; it is a cosine in [-1, 1], such as 0.4."
            )
        if self.operand_dtype not in (torch.float32, torch.bfloat16):
            raise InputError(f"operand_dtype is {self.operand_dtype}; it is torch.float32 or torch.bfloat16.")
        if self.update not in self.margin.updates:
            raise InputError(
                f"update is {self.update!r}; {type(self.margin).__name__} works with "
                f"{', '.join(sorted(self.margin.updates))}."
            )

    @property
    def step(self) -> int:
        """Optimizer steps taken; the negatives of a step are drawn from it. Set it when resuming."""
        return self.row_gradients.step

    @step.setter
    def step(self, value: int) -> None:
        self.row_gradients.step = value

    def margin_state(self) -> dict[str, Tensor]:
        """The margin's running figures by their own names: the same on every rank."""
        return {name: self.get_buffer(f"margin_{name}").clone() for name in self.margin.initial_state()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, those that a deferred update has not computed yet included."""
        super().zero_grad(set_to_none)
        self.row_gradients.deferred.clear()

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, embedding_dim={self.embedding_dim}, sample_rate={self.sample_rate}, "
            f"margin={self.margin}, scale={self.scale}, classes={self.shard.start}:{self.shard.stop}, "
            f"update={self.update!r}"
        )

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        step_labels: Tensor | None = None,
        first_place: int = 0,
        everyone: Everyone | None = None,
    ) -> Tensor:
        """The mean loss of the global batch; the same value on every rank.

        Under world size W it takes five collectives, three with `everyone`, and backward one. The embeddings' gradient
        is W times that of the mean loss, because DDP and FSDP average the backbone's gradients over the ranks.

        Args:
            embeddings: (B, D) floating point, this rank's, not normalised. B may differ between ranks.
            labels: (B,) int64 class numbers in [0, C).
            step_labels: (n,) int64, the labels of all micro-steps and ranks, the same on all ranks. With them, each
                micro-step of an accumulated step uses the same classes, however the step is cut; without, each adds its
                own positives to the shared negatives.
            first_place: how many samples the micro-steps before have, over all ranks; noise of margins goes by it.
            everyone: numbers of samples and labels of all ranks, the same on all, if the caller knows them already.

        Returns:
            () float64 for float64 embeddings, float32 otherwise.

        Raises:
            InputError: wrong shapes, dtypes or devices, or a label out of range (on all ranks alike).
            NonFiniteEmbeddings: NaN or infinity among the embeddings of any rank.
        """
        self._check_inputs(embeddings, labels)
        # Parameters lose attributes when a module is copied or moved to another storage.
        self.centers.row_gradients = self.row_gradients  # type: ignore[attr-defined]
        return _SampledSoftmax.apply(embeddings, self.centers, labels, self, _Place(step_labels, first_place, everyone))

    def _check_inputs(self, embeddings: Tensor, labels: Tensor) -> None:
        inside_ddp = getattr(DistributedDataParallel, "_active_ddp_module", None) is not None
        rows = len(self.shard) * self.margin.sub_centers
        resharded = type(self.centers.data) is not Tensor or self.centers.shape != (rows, self.embedding_dim)
        if inside_ddp or resharded or getattr(self, "_is_replica", False):
            raise InputError(
                "PartialFC stands inside a parallel wrapper, which would overwrite its shards with rank 0's: "
                "wrap the backbone alone and call the head beside it."
            )
        if embeddings.ndim != 2 or embeddings.shape[1] != self.embedding_dim or not embeddings.is_floating_point():
            raise InputError(
                f"embeddings are {tuple(embeddings.shape)} of {embeddings.dtype}; the head expects floating point "
                f"of (B, {self.embedding_dim})."
            )
        if labels.shape != embeddings.shape[:1] or labels.dtype != torch.int64:
            raise InputError(
                f"labels are {tuple(labels.shape)} of {labels.dtype}; the head expects int64 of ({len(embeddings)},)."
            )
        if not embeddings.device == labels.device == self.centers.device:
            raise InputError(
                f"embeddings are on {embeddings.device}, labels on {labels.device} and centers on "
                f"{self.centers.device}; move all to one device."
            )


@dataclass(frozen=True)
class _Place:
    """What a micro-step must know of the optimizer step it is part of."""

    step_labels: Tensor | None
    first: int
    everyone: Everyone | None


@dataclass(frozen=True)
class _Step:
    """One forward pass: the global batch, this rank's part of the classes, and the figures of both passes."""

    counts: list[int]
    unit_embeddings: Tensor
    norms: Tensor
    batch: softmax.ShardBatch
    targets: softmax.TargetTerms
    path: softmax.Path
    negatives: softmax.NegativeSums
    terms: softmax.LossTerms


def _forward(
    head: PartialFC, path: softmax.Path, centers: Tensor, local: tuple[Tensor, Tensor], place: _Place, keep: bool
) -> _Step:
    """Everything before backward, from this rank's embeddings and labels. Five collectives, or three; see `forward`."""
    shard, margin = head.shard, head.margin
    everyone = gather_labels(local[1], place.everyone, head.num_classes, shard.group)
    labels = everyone.labels
    gathered = start_gather_rows(local[0].contiguous(), everyone.counts, shard.group)
    classes = sample_classes(
        (labels if place.step_labels is None else torch.cat([labels, place.step_labels])).unique(),
        num_classes=head.num_classes,
        sample_rate=head.sample_rate,
        seed=head.seed,
        step=head.step,
        start=shard.start,
        stop=shard.stop,
    )
    embeddings = gathered()  # sampling went on beside it
    check_finite(embeddings, head.step)
    unit_embeddings, norms = softmax.normalise_rows(embeddings.double())
    compute_dtype = torch.promote_types(embeddings.dtype, torch.float32)
    if head.row_gradients.prepare is not None:
        head.row_gradients.prepare(softmax.class_rows(classes - shard.start, margin.sub_centers))
    owned = ((labels >= shard.start) & (labels < shard.stop)).nonzero()[:, 0]
    targets = softmax.target_terms(centers, unit_embeddings, owned, labels[owned] - shard.start, margin)
    target_cosine = torch.zeros_like(norms)
    target_cosine[owned] = targets.cosine
    all_reduce(target_cosine, group=shard.group)
    margin_batch = _margin_batch(head, norms, target_cosine, place.first)
    target_places = torch.full_like(labels, -1)
    target_places[owned] = torch.searchsorted(classes, labels[owned])
    batch = softmax.ShardBatch(
        embeddings=unit_embeddings.to(compute_dtype),
        classes=classes - shard.start,
        target_places=target_places,
        target_cosine=target_cosine,
        margin=margin,
        margin_batch=margin_batch,
        scale=head.scale,
        shift=softmax.exponent_shift(head.scale, margin.negatives_bound, head.num_classes),
        conflict_threshold=head.conflict_threshold,
        conflict_as_zero_logit=head.conflict_as_zero_logit,
        operand_dtype=torch.promote_types(head.operand_dtype, compute_dtype)
        if compute_dtype == torch.float64
        else head.operand_dtype,
        scratch=head._scratch,
        scratch_bytes=head.scratch_bytes,
    )
    with record_function("head: negatives"):
        negatives = path.sum_negatives(centers, batch, keep=keep)
    everything = torch.cat([negatives.sums, negatives.conflicts[None], torch.full_like(norms[:1], len(classes))])
    all_reduce(everything, group=shard.group)
    sums, conflicts, sampled = everything[:-2], everything[-2], everything[-1]
    terms = softmax.loss_terms(sums, target_cosine, margin_batch, margin, head.scale, batch.shift)
    head.figures = HeadFigures(
        target_cosine=target_cosine.mean(),
        conflict_share=conflicts / ((sampled - 1) * len(labels)).clamp_min(1),
        sampled=len(classes),
    )
    return _Step(everyone.counts, unit_embeddings, norms, batch, targets, path, negatives, terms)


def _margin_batch(head: PartialFC, norms: Tensor, target_cosine: Tensor, first_place: int) -> MarginBatch:
    """What the margin sees; in training its running figures take this batch in first, as published margins do."""
    key = keyed_random.derive_key(head.seed, "margin", head.step)
    batch = MarginBatch(norms, key, head.margin_state(), first_place)
    if not head.training:
        return batch
    state = head.margin.updated_state(target_cosine, batch)
    for name, value in state.items():
        head.get_buffer(f"margin_{name}").copy_(value)
    return replace(batch, state=state)


class _SampledSoftmax(torch.autograd.Function):
    """The loss of the global batch with respect to the local embeddings and the local centers."""

    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, centers: Tensor, labels: Tensor, head: PartialFC, place: _Place
    ) -> Tensor:
        # Of several micro-steps that wait for the optimizer only the first keeps anything.
        keep = ctx.needs_input_grad[1] and not head.row_gradients.deferred
        path = choose_path(centers, embeddings, head.margin)
        with torch.autocast(embeddings.device.type, enabled=False), alone_if(path.in_threads):
            step = _forward(head, path, centers, (embeddings, labels), place, keep)
        ctx.head, ctx.step, ctx.dtype = head, step, embeddings.dtype
        ctx.save_for_backward(centers)
        return step.terms.loss.mean().to(step.batch.embeddings.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        head, step = ctx.head, ctx.step
        (centers,) = ctx.saved_tensors
        factor = loss_gradient.double() / len(step.norms)
        with torch.autocast(centers.device.type, enabled=False), alone_if(step.path.in_threads):
            embeddings_gradient = _start_embeddings_gradient(head, step, factor)
            with record_function("head: gradient of the centers"):
                centers_gradient = _centers_gradient(head, step, factor, centers) if ctx.needs_input_grad[1] else None
            return embeddings_gradient().to(ctx.dtype), centers_gradient, None, None, None


def _start_embeddings_gradient(head: PartialFC, step: _Step, factor: Tensor) -> Callable[[], Tensor]:
    """Begin to compute (B, D), times the world size since DDP averages; what is returned gives it. One collective."""
    group = head.shard.group
    gradient = softmax.embedding_gradient(
        step.negatives, step.targets, step.terms, step.batch, step.unit_embeddings, step.norms
    )
    summed = start_reduce_scatter_rows(gradient, step.counts, group)

    def finish() -> Tensor:
        gradient = summed()
        start = sum(step.counts[: head.shard.rank])
        own = slice(start, start + len(gradient))
        gradient = gradient + (step.terms.norm_slope[own, None] * step.unit_embeddings[own]).to(gradient.dtype)
        return gradient * (factor * head.shard.world_size).to(gradient.dtype)

    return finish


def _centers_gradient(head: PartialFC, step: _Step, factor: Tensor, centers: Tensor) -> Tensor | None:
    """The sampled rows as a sparse tensor, or None where the optimizer will compute them."""
    prepared = softmax.center_gradient(
        step.targets, step.terms, step.batch, step.unit_embeddings, factor, step.path, step.negatives.kept
    )
    step.negatives.kept = None  # the loss may outlive the gradient, and would keep the scratch memory
    if head.update == "deferred":
        head.row_gradients.deferred.append(prepared)
        return None
    rows = step.batch.rows(0, len(step.batch.classes))
    values = torch.empty(len(rows), centers.shape[1], dtype=centers.dtype, device=centers.device)

    def copy(tile: Tensor, gradient: Tensor) -> None:
        first = int(torch.searchsorted(rows, tile[0]))
        values[first : first + len(tile)] = gradient

    prepared.visit(centers, copy)
    return torch.sparse_coo_tensor(rows[None], values, centers.shape, check_invariants=False)
