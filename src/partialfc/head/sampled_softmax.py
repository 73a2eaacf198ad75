"""One forward and backward pass of a head: the autograd function over the sampled classes, and its parts in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.profiler import record_function

from partialfc.core import keyed_random
from partialfc.core.errors import InputError
from partialfc.core.threads import single_threaded_if
from partialfc.distributed.collectives import all_reduce, start_gather_rows, start_reduce_scatter_rows
from partialfc.head import inputs
from partialfc.head.backends.base import Backend, CenterGradient, NegativeSums, ShardBatch
from partialfc.head.backends.select import select_backend
from partialfc.head.inputs import GlobalLabels, InputFlag
from partialfc.head.loss import (
    class_rows,
    embedding_gradient,
    loss_terms,
    normalise_rows,
    target_center_gradient,
    target_terms,
)
from partialfc.head.margins import MarginBatch
from partialfc.head.sampling import sample_classes, sample_padded

if TYPE_CHECKING:
    from partialfc.head.partial_fc import PartialFC


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


class SampledSoftmax(torch.autograd.Function):
    """The loss of the global batch with respect to the local embeddings and the local centers."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, centers: Tensor, head: PartialFC, *step_arguments: Any) -> Tensor:
        backend = select_backend(centers, embeddings, head.loss_config.margin)
        # Of several micro-steps that wait for the optimizer only the first keeps weights.
        keep = ctx.needs_input_grad[1] and not head.center_state.deferred
        with (
            torch.inference_mode(False),  # tensors kept from step to step could not be written to outside that mode
            torch.no_grad(),  # leaving inference mode would enable gradients
            torch.autocast(embeddings.device.type, enabled=False),
            single_threaded_if(backend.uses_thread_pool),
        ):
            step = _Step(head, backend, centers, embeddings, keep, *step_arguments)
        ctx.step, ctx.dtype = step, embeddings.dtype
        ctx.save_for_backward(centers, embeddings if embeddings.requires_grad else None)
        loss = step.terms.loss.mean().to(step.batch.embeddings.dtype)
        return loss if step.bad is None else loss.masked_fill(step.bad, torch.nan)

    @staticmethod
    @_disable_dynamo  # which would trace into numba's compiler where a compiled step calls backward
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        centers, embeddings = _saved_tensors(ctx)
        gradients: list[Tensor | None] = [*SampledSoftmax._gradients(ctx, loss_gradient, centers)]
        if torch.is_grad_enabled():  # create_graph=True
            gradients = [None if g is None else _Once.apply(g, centers, embeddings, loss_gradient) for g in gradients]
        return *gradients, None, None, None, None

    @staticmethod
    @torch.no_grad()
    def _gradients(ctx: Any, loss_gradient: Tensor, centers: Tensor) -> tuple[Tensor, Tensor | None]:
        step: _Step = ctx.step
        factor = loss_gradient.double() / len(step.unit_embeddings)
        with torch.autocast(centers.device.type, enabled=False), single_threaded_if(step.backend.uses_thread_pool):
            embeddings_gradient = step.start_embeddings_gradient(factor)
            centers_gradient = None
            if not ctx.needs_input_grad[1]:
                step.head.center_state.advance()  # no optimizer's step would draw new negatives
            elif _centers_are_wanted(ctx, step.head):
                with record_function("head: gradient of the centers"):
                    centers_gradient = step.centers_gradient(factor, centers)
            return embeddings_gradient().to(ctx.dtype), centers_gradient


class _Once(torch.autograd.Function):
    """A gradient that has no derivative: the head refuses to be differentiated twice."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor | None) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        raise InputError(
            "PartialFC has no second derivative: leave the head's loss out of what is differentiated twice, such as a "
            "gradient penalty."
        )


def _saved_tensors(ctx: Any) -> tuple[Tensor, Tensor | None]:
    """The centers, and the embeddings if they have a gradient."""
    try:
        centers, embeddings = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise InputError(
            "the head's centers or embeddings were changed between forward and backward: call backward() on all "
            "losses before optimizer.step()."
        ) from error
    return centers, embeddings


def _centers_are_wanted(ctx: Any, head: PartialFC) -> bool:
    """Whether this backward pass adds to `centers.grad` or returns it: not where it has other inputs only."""
    node = ctx.next_functions[1][0]
    returns = "AccumulateGrad" not in node.name()
    try:
        wanted = bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # torch.autograd.grad with the centers among its inputs
        wanted = returns = True
    if wanted and returns and head.update == "deferred":
        raise InputError(
            "update='deferred' has no gradient of the centers for torch.autograd.grad or functional_call: build the "
            "head with update='sparse'."
        )
    return wanted


class _Step:
    """The forward pass and what its backward needs; arguments as in `PartialFC.forward`.

    Three collectives. `bad` is () bool where validation is deferred, otherwise None.
    """

    def __init__(
        self,
        head: PartialFC,
        backend: Backend,
        centers: Tensor,
        embeddings: Tensor,
        keep: bool,
        step_labels: Tensor | None,
        first_sample: int,
        global_labels: GlobalLabels,
    ) -> None:
        self.head, self.backend = head, backend
        shard, config, state = head.shard, head.loss_config, head.center_state
        on_device = backend.supports_padding and head.update == "deferred" and state.prepare is None
        self.counts, labels = global_labels.counts, global_labels.labels.contiguous()
        gathered = start_gather_rows(embeddings.contiguous(), self.counts, shard.group)
        classes, count = sample_step(head, labels, step_labels, on_device)  # while the embeddings are gathered
        embeddings = gathered()
        self.bad = _check_values(head, embeddings, labels, on_device)
        self.unit_embeddings, norms = normalise_rows(embeddings.double())
        if state.prepare is not None:
            state.prepare(class_rows(classes - shard.start, config.margin.sub_centers))
        owned = (labels >= shard.start) & (labels < shard.stop)
        sub_centers = config.margin.sub_centers
        self.targets = target_terms(centers, self.unit_embeddings, owned, labels - shard.start, sub_centers)
        target_cosine = all_reduce(self.targets.cosine.clone(), group=shard.group)
        self.margin_batch = _margin_batch(head, norms, target_cosine, first_sample, self.bad)
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        hard = config.margin.hard_negatives(target_cosine, self.margin_batch)
        self.batch = ShardBatch(
            embeddings=self.unit_embeddings.to(dtype),
            classes=classes - shard.start,
            count=count,
            target_positions=torch.where(owned, torch.searchsorted(classes, labels), -1),
            hard_negatives=None if hard is None else (hard[0].to(dtype), hard[1].to(dtype)),
            config=config,
            scratch=head._scratch,
        )
        with record_function("head: negatives"):
            self.negatives = backend.sum_negatives(centers, self.batch, keep=keep)
        sums = _reduce_sums(head, self.negatives, self.batch, target_cosine, self.margin_batch)
        self.bad = _check_sums(head, sums.sum() + target_cosine.sum(), on_device)
        self.terms = loss_terms(sums, target_cosine, self.margin_batch, config)

    def start_embeddings_gradient(self, factor: Tensor) -> Callable[[], Tensor]:
        """Start to compute (B, D), times the world size since DDP averages; the result returns it. One collective."""
        shard, terms, unit_embeddings = self.head.shard, self.terms, self.unit_embeddings
        norms = self.margin_batch.norms
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

    def _overflows(self, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """() bool, whether the loss scale was too large for the centers' gradient.

        It is the same on all ranks, though each has other rows, so that their GradScalers agree: centers of norm 0.001
        are assumed. Only an even shorter center can overflow by itself.
        """
        terms, scale = self.terms, self.batch.config.scale
        own = terms.target_slope / self.targets.center_norms
        bound = own.new_full((), 1e3 * scale * len(own))
        largest = torch.stack([terms.negative_factor.abs().max(), own.abs().max(), bound]) * factor
        narrower = torch.float64 if dtype == self.batch.embeddings.dtype == torch.float64 else torch.float32
        return ~largest.to(narrower).isfinite().all()

    def centers_gradient(self, factor: Tensor, centers: Tensor) -> Tensor:
        """The sampled rows as a sparse tensor, or what stands for them where the optimizer will compute them."""
        dtype = self.batch.embeddings.dtype
        scaled = self.batch.embeddings * (self.terms.negative_factor * factor).to(dtype)[:, None]
        rows, target = target_center_gradient(self.targets, self.terms, self.unit_embeddings, factor, len(centers))
        gradient = CenterGradient(self.batch, scaled, rows, target.to(dtype), self.backend, self.negatives.kept)
        self.negatives.kept = None  # the loss may outlive the gradient, and would keep the scratch memory in use
        overflow = self._overflows(factor, centers.dtype)
        if self.head.update == "deferred":
            return self.head.center_state.stage(gradient, centers, overflow)
        gradient = gradient.without_padding()
        rows = gradient.batch.rows(0, len(gradient.batch.classes))
        if bool(overflow) and not len(rows) and len(centers):
            rows = torch.zeros(1, dtype=torch.int64, device=rows.device)  # a rank without samples skips the step too
        values = centers.new_empty(len(rows), centers.shape[1])

        def copy(tile_rows: Tensor, tile: Tensor) -> None:
            first = int(torch.searchsorted(rows, tile_rows[0]))
            values[first : first + len(tile)] = tile

        if bool(overflow):
            values.fill_(torch.inf)
        else:
            gradient.visit(centers, copy)
        return torch.sparse_coo_tensor(rows[None], values, centers.shape, check_invariants=False)


def sample_step(
    head: PartialFC, labels: Tensor, step_labels: Tensor | None, on_device: bool
) -> tuple[Tensor, Tensor | None]:
    """The classes of the step on this rank, (S,) int64, and () their count on the device if they are padded."""
    positives = labels if step_labels is None else torch.cat([labels, step_labels])
    options: dict[str, Any] = {"num_classes": head.num_classes, "sampler": head.sampler, "seed": head.seed}
    options["sample_rate"] = head.sample_rate if head.training else 1.0
    options |= {"start": head.shard.start, "stop": head.shard.stop}
    if not (on_device or labels.is_cuda):
        return sample_classes(positives, step=head.step, **options), None
    sample = head._sampling_graph if labels.is_cuda else sample_padded
    classes, count = sample(positives, step=head.center_state.counter(labels.device), **options)
    return (classes, count) if on_device else (classes[: int(count)], None)


def _check_values(head: PartialFC, embeddings: Tensor, labels: Tensor, on_device: bool) -> Tensor | None:
    """Refuse a bad global batch at once; or, without a host read, return whether it is bad, () bool."""
    if not on_device:
        inputs.check_values(embeddings, labels, head.num_classes, head.step)
        return None
    device = embeddings.device
    if head._flag is None or head._flag.state.device != device:
        head._flag = InputFlag(head.num_classes, device, head.center_state)
    return head._flag.record(embeddings, labels, head.center_state.counter(device))


def _check_sums(head: PartialFC, sums: Tensor, on_device: bool) -> Tensor | None:
    """As `_check_values` does for the batch, for the centers, which show in `sums`, ()."""
    if not on_device:
        inputs.check_sums(sums, head.step)
        return None
    assert head._flag is not None
    return head._flag.record_sums(sums, head.center_state.counter(sums.device))


def _margin_batch(
    head: PartialFC, norms: Tensor, target_cosine: Tensor, first_sample: int, bad: Tensor | None
) -> MarginBatch:
    """The inputs of the margin; in training its running figures are updated first, as in published margins."""
    # From the step on the device, which a replayed CUDA graph reads anew.
    (key,) = keyed_random.keys_at(
        [keyed_random.derive_key(head.seed, "margin")], head.center_state.counter(norms.device)
    )
    batch = MarginBatch(norms, key, head.margin_state(), first_sample)
    if not head.training:
        return batch
    state = head.loss_config.margin.updated_state(target_cosine, batch)
    for name, value in state.items():
        buffer = head.get_buffer(f"margin_{name}")
        buffer.copy_(value if bad is None else torch.where(bad, buffer, value))
    return replace(batch, state=state)


def _reduce_sums(
    head: PartialFC, negatives: NegativeSums, batch: ShardBatch, target_cosine: Tensor, margin_batch: MarginBatch
) -> Tensor:
    """(G,) float64, Z exp(−shift) over all shards; also sets the head's figures. One collective."""
    sampled = batch.count
    if sampled is None:
        sampled = torch.full((), len(batch.classes), device=batch.classes.device)
    reduced = torch.cat([negatives.sums, torch.stack([negatives.conflicts, sampled.double()])])
    all_reduce(reduced, group=head.shard.group)
    sums, conflicts, all_sampled = reduced[:-2], reduced[-2], reduced[-1]
    if batch.hard_negatives is not None and batch.config.conflict_threshold is None:
        # The exponentials of all negatives underflow. Beside the target's that is nothing, unless it is as small.
        is_small = batch.config.margin.target(target_cosine, margin_batch) < batch.config.smallest_target
        sums = sums.masked_fill((sums == 0) & (all_sampled > 1) & is_small, torch.nan)
    head.figures = HeadFigures(
        target_cosine=target_cosine.mean(),
        conflict_share=conflicts / ((all_sampled - 1) * len(sums)).clamp_min(1),
        sampled=sampled,
    )
    return sums
