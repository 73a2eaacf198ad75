"""PartialFC: the sharded and sampled margin softmax as an ordinary module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from partialfc.core import keyed_random
from partialfc.core.errors import InputError
from partialfc.distributed.collectives import Group, Shard, all_reduce, start_gather_rows, start_reduce_scatter_rows
from partialfc.head import inputs
from partialfc.head import loss as softmax
from partialfc.head.backends.select import select_backend
from partialfc.head.backends.threads import single_threaded_if
from partialfc.head.backends.tile_sizes import SCRATCH_BYTES
from partialfc.head.global_batch import GlobalLabels, gather_labels, raise_bad_input
from partialfc.head.initial_centers import initial_centers
from partialfc.head.input_flag import InputFlag
from partialfc.head.margins.base import CosFace, Margin, MarginBatch
from partialfc.head.rows import CenterState
from partialfc.head.sampling import sample_classes, sample_padded, sampling_keys
from partialfc.head.targets import TargetTerms, class_rows, normalise_rows, target_terms

Update = Literal["sparse", "deferred"]


@dataclass(frozen=True)
class HeadFigures:
    """Figures of the last forward pass, on the device, the same on all ranks.

    Attributes:
        target_cosine: () mean cosine between embeddings and their own class centers.
        conflict_share: () part of the negatives left out as conflicts.
        sampled: () int64, classes that the step used on this rank.
    """

    target_cosine: Tensor
    conflict_share: Tensor
    sampled: Tensor


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
        scratch_bytes: int = SCRATCH_BYTES,
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
        inputs.check_sizes(num_classes, embedding_dim, sample_rate)
        inputs.check_loss(self.margin, scale, conflict_threshold, operand_dtype, update)
        self.shard = Shard.of(num_classes, group)
        self.centers = nn.Parameter(
            initial_centers(self.shard.rows(self.margin.sub_centers), embedding_dim, seed, device, dtype)
        )
        self.center_state = CenterState(seed, self.shard.start * self.margin.sub_centers)
        self.figures: HeadFigures | None = None
        self._scratch = softmax.ScratchBuffer()
        self._flag: InputFlag | None = None
        for name, value in self.margin.initial_state().items():
            self.register_buffer(f"margin_{name}", value.to(device))

    @property
    def step(self) -> int:
        """Optimizer steps taken; the negatives of a step are drawn from it. Set it when resuming."""
        return self.center_state.step

    @step.setter
    def step(self, value: int) -> None:
        self.center_state.step = value

    def margin_state(self) -> dict[str, Tensor]:
        """The margin's running figures by their own names: the same on every rank."""
        return {name: self.get_buffer(f"margin_{name}").clone() for name in self.margin.initial_state()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, those that a deferred update has not computed yet included."""
        super().zero_grad(set_to_none)
        self.center_state.deferred.clear()

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
        first_sample: int = 0,
        global_labels: GlobalLabels | None = None,
    ) -> Tensor:
        """The mean loss of the global batch; the same value on every rank.

        Under world size W it takes five collectives, three with `global_labels`, and backward one. The gradient of the
        embeddings is W times that of the mean loss, because DDP and FSDP average the backbone's gradients over ranks.

        Args:
            embeddings: (B, D) floating point, this rank's, not normalised. B may differ between ranks.
            labels: (B,) int64 class numbers in [0, C).
            step_labels: (n,) int64, the labels of all micro-steps and ranks, the same on all ranks. With them, each
                micro-step of an accumulated step uses the same classes, however the step is cut; without, each adds its
                own positives to the shared negatives.
            first_sample: how many samples the micro-steps before have, over all ranks; noise of margins goes by it.
            global_labels: sample counts and labels of all ranks, the same on all, if the caller knows them;
                otherwise the ranks exchange them, and the host waits for the result.

        Returns:
            () float64 for float64 embeddings, float32 otherwise.

        Raises:
            InputError: wrong shapes, dtypes or devices, or a label out of range (on all ranks alike).
            NonFiniteEmbeddings: NaN or infinity among the embeddings of any rank.
            On a GPU with update="deferred" the last two are those of an earlier batch; see `check`.
        """
        rows = len(self.shard) * self.margin.sub_centers
        inputs.check_not_wrapped(self.centers, rows, self.embedding_dim, getattr(self, "_is_replica", False))
        inputs.check_batch(embeddings, labels, self.centers)
        if global_labels is not None:
            inputs.check_counts(global_labels.counts, len(embeddings), self.shard)
        # Triton's kernels and the events of the flag go to the present device, which need not be the centers'.
        with torch.cuda.device_of(self.centers):
            if self._flag is not None:
                self._ask(self._flag.look, alone=self.shard.world_size == 1)
            # Parameters lose attributes when a module is copied or moved to another storage.
            self.centers.center_state = self.center_state  # type: ignore[attr-defined]
            place = _Place(step_labels, first_sample, global_labels)
            return _SampledSoftmax.apply(embeddings, self.centers, labels, self, place)

    def check(self) -> None:
        """Raise what was wrong with the batches since the last check, where nobody has waited to know: a host read.

        That is a GPU with update="deferred" (docs/head.md). Elsewhere `forward` raises at once, and nothing is read.

        Raises:
            InputError: a label was out of range (on all ranks alike).
            NonFiniteEmbeddings: NaN or infinity among the embeddings of any rank.
        """
        if self._flag is not None:
            self._ask(self._flag.check)

    def _ask(self, question: Callable[..., None], **options: bool) -> None:
        """Let the flag raise what it knows: what waits for the optimizer is void then."""
        try:
            question(**options)
        except InputError:
            self.center_state.deferred.clear()
            raise


@dataclass(frozen=True)
class _Place:
    """What a micro-step must know of the optimizer step it is part of."""

    step_labels: Tensor | None
    first: int
    global_labels: GlobalLabels | None


@dataclass(frozen=True)
class _Step:
    """One forward pass; `bad` is () bool where a flag says that nothing of it may be used, None where that raises."""

    counts: list[int]
    bad: Tensor | None
    unit_embeddings: Tensor
    norms: Tensor
    batch: softmax.ShardBatch
    targets: TargetTerms
    path: softmax.Path
    negatives: softmax.NegativeSums
    terms: softmax.LossTerms


def _check_batch(head: PartialFC, embeddings: Tensor, labels: Tensor, on_device: bool) -> Tensor | None:
    """Refuse a bad global batch at once, or without a host read: () bool, whether it is bad, for what follows."""
    if not on_device:
        raise_bad_input(embeddings, labels, head.num_classes, head.step)
        return None
    device = embeddings.device
    if head._flag is None or head._flag.state.device != device:
        head._flag = InputFlag(head.num_classes, device)
        head.center_state.flag = head._flag.state[:1]
    return head._flag.record(embeddings, labels, head.center_state.counter(device))


def _sample(
    head: PartialFC, labels: Tensor, step_labels: Tensor | None, on_device: bool
) -> tuple[Tensor, Tensor | None]:
    """The classes of the step on this rank, (S,) int64, and () their count on the device if they are padded."""
    positives = labels if step_labels is None else torch.cat([labels, step_labels])
    share: dict[str, Any] = {"num_classes": head.num_classes, "sample_rate": head.sample_rate}
    share |= {"start": head.shard.start, "stop": head.shard.stop}
    if not on_device:
        return sample_classes(positives, seed=head.seed, step=head.step, **share), None
    keys = sampling_keys(head.seed, head.center_state.counter(labels.device))
    sample = sample_padded(positives, keys=keys, **share)
    return sample.padded, sample.count


def _forward(
    head: PartialFC, path: softmax.Path, centers: Tensor, local: tuple[Tensor, Tensor], place: _Place, keep: bool
) -> _Step:
    """Everything before backward, from this rank's embeddings and labels. Five collectives, or three; see `forward`."""
    shard, margin = head.shard, head.margin
    on_device = path.supports_padding and head.update == "deferred" and head.center_state.prepare is None
    global_labels = gather_labels(local[1], place.global_labels, shard.group)
    labels = global_labels.labels.contiguous()
    gathered = start_gather_rows(local[0].contiguous(), global_labels.counts, shard.group)
    classes, count = _sample(head, labels, place.step_labels, on_device)
    embeddings = gathered()  # sampling went on beside it
    bad = _check_batch(head, embeddings, labels, on_device)
    unit_embeddings, norms = normalise_rows(embeddings.double())
    compute_dtype = torch.promote_types(embeddings.dtype, torch.float32)
    if head.center_state.prepare is not None:
        head.center_state.prepare(class_rows(classes - shard.start, margin.sub_centers))
    owned = (labels >= shard.start) & (labels < shard.stop)
    targets = target_terms(centers, unit_embeddings, owned, labels - shard.start, margin)
    target_cosine = all_reduce(targets.cosine.clone(), group=shard.group)
    margin_batch = _margin_batch(head, norms, target_cosine, place.first, bad)
    batch = softmax.ShardBatch(
        embeddings=unit_embeddings.to(compute_dtype),
        classes=classes - shard.start,
        count=count,
        target_places=torch.where(owned, torch.searchsorted(classes, labels), -1),
        target_cosine=target_cosine,
        margin=margin,
        margin_batch=margin_batch,
        scale=head.scale,
        shift=softmax.exponent_shift(head.scale, margin.negatives_bound, head.num_classes),
        conflict_threshold=head.conflict_threshold,
        conflict_as_zero_logit=head.conflict_as_zero_logit,
        operand_dtype=compute_dtype if compute_dtype == torch.float64 else head.operand_dtype,
        scratch=head._scratch,
        scratch_bytes=head.scratch_bytes,
    )
    with record_function("head: negatives"):
        negatives = path.sum_negatives(centers, batch, keep=keep)
    used = torch.full_like(labels[0], len(classes)) if count is None else count
    everything = torch.cat([negatives.sums, torch.stack([negatives.conflicts, used.double()])])
    all_reduce(everything, group=shard.group)
    sums, conflicts, sampled = everything[:-2], everything[-2], everything[-1]
    terms = softmax.loss_terms(sums, target_cosine, margin_batch, margin, head.scale, batch.shift)
    head.figures = HeadFigures(
        target_cosine=target_cosine.mean(),
        conflict_share=conflicts / ((sampled - 1) * len(labels)).clamp_min(1),
        sampled=used,
    )
    return _Step(global_labels.counts, bad, unit_embeddings, norms, batch, targets, path, negatives, terms)


def _margin_batch(
    head: PartialFC, norms: Tensor, target_cosine: Tensor, first_sample: int, bad: Tensor | None
) -> MarginBatch:
    """What the margin sees; in training its running figures take this batch in first, as published margins do."""
    key = keyed_random.derive_key(head.seed, "margin", head.step)
    batch = MarginBatch(norms, key, head.margin_state(), first_sample)
    if not head.training:
        return batch
    state = head.margin.updated_state(target_cosine, batch)
    for name, value in state.items():
        buffer = head.get_buffer(f"margin_{name}")
        buffer.copy_(value if bad is None else torch.where(bad, buffer, value))
    return replace(batch, state=state)


class _SampledSoftmax(torch.autograd.Function):
    """The loss of the global batch with respect to the local embeddings and the local centers."""

    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, centers: Tensor, labels: Tensor, head: PartialFC, place: _Place
    ) -> Tensor:
        # Of several micro-steps that wait for the optimizer only the first keeps anything.
        keep = ctx.needs_input_grad[1] and not head.center_state.deferred
        path = select_backend(centers, embeddings, head.margin)
        with (
            torch.inference_mode(False),  # what is kept from step to step could not be written to outside that mode
            torch.no_grad(),  # which leaving it would end
            torch.autocast(embeddings.device.type, enabled=False),
            single_threaded_if(path.uses_thread_pool),
        ):
            step = _forward(head, path, centers, (embeddings, labels), place, keep)
        ctx.head, ctx.step, ctx.dtype = head, step, embeddings.dtype
        ctx.save_for_backward(centers)
        loss = step.terms.loss.mean().to(step.batch.embeddings.dtype)
        return loss if step.bad is None else loss.masked_fill(step.bad, torch.nan)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        head, step = ctx.head, ctx.step
        (centers,) = ctx.saved_tensors
        factor = loss_gradient.double() / len(step.norms)
        with torch.autocast(centers.device.type, enabled=False), single_threaded_if(step.path.uses_thread_pool):
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
        gradient = gradient * (factor * head.shard.world_size).to(gradient.dtype)
        return gradient if step.bad is None else gradient.masked_fill(step.bad, 0.0)

    return finish


def _centers_gradient(head: PartialFC, step: _Step, factor: Tensor, centers: Tensor) -> Tensor | None:
    """The sampled rows as a sparse tensor, or None where the optimizer will compute them."""
    prepared = softmax.center_gradient(
        step.targets, step.terms, step.batch, step.unit_embeddings, factor, len(centers), step.path, step.negatives.kept
    )
    step.negatives.kept = None  # the loss may outlive the gradient, and would keep the scratch memory
    if head.update == "deferred":
        head.center_state.deferred.append(prepared)
        return None
    prepared = prepared.without_padding()
    rows = prepared.batch.rows(0, len(prepared.batch.classes))
    values = torch.empty(len(rows), centers.shape[1], dtype=centers.dtype, device=centers.device)

    def copy(tile: Tensor, gradient: Tensor) -> None:
        first = int(torch.searchsorted(rows, tile[0]))
        values[first : first + len(tile)] = gradient

    prepared.visit(centers, copy)
    return torch.sparse_coo_tensor(rows[None], values, centers.shape, check_invariants=False)
