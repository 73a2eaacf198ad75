"""One optimizer step: forward and backward of its micro-steps, then both optimizers, or neither."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from partialfc.config.options import TrainConfig
from partialfc.config.sample_rate import rate_at
from partialfc.core import keyed_random
from partialfc.core.console import counted
from partialfc.core.device import compute_dtype, dtype_name
from partialfc.core.errors import JobError
from partialfc.data.augment import augment
from partialfc.data.loader import Batch, Loader
from partialfc.distributed.activity import activity
from partialfc.distributed.collectives import rank_of, split_evenly, start_gather_rows, world_size_of
from partialfc.distributed.sharded import full_tensor, local_shard
from partialfc.head.inputs import GlobalLabels, NonFiniteEmbeddings
from partialfc.training.nonfinite import Where, locate, scale_gradient
from partialfc.training.replicas import replicated, uses_fsdp, warm_up_ddp_buckets, without_synchronisation
from partialfc.training.schedule import learning_rate
from partialfc.training.state import TrainState
from partialfc.training.weights import set_frozen_layers_eval, update_average

_MAX_SKIPPED_IN_A_ROW = 10


class Stepper:
    """Takes the optimizer steps of one run in one process, on the tensors of its state.

    Args:
        config: what to train.
        state: networks, optimizers and counters; `step` changes all but the count of steps done.
        loader: gives the number of micro-steps and of steps an epoch.
        device: where the networks are.

    Attributes:
        compute_dtype: the backbone's arithmetic: float32, bfloat16, float16 or float64.
        total_steps: of the whole run.
        lr, lr_head: learning rates of the last step.
        skip: why the last step was skipped and for which images, as `locate` returns it; None if it was not skipped.
    """

    def __init__(self, config: TrainConfig, state: TrainState, loader: Loader, device: torch.device) -> None:
        self.config, self.state, self.loader, self.device = config, state, loader, device
        self.compute_dtype = compute_dtype(config.precision, device)
        self.total_steps = config.total_steps(len(loader))
        self.lr = self.lr_head = 0.0
        self.skip: tuple[Where, list[int]] | None = None
        self._skipped_in_a_row = 0
        self._outputs: list[tuple[Tensor, Tensor]] = []
        self._labels = _StepLabels(loader, device)
        self._random_parts = keyed_random.derive_key(config.seed, "backbone's random parts")
        channels_last = config.backbone.channels_last
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        network: nn.Module = state.backbone
        if config.backbone.compile:
            network = torch.compile(network)  # type: ignore[assignment]
        self.network = replicated(network, getattr(torch, config.processes.gradients))
        self._communicates_every_microbatch = uses_fsdp(self.network)
        self._buffers_before = [buffer.clone() for buffer in state.backbone.buffers()]
        warm_up_ddp_buckets(self.network, self._dummy_forward)
        torch._foreach_copy_(list(state.backbone.buffers()), self._buffers_before)

    def describe(self) -> str:
        """The training, in one line."""
        config, loader, first = self.config, self.loader, self.state.done
        start = f"resumed at step {first}" if first else "new run"
        return (
            f"{start}: {config.backbone.name} on {counted(len(loader), 'image')} of {loader.num_classes:,} identities, "
            f"{counted(self.total_steps, 'step')} of {counted(config.data.global_batch_size, 'image')}, "
            f"{config.describe_lr()}, {world_size_of()} x {self.device.type} in {dtype_name(self.compute_dtype)}"
        )

    def on_micro_batch(self, batch: Batch) -> Batch:
        """Called with every micro-batch just before it is computed; what it returns is computed instead.

        Tests and fault benchmarks replace this method to count, interrupt or poison the steps of a run.
        """
        return batch

    def step(self, micro_batches: list[Batch]) -> dict[str, Tensor]:
        """Take one step, and return its figures, none if it was skipped before it had any.

        A gradient that is not finite on any rank is skipped by all, in both optimizers (see `skip`), and no collective
        is needed for that: embeddings that are not finite are seen by all ranks, which gather them. Anything else that
        is not finite on one rank is so in the mean of the ranks' gradients too, and all ranks compute the norm from the
        same bits of that mean (DDP), or by one reduction over their shards of it (FSDP).
        """
        state, step = self.state, self.state.done
        # What draws from torch's own generator draws the same after a resume.
        torch.manual_seed(keyed_random.derive_key(self.config.seed, "step", step, rank_of()))
        self._set_learning_rates(step)
        state.head.step = step
        state.head.sample_rate = rate_at(self.config.head.sample_rate, step, self.total_steps)
        state.backbone.train()
        set_frozen_layers_eval(state.backbone, self.config.backbone.freeze)
        buffers = list(state.backbone.buffers())
        torch._foreach_copy_(self._buffers_before, buffers)
        figures = self._forward_and_backward(micro_batches)
        finite = bool(figures) and bool(torch.isfinite(figures["grad_norm"]))  # the step's only read of the gradient
        if finite:
            state.backbone_optimizer.step()
            state.head_optimizer.step()
            if state.average is not None:
                update_average(state.average, state.backbone, self.config.optimizer.ema_decay, step)
            self.skip, self._skipped_in_a_row = None, 0
        else:
            torch._foreach_copy_(buffers, self._buffers_before)  # BatchNorm has seen values that are not finite
            self.skip, self._skipped_in_a_row = locate(self._outputs), self._skipped_in_a_row + 1
            state.skipped += 1
        if state.loss_scale is not None:
            state.loss_scale.update(finite)
        state.backbone_optimizer.zero_grad()
        state.head_optimizer.zero_grad()
        self._outputs = []
        return figures

    def check_skips(self) -> None:
        """Raise JobError, on all ranks alike, after ten skipped steps in a row; for after the skip is reported."""
        if self._skipped_in_a_row >= _MAX_SKIPPED_IN_A_ROW:
            raise JobError(
                f"{self._skipped_in_a_row} steps in a row, up to step {self.state.done}, had gradients that are not "
                "finite: lower optimizer.lr or check the images that metrics.jsonl names; the checkpoints hold none of "
                "these steps."
            )

    def _set_learning_rates(self, step: int) -> None:
        schedule = self.config.schedule
        self.lr = learning_rate(
            step,
            base=self.config.peak_lr(),
            total_steps=self.total_steps,
            warmup_steps=round(schedule.warmup_epochs * self.loader.steps_per_epoch),
            schedule=schedule.kind,
            power=schedule.power,
        )
        self.lr_head = self.lr * self.config.optimizer.head_lr_factor
        for optimizer, lr in ((self.state.backbone_optimizer, self.lr), (self.state.head_optimizer, self.lr_head)):
            for group in optimizer.param_groups:
                group["lr"] = lr

    def _forward_and_backward(self, micro_batches: list[Batch]) -> dict[str, Tensor]:
        """Leave the gradients of one optimizer step, the backbone's clipped; its figures, none if they are not finite.

        The ranks reduce the backbone's gradient in the last micro-step only, unless it is sharded.
        """
        total = torch.zeros(3, dtype=torch.float64, device=self.device)
        images = self.config.data.global_batch_size
        self._labels.gather(micro_batches)
        for number, batch in enumerate(micro_batches):
            first, last = split_evenly(images, len(micro_batches), number)
            share = (last - first) / images
            synchronise = number == len(micro_batches) - 1
            waits = synchronise or self._communicates_every_microbatch
            try:
                with contextlib.nullcontext() if synchronise else without_synchronisation(self.network):
                    loss = self._loss(self.on_micro_batch(batch))
                    with (
                        record_function("backward pass"),
                        activity("in the backward pass, which exchanges gradients", waits=waits),
                    ):
                        (loss * share).backward()
            except NonFiniteEmbeddings:
                return {}
            head_figures = self.state.head.figures
            if head_figures is not None:
                figures = [loss.detach().double(), head_figures.target_cosine, head_figures.conflict_share]
                total += share * torch.stack(figures)
        norm = self._unscale_and_clip()
        try:
            self.state.head.check()  # here, since the norm is read next in any case
        except NonFiniteEmbeddings:
            return {}
        return {"loss": total[0], "target_cosine": total[1], "conflict_share": total[2], "grad_norm": norm}

    def _unscale_and_clip(self) -> Tensor:
        """Undo the loss scale and clip the backbone's gradient; its norm before clipping, ()."""
        parameters = list(self.state.backbone.parameters())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.state.loss_scale is not None:
            torch._foreach_mul_([local_shard(grad) for grad in gradients], 1.0 / self.state.loss_scale.value)
        norm = full_tensor(torch.nn.utils.get_total_norm(gradients))
        torch.nn.utils.clip_grads_with_norm_(parameters, self.config.optimizer.max_grad_norm or float("inf"), norm)
        return norm

    def _loss(self, batch: Batch) -> Tensor:
        """The mean loss of one micro-step over all ranks, ()."""
        images = batch.images.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        positions = batch.positions.to(self.device, non_blocking=True)
        data = self.config.data
        inputs = augment(images, batch.positions, self.config.seed, flip=data.flip, preset=data.augment)
        output = self._forward(inputs, keyed_random.bits(self._random_parts, positions))
        if output.requires_grad:
            output.retain_grad()  # names the images behind a skipped step
        self._outputs.append((batch.positions, output))
        embeddings = output.to(torch.promote_types(self.compute_dtype, torch.float32))
        if self.state.loss_scale is not None:
            embeddings = scale_gradient(embeddings, self.state.loss_scale.value)
        first, _ = split_evenly(self.config.data.global_batch_size, self.loader.micro_steps, batch.micro_step)
        global_labels = self._labels.of_micro_step(batch.micro_step)
        loss: Tensor = self.state.head(
            embeddings, labels, step_labels=self._labels.of_step(), first_sample=first, global_labels=global_labels
        )
        return loss

    def _forward(self, inputs: Tensor, keys: Tensor) -> Tensor:
        """The backbone's output for normalised images (B, 3, S, S): (B, D), in the dtype of its last layer."""
        is_reduced = self.compute_dtype in (torch.bfloat16, torch.float16)
        input_dtype = torch.promote_types(self.compute_dtype, torch.float32)
        waits = self._communicates_every_microbatch
        with (
            torch.autocast(self.device.type, self.compute_dtype if is_reduced else None, enabled=is_reduced),
            activity("in the forward pass, which exchanges parameters", waits=True)
            if waits
            else contextlib.nullcontext(),
        ):
            output: Tensor = self.network(inputs.to(input_dtype, memory_format=self._memory_format), keys)
        return output

    def _dummy_forward(self) -> Tensor:
        """The output for as many grey images as this rank has in a micro-step; it changes running statistics."""
        images, size = self.loader.counts(0)[rank_of()], self.loader.image_size
        self.state.backbone.train()
        inputs = torch.zeros(images, 3, size, size, device=self.device)
        return self._forward(inputs, torch.arange(images, device=self.device))


class _StepLabels:
    """The labels of a step on all ranks, gathered once for all its micro-steps, while the backbone computes.

    The number of images on each rank is known, so the head need not gather it either.
    """

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self._device = device
        self._counts = [loader.counts(number) for number in range(loader.micro_steps)]
        self._totals = [sum(counts) for counts in zip(*self._counts, strict=True)]

    def gather(self, micro_batches: list[Batch]) -> None:
        """Begin to gather. One collective."""
        labels = torch.cat([batch.labels for batch in micro_batches]).to(self._device, non_blocking=True)
        self._gathered = functools.cache(start_gather_rows(labels, self._totals))

    def of_step(self) -> Tensor | None:
        """The labels of all micro-steps and ranks; None if there is a single micro-step, which has them all."""
        return self._gathered() if len(self._counts) > 1 else None

    def of_micro_step(self, number: int) -> GlobalLabels:
        """The labels of one micro-step on all ranks, in rank order."""
        of_ranks, counts = self._gathered().split(self._totals), zip(*self._counts, strict=True)
        labels = [rank.split(list(parts))[number] for rank, parts in zip(of_ranks, counts, strict=True)]
        return GlobalLabels(self._counts[number], torch.cat(labels))
