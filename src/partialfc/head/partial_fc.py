"""PartialFC: the sharded and sampled margin softmax as an ordinary module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from partialfc.core import keyed_random
from partialfc.core.threads import single_threaded_if
from partialfc.distributed.collectives import Group, Shard, all_reduce, start_gather_rows, start_reduce_scatter_rows
from partialfc.head import inputs
from partialfc.head.backends.base import Backend, CenterGradient, NegativeSums, ScratchBuffer, ShardBatch
from partialfc.head.backends.select import select_backend
from partialfc.head.backends.tile_sizes import SCRATCH_BYTES
from partialfc.head.inputs import GlobalLabels, InputFlag
from partialfc.head.loss import (
    LossConfig,
    class_rows,
    embedding_gradient,
    loss_terms,
    normalise_rows,
    target_center_gradient,
    target_terms,
)
from partialfc.head.margins import CosFace, Margin, MarginBatch
from partialfc.head.rows import CenterState
from partialfc.head.sampling import initial_centers, sample_classes, sample_padded, sampling_keys

Update = Literal["sparse", "deferred"]


@dataclass(frozen=True)
class HeadFigures:
    """Figures of the last forward pass, on the device; `sampled` is this rank's, the others are the same on all ranks.

    Attributes:
        target_cosine: () mean cosine between embeddings and their own class centers.
        conflict_share: () part of the negatives left out as conflicts.
        sampled: () int64, the number of classes that the step used on this rank.
    """

    target_cosine: Tensor
    conflict_share: Tensor
    sampled: Tensor


class PartialFC(nn.Module):
    """Margin-based softmax over sampled classes, sharded by class over the ranks (An et al., CVPR 2022, 2203.15565).

    Never wrap it, or a module that holds it, in DistributedDataParallel or FSDP: each rank owns different rows. Give
    its parameters to `RowwiseSGD` or `RowwiseAdamW`, and those of the backbone to any optimizer.

    Args:
        num_classes: C, over all ranks.
        embedding_dim: D.
        sample_rate: part of the classes that a step uses, in [0, 1]; 0 uses the positives only, 1 all classes.
        margin: `CosFace`, `ArcFace` or another `Margin`.
        scale: s, the factor of every logit.
        conflict_threshold: a negative whose cosine exceeds it is treated as the same person under another label and
            left out of that sample's denominator (PFC*); the paper uses 0.4. None keeps all.
        conflict_as_zero_logit: count such a negative as e^0 instead, as the reference implementation does.
        update: "sparse" leaves a sparse gradient of exactly the sampled rows in `centers.grad`; "deferred" stores no
            gradient, and the optimizer's step computes it tile by tile.
        operand_dtype: bfloat16 rounds the operands of the large products, which CPUs and GPUs with bfloat16 units
            multiply in half the time; sums are float32 at least. float32 does not round.
        seed: initial centers and negatives are functions of it.
        scratch_bytes: limit on the memory for tiles of samples × classes.
        group: the processes that share the classes; None for all.

    Attributes:
        centers: (L × K, D), this rank's rows; K = margin.sub_centers, row = local class × K + sub-center.
        shard: this rank's classes.
        loss_config: the constants of the loss; to change one, assign `dataclasses.replace(head.loss_config, …)`.
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
        margin = CosFace() if margin is None else margin
        inputs.check_head(num_classes, embedding_dim, sample_rate, margin, update)
        self.loss_config = LossConfig(
            num_classes, margin, scale, conflict_threshold, conflict_as_zero_logit, operand_dtype, scratch_bytes
        )
        self.num_classes, self.embedding_dim, self.sample_rate = num_classes, embedding_dim, sample_rate
        self.update: Update = update
        self.seed = seed
        self.shard = Shard.of(num_classes, group)
        rows = self.shard.rows(margin.sub_centers)
        self.centers = nn.Parameter(initial_centers(rows, embedding_dim, seed, device, dtype))
        self.center_state = CenterState(seed, rows.start)
        self.figures: HeadFigures | None = None
        self._scratch = ScratchBuffer()
        self._flag: InputFlag | None = None
        for name, value in margin.initial_state().items():
            self.register_buffer(f"margin_{name}", value.to(device))

    @property
    def step(self) -> int:
        """Optimizer steps taken, which seeds the negatives of a step. Set it when resuming."""
        return self.center_state.step

    @step.setter
    def step(self, value: int) -> None:
        self.center_state.step = value

    def margin_state(self) -> dict[str, Tensor]:
        """The margin's running figures by name, the same on every rank."""
        return {name: self.get_buffer(f"margin_{name}").clone() for name in self.loss_config.margin.initial_state()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, including those that a deferred update has not computed yet."""
        super().zero_grad(set_to_none)
        self.center_state.deferred.clear()

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, embedding_dim={self.embedding_dim}, sample_rate={self.sample_rate}, "
            f"margin={self.loss_config.margin}, scale={self.loss_config.scale}, "
            f"classes={self.shard.start}:{self.shard.stop}, update={self.update!r}"
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

        It takes five collectives, three with `global_labels`, and backward one. At world size W the gradient of the
        embeddings is W times that of the mean loss, because DDP and FSDP average the backbone's gradients over ranks.

        Args:
            embeddings: (B, D) floating point, this rank's, not normalised. B may differ between ranks.
            labels: (B,) int64 class numbers in [0, C).
            step_labels: (n,) int64, the labels of all micro-steps and ranks, the same on all ranks. With them, all
                micro-steps of an accumulated step use the same classes, however the step is split; without, each adds
                its own positives to the shared negatives.
            first_sample: number of samples in the previous micro-steps, over all ranks; it seeds the noise of margins.
            global_labels: sample counts and labels of all ranks, the same on all, if the caller knows them; otherwise
                the ranks exchange them, and the host waits for the result.

        Returns:
            () float64 for float64 embeddings, float32 otherwise.

        Raises:
            InputError: wrong shapes, dtypes or devices, or a label out of range (on all ranks alike).
            NonFiniteEmbeddings: NaN or infinity among the embeddings of any rank.
            On a GPU with update="deferred" the last two refer to an earlier batch; see `check`.
        """
        rows = len(self.shard) * self.loss_config.margin.sub_centers
        inputs.check_not_wrapped(self.centers, rows, self.embedding_dim, getattr(self, "_is_replica", False))
        inputs.check_batch(embeddings, labels, self.centers)
        if global_labels is not None:
            inputs.check_counts(global_labels.counts, len(embeddings), self.shard)
        # Triton's kernels and the flag's events use the current device, which need not be the centers'.
        with torch.cuda.device_of(self.centers):
            if self._flag is not None:
                self._flag.poll(wait=self.shard.world_size > 1)
            # Parameters lose attributes when a module is copied or moved to another storage.
            self.centers.center_state = self.center_state  # type: ignore[attr-defined]
            arguments = step_labels, first_sample, global_labels
            return _SampledSoftmax.apply(embeddings, self.centers, labels, self, *arguments)

    def check(self) -> None:
        """Raise for any bad batch since the last check where validation is deferred: a host read.

        That is on a GPU with update="deferred" (docs/head.md). Elsewhere `forward` raises at once.

        Raises:
            InputError: a label was out of range (on all ranks alike).
            NonFiniteEmbeddings: NaN or infinity among the embeddings of any rank.
        """
        if self._flag is not None:
            self._flag.check()


class _SampledSoftmax(torch.autograd.Function):
    """The loss of the global batch with respect to the local embeddings and the local centers."""

    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, centers: Tensor, labels: Tensor, head: PartialFC, *step_arguments: Any
    ) -> Tensor:
        backend = select_backend(centers, embeddings, head.loss_config.margin)
        # Of several micro-steps that wait for the optimizer only the first keeps weights.
        keep = ctx.needs_input_grad[1] and not head.center_state.deferred
        with (
            torch.inference_mode(False),  # tensors kept from step to step could not be written to outside that mode
            torch.no_grad(),  # leaving inference mode would enable gradients
            torch.autocast(embeddings.device.type, enabled=False),
            single_threaded_if(backend.uses_thread_pool),
        ):
            step = _Step(head, backend, centers, embeddings, labels, keep, *step_arguments)
        ctx.step, ctx.dtype = step, embeddings.dtype
        ctx.save_for_backward(centers)
        loss = step.terms.loss.mean().to(step.batch.embeddings.dtype)
        return loss if step.bad is None else loss.masked_fill(step.bad, torch.nan)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        step: _Step = ctx.step
        (centers,) = ctx.saved_tensors
        factor = loss_gradient.double() / len(step.unit_embeddings)
        with torch.autocast(centers.device.type, enabled=False), single_threaded_if(step.backend.uses_thread_pool):
            embeddings_gradient = step.start_embeddings_gradient(factor)
            with record_function("head: gradient of the centers"):
                centers_gradient = step.centers_gradient(factor, centers) if ctx.needs_input_grad[1] else None
            return embeddings_gradient().to(ctx.dtype), centers_gradient, None, None, None, None, None


class _Step:
    """The forward pass and what its backward needs; arguments as in `PartialFC.forward`.

    Five collectives, or three with `global_labels`. `bad` is () bool where validation is deferred, otherwise None.
    """

    def __init__(
        self,
        head: PartialFC,
        backend: Backend,
        centers: Tensor,
        embeddings: Tensor,
        labels: Tensor,
        keep: bool,
        step_labels: Tensor | None,
        first_sample: int,
        global_labels: GlobalLabels | None,
    ) -> None:
        self.head, self.backend = head, backend
        shard, config, state = head.shard, head.loss_config, head.center_state
        on_device = backend.supports_padding and head.update == "deferred" and state.prepare is None
        global_labels = inputs.gather_labels(labels, global_labels, shard.group)
        self.counts, labels = global_labels.counts, global_labels.labels.contiguous()
        gathered = start_gather_rows(embeddings.contiguous(), self.counts, shard.group)
        classes, count = _sample(head, labels, step_labels, on_device)  # while the embeddings are gathered
        embeddings = gathered()
        self.bad = _check_values(head, embeddings, labels, on_device)
        self.unit_embeddings, norms = normalise_rows(embeddings.double())
        if state.prepare is not None:
            state.prepare(class_rows(classes - shard.start, config.margin.sub_centers))
        owned = (labels >= shard.start) & (labels < shard.stop)
        sub_centers = config.margin.sub_centers
        self.targets = target_terms(centers, self.unit_embeddings, owned, labels - shard.start, sub_centers)
        target_cosine = all_reduce(self.targets.cosine.clone(), group=shard.group)
        self.batch = ShardBatch(
            embeddings=self.unit_embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)),
            classes=classes - shard.start,
            count=count,
            target_positions=torch.where(owned, torch.searchsorted(classes, labels), -1),
            target_cosine=target_cosine,
            margin_batch=_margin_batch(head, norms, target_cosine, first_sample, self.bad),
            config=config,
            scratch=head._scratch,
        )
        with record_function("head: negatives"):
            self.negatives = backend.sum_negatives(centers, self.batch, keep=keep)
        sums = _reduce_sums(head, self.negatives, self.batch)
        self.terms = loss_terms(sums, target_cosine, self.batch.margin_batch, config)

    def start_embeddings_gradient(self, factor: Tensor) -> Callable[[], Tensor]:
        """Start to compute (B, D), times the world size since DDP averages; the result returns it. One collective."""
        shard, terms, unit_embeddings = self.head.shard, self.terms, self.unit_embeddings
        norms = self.batch.margin_batch.norms
        gradient = embedding_gradient(self.negatives.weighted_centers, self.targets, terms, unit_embeddings, norms)
        summed = start_reduce_scatter_rows(gradient, self.counts, shard.group)

        def finish() -> Tensor:
            gradient = summed()
            start = sum(self.counts[: shard.rank])
            own = slice(start, start + len(gradient))
            gradient = gradient + (terms.norm_slope[own, None] * unit_embeddings[own]).to(gradient.dtype)
            gradient = gradient * (factor * shard.world_size).to(gradient.dtype)
            return gradient if self.bad is None else gradient.masked_fill(self.bad, 0.0)

        return finish

    def centers_gradient(self, factor: Tensor, centers: Tensor) -> Tensor | None:
        """The sampled rows as a sparse tensor, or None where the optimizer will compute them."""
        dtype = self.batch.embeddings.dtype
        scaled = self.batch.embeddings * (self.terms.negative_factor * factor).to(dtype)[:, None]
        rows, target = target_center_gradient(self.targets, self.terms, self.unit_embeddings, factor, len(centers))
        gradient = CenterGradient(self.batch, scaled, rows, target.to(dtype), self.backend, self.negatives.kept)
        self.negatives.kept = None  # the loss may outlive the gradient, and would keep the scratch memory in use
        if self.head.update == "deferred":
            self.head.center_state.deferred.append(gradient)
            return None
        gradient = gradient.without_padding()
        rows = gradient.batch.rows(0, len(gradient.batch.classes))
        values = torch.empty(len(rows), centers.shape[1], dtype=centers.dtype, device=centers.device)

        def copy(tile_rows: Tensor, tile: Tensor) -> None:
            first = int(torch.searchsorted(rows, tile_rows[0]))
            values[first : first + len(tile)] = tile

        gradient.visit(centers, copy)
        return torch.sparse_coo_tensor(rows[None], values, centers.shape, check_invariants=False)


def _sample(
    head: PartialFC, labels: Tensor, step_labels: Tensor | None, on_device: bool
) -> tuple[Tensor, Tensor | None]:
    """The classes of the step on this rank, (S,) int64, and () their count on the device if they are padded."""
    positives = labels if step_labels is None else torch.cat([labels, step_labels])
    shard: dict[str, Any] = {"num_classes": head.num_classes, "sample_rate": head.sample_rate}
    shard |= {"start": head.shard.start, "stop": head.shard.stop}
    if not on_device:
        return sample_classes(positives, seed=head.seed, step=head.step, **shard), None
    return sample_padded(positives, keys=sampling_keys(head.seed, head.center_state.counter(labels.device)), **shard)


def _check_values(head: PartialFC, embeddings: Tensor, labels: Tensor, on_device: bool) -> Tensor | None:
    """Refuse a bad global batch at once; or, without a host read, return whether it is bad, () bool."""
    if not on_device:
        inputs.check_values(embeddings, labels, head.num_classes, head.step)
        return None
    device = embeddings.device
    if head._flag is None or head._flag.state.device != device:
        head._flag = InputFlag(head.num_classes, device, head.center_state)
    return head._flag.record(embeddings, labels, head.center_state.counter(device))


def _margin_batch(
    head: PartialFC, norms: Tensor, target_cosine: Tensor, first_sample: int, bad: Tensor | None
) -> MarginBatch:
    """The inputs of the margin; in training its running figures are updated first, as in published margins."""
    key = keyed_random.derive_key(head.seed, "margin", head.step)
    batch = MarginBatch(norms, key, head.margin_state(), first_sample)
    if not head.training:
        return batch
    state = head.loss_config.margin.updated_state(target_cosine, batch)
    for name, value in state.items():
        buffer = head.get_buffer(f"margin_{name}")
        buffer.copy_(value if bad is None else torch.where(bad, buffer, value))
    return replace(batch, state=state)


def _reduce_sums(head: PartialFC, negatives: NegativeSums, batch: ShardBatch) -> Tensor:
    """(G,) float64, Z exp(−shift) over all shards; also sets the head's figures. One collective."""
    sampled = batch.count
    if sampled is None:
        sampled = torch.full((), len(batch.classes), device=batch.classes.device)
    reduced = torch.cat([negatives.sums, torch.stack([negatives.conflicts, sampled.double()])])
    all_reduce(reduced, group=head.shard.group)
    sums, conflicts, all_sampled = reduced[:-2], reduced[-2], reduced[-1]
    head.figures = HeadFigures(
        target_cosine=batch.target_cosine.mean(),
        conflict_share=conflicts / ((all_sampled - 1) * len(sums)).clamp_min(1),
        sampled=sampled,
    )
    return sums
