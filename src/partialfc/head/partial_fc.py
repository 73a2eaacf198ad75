"""PartialFC: the sharded and sampled margin softmax as an ordinary module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from partialfc.distributed.collectives import Group, Shard
from partialfc.head import inputs
from partialfc.head.backends.base import ScratchBuffer
from partialfc.head.backends.tile_sizes import SCRATCH_BYTES
from partialfc.head.center_state import CenterState
from partialfc.head.inputs import GlobalLabels, InputFlag
from partialfc.head.loss import LossConfig
from partialfc.head.margins import CosFace, Margin
from partialfc.head.predict import Prediction
from partialfc.head.sampled_softmax import HeadFigures, SampledSoftmax
from partialfc.head.sampling import Sampler, SamplingGraph, initial_centers
from partialfc.head.state_dict import ShardStateDict

Update = Literal["sparse", "deferred"]


class PartialFC(Prediction, ShardStateDict):
    """Margin-based softmax over sampled classes, sharded by class over the ranks (An et al., CVPR 2022, 2203.15565).

    Never wrap it, or a module that holds it, in DistributedDataParallel or FSDP: each rank owns different rows. Give
    its parameters to `RowwiseSGD` or `RowwiseAdamW`, and those of the backbone to any optimizer.

    Args:
        num_classes: C, over all ranks.
        embedding_dim: D.
        sample_rate: part of the classes that a step uses, in [0, 1]; 0 uses the positives only, 1 all classes. The
            attribute may be changed between steps.
        margin: `CosFace`, `ArcFace` or another `Margin` (`partialfc.head.margins`).
        scale: s, the factor of every logit.
        conflict_threshold: a negative whose cosine exceeds it is treated as the same person under another label and
            left out of that sample's denominator (PFC*); the paper uses 0.4. None keeps all.
        sampler: how negatives are drawn: "uniform" as in the paper, "sweep" or "runs"; see `sampling.Sampler`.
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
        sample_rate: float = 0.1,
        margin: Margin | None = None,
        scale: float = 64.0,
        conflict_threshold: float | None = None,
        *,
        sampler: Sampler = "uniform",
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
        inputs.check_head(
            num_classes, embedding_dim, sample_rate, margin, update, sampler, seed, scratch_bytes, dtype, group
        )
        # Numbers of NumPy become those of Python, which a checkpoint can hold.
        num_classes, embedding_dim, sample_rate, scale, conflict_threshold, seed = map(
            inputs.plain, (num_classes, embedding_dim, sample_rate, scale, conflict_threshold, seed)
        )
        margin = inputs.plain_margin(margin)
        self.loss_config = LossConfig(
            num_classes, margin, scale, conflict_threshold, conflict_as_zero_logit, operand_dtype, scratch_bytes
        )
        self.num_classes, self.embedding_dim, self.sample_rate = num_classes, embedding_dim, sample_rate
        self.update: Update = update
        self.sampler: Sampler = sampler
        self.seed = seed
        self.shard = Shard.of(num_classes, group)
        rows = self.shard.rows(margin.sub_centers)
        self.centers = nn.Parameter(initial_centers(rows, embedding_dim, seed, device, dtype))
        self.center_state = CenterState(seed, rows.start, self.shard)
        self.center_state.attach(self.centers)
        self.figures: HeadFigures | None = None
        self._scratch = ScratchBuffer()
        self._sampling_graph = SamplingGraph()
        self._flag: InputFlag | None = None
        self._ranks_agree = False
        self.register_state_dict_pre_hook(_flush)
        for name, value in margin.initial_state().items():
            self.register_buffer(f"margin_{name}", value.to(device))

    @property
    def step(self) -> int:
        """Optimizer steps taken, which seeds the negatives of a step. Set it when resuming."""
        return self.center_state.step

    @step.setter
    def step(self, value: int) -> None:
        self.center_state.step = value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PartialFC:
        """As for any module, but the margin's running figures stay float64."""
        figures = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            if buffer.dtype != figures[name].dtype:
                setattr(self, name, figures[name].to(buffer.device))
        return self

    def margin_state(self) -> dict[str, Tensor]:
        """The margin's running figures by name, the same on every rank."""
        return {name: self.get_buffer(f"margin_{name}").clone() for name in self.loss_config.margin.initial_state()}

    def __getstate__(self) -> dict[str, Any]:
        self.center_state.flush(self.centers)
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.center_state.attach(self.centers)

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, embedding_dim={self.embedding_dim}, sample_rate={self.sample_rate}, "
            f"margin={self.loss_config.margin}, scale={self.loss_config.scale}, "
            f"classes={self.shard.start}:{self.shard.stop}, update={self.update!r}"
        )

    @_disable_dynamo
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

        It takes five collectives, three with `global_labels`, and backward one; the first pass takes two more, which
        compare the ranks' settings. torch.compile breaks its graph here. At world size W the gradient of the
        embeddings is W times that of the mean loss, because DDP and FSDP average the backbone's gradients over ranks.

        In eval mode it is the loss over all classes, whatever the sample rate and the step, and the margin's running
        figures stay as they are; bad input raises at once.

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
            InputError: on all ranks alike: wrong shapes, dtypes or devices (with `global_labels` only on the rank that
                has them), a label out of range, a center without a direction, heads that differ between ranks; no
                optimizer steps the centers.
            NonFiniteEmbeddings: NaN or infinity among the embeddings of any rank.
            On a GPU with update="deferred" errors in values refer to an earlier batch; see `check`.
        """
        inputs.check_shard(self.shard)
        rows = len(self.shard) * self.loss_config.margin.sub_centers
        inputs.check_not_wrapped(self.centers, rows, self.embedding_dim, getattr(self, "_is_replica", False))
        if not self._ranks_agree:
            inputs.check_agreement(self._settings(), self.centers.device, self.shard.group)
            self._ranks_agree = True
        global_labels = inputs.gather_labels(
            embeddings, labels, step_labels, global_labels, self.centers, self.center_state, self.shard
        )
        # Triton's kernels and the flag's events use the current device, which need not be the centers'.
        with torch.cuda.device_of(self.centers):
            if self._flag is not None:
                self._flag.poll(wait=self.shard.world_size > 1)
            if torch.is_grad_enabled() and self.centers.is_leaf:
                self.center_state.attach(self.centers)
                if self.training:  # a validation in the middle of a step is no step
                    self.center_state.before_forward(self.centers, self.update)
            arguments = step_labels, first_sample, global_labels
            loss: Tensor = SampledSoftmax.apply(embeddings, self.centers, self, *arguments)
        if not self.training:
            self.check()
        return loss

    def _settings(self) -> dict[str, Any]:
        """What must be the same on all ranks."""
        config = self.loss_config
        return {
            **{
                name: getattr(self, name)
                for name in ("num_classes", "embedding_dim", "sample_rate", "sampler", "seed", "update")
            },
            **{name: getattr(config, name) for name in ("margin", "scale", "conflict_threshold", "operand_dtype")},
            "conflict_as_zero_logit": config.conflict_as_zero_logit,
            "dtype": self.centers.dtype,
            "head.centers.requires_grad": self.centers.requires_grad,
            "head.step": self.step,
        }

    def check(self) -> None:
        """Raise for any bad batch since the last check where validation is deferred: a host read.

        That is on a GPU with update="deferred" (docs/head.md). Elsewhere `forward` raises at once.

        Raises:
            InputError: a label was out of range (on all ranks alike).
            NonFiniteEmbeddings: NaN or infinity among the embeddings of any rank.
        """
        if self._flag is not None:
            self._flag.check()


def _flush(head: PartialFC, *_: Any) -> None:
    """Saved centers have no updates pending."""
    head.center_state.flush(head.centers)
