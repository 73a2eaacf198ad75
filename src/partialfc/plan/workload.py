"""What is planned: a configuration on a number of GPUs, and the sizes that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch

from partialfc.config.build import build_margin
from partialfc.config.options import TrainConfig
from partialfc.config.sample_rate import rate_phases
from partialfc.core.device import DTYPES, choose_device, compute_dtype
from partialfc.core.errors import InputError
from partialfc.head.backends.select import numba_kernels
from partialfc.head.margins import Margin
from partialfc.head.sampling import sample_size

Device = Literal["v100", "a100", "h100", "h200", "cpu", "cuda"]


@dataclass(frozen=True)
class Workload:
    """A training on processes of one kind, one for each GPU.

    Attributes:
        config: of the training; its `device` is not used.
        classes: C, identities of the data.
        gpus: W.
        device: kind of GPU, or "cpu" or "cuda" for this machine.
        image_size: side of the images in pixels.
        gpus_per_node: GPUs of one machine; more are joined by the network.
        images: of the data, if the whole training is planned.
    """

    config: TrainConfig
    classes: int
    gpus: int
    device: Device = "h100"
    image_size: int = 112
    gpus_per_node: int = 8
    images: int | None = None

    def check(self) -> None:
        """Raise InputError, naming the option, for what no training can have."""
        if self.device not in get_args(Device):
            raise InputError(f"--device is {self.device!r}: choose one of {', '.join(get_args(Device))}.")
        for name in ("classes", "gpus", "image_size", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1.")
        if self.images is not None and self.images < 1:
            raise InputError(f"--images is {self.images}; it must be at least 1.")
        self.config.check()
        if self.config.precision == "float64":
            raise InputError("precision float64 is for proofs and cannot be planned: choose another.")
        if self.micro_steps < self._fewest_micro_steps:
            raise InputError(
                f"{self.config.data.global_batch_size} images on {self.gpus} GPUs that hold at most "
                f"{self.config.data.micro_batch_size} each do not fit {self.micro_steps} micro-steps: raise "
                f"data.micro_batch_size, take more GPUs, or {self._fewest_micro_steps} micro-steps."
            )

    def with_values(self, values: Mapping[str, Any]) -> Workload:
        """The same training with other values for some dotted keys of its configuration."""
        return replace(self, config=self.config.with_values(values))

    def with_rate(self, sample_rate: float) -> Workload:
        """The same training at another sample rate."""
        return self.with_values({"head.sample_rate": sample_rate})

    @cached_property
    def phases(self) -> list[tuple[float, float]]:
        """Of the training: share of the steps and sample rate."""
        return rate_phases(self.config.head.sample_rate)

    @cached_property
    def largest_rate(self) -> float:
        """The largest sample rate of all phases: what memory and the time of a step are planned for."""
        return max(rate for _, rate in self.phases)

    @cached_property
    def margin(self) -> Margin:
        return build_margin(self.config.head)

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the whole training; None if the number of images is unknown."""
        if self.images is None:
            return None
        return self.config.total_steps(self.images)

    @property
    def on_this_machine(self) -> bool:
        return self.device in ("cpu", "cuda")

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"

    @cached_property
    def dtype(self) -> torch.dtype:
        """The backbone's compute dtype; "auto" is what a training on the device takes."""
        if self.config.precision != "auto":
            return DTYPES[self.config.precision]
        if self.on_this_machine:
            return compute_dtype("auto", choose_device(self.device))
        return torch.float32 if self.device == "v100" else torch.bfloat16

    @property
    def _fewest_micro_steps(self) -> int:
        data = self.config.data
        return -(-data.global_batch_size // (self.gpus * data.micro_batch_size))

    @cached_property
    def micro_steps(self) -> int:
        """m, micro-batches of a step."""
        return self.config.micro_steps() or self._fewest_micro_steps

    @cached_property
    def gathered(self) -> int:
        """G, images of all ranks that the head sees at once."""
        return -(-self.config.data.global_batch_size // self.micro_steps)

    @property
    def batch_size(self) -> int:
        """B, images of a micro-batch on the rank that has the most."""
        return -(-self.gathered // self.gpus)

    @property
    def width(self) -> int:
        """D, dimension of the embeddings."""
        return self.config.backbone.embedding_dim

    @property
    def local_classes(self) -> int:
        """L, classes of the rank that owns the most."""
        return -(-self.classes // self.gpus)

    @cached_property
    def sampled(self) -> int:
        """S, classes that a rank uses in a step: its share of the sample, or of the positives where they are more."""
        positives = min(self.classes, self.config.data.global_batch_size)
        used = max(sample_size(self.classes, self.largest_rate), positives)
        return min(self.local_classes, -(-used // self.gpus))

    @property
    def sampled_rows(self) -> int:
        """S K, rows of the sampled classes."""
        return self.sampled * self.margin.sub_centers

    @property
    def backbone_shards(self) -> int:
        """Processes that share the backbone's weights, gradient and states."""
        return self.gpus if self.config.processes.backbone == "fsdp" else 1

    @property
    def states(self) -> int:
        """State tensors of an optimizer for each parameter."""
        return 2 if self.config.optimizer.name == "adamw" else 1

    @property
    def center_bytes(self) -> int:
        return DTYPES[self.config.head.dtype].itemsize

    @property
    def state_bytes(self) -> int:
        return DTYPES[self.config.head.state_dtype or self.config.head.dtype].itemsize

    @property
    def operand_bytes(self) -> int:
        return DTYPES[self.config.head.operand_dtype].itemsize

    @property
    def state_on_host(self) -> bool:
        """Whether the centers' optimizer state lies in the host's memory beside a GPU."""
        return self.config.head.state_on_host and not self.on_cpu

    @property
    def compiled_head(self) -> bool:
        """Whether the compiled kernels of the CPU take this head."""
        return self.on_cpu and self.center_bytes == 4 and self.margin.sub_centers == 1 and numba_kernels() is not None
