"""What is planned: the sizes and options of a training that memory and time depend on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from partialfc.backbones import check_backbone
from partialfc.core.errors import InputError
from partialfc.head.backends.select import numba_kernels
from partialfc.head.sampling import sample_size

Device = Literal["v100", "a100", "h100", "h200", "cpu", "cuda"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class PlanRequest:
    """A training to be planned; each field is an option of `partialfc plan`."""

    classes: int = field(default=0, metadata={"help": "identities, the classes of the head; a recipe knows its own"})
    gpus: int = field(default=8, metadata={"help": "processes, one a GPU"})
    backbone: str = field(default="r50", metadata={"help": "name of the network"})
    device: Device = field(
        default="h100",
        metadata={"help": "kind of GPU, from its data sheet; cpu or cuda measures this machine, in less than a minute"},
    )
    batch_size: int = field(default=128, metadata={"help": "images a GPU holds at once"})
    micro_steps: int = field(default=1, metadata={"help": "such batches that make one optimizer step"})
    sample_rate: float = field(default=0.1, metadata={"help": "part of the classes that a step uses"})
    image_size: int = field(default=112, metadata={"help": "side of the images in pixels"})
    embedding_dim: int = field(default=512, metadata={"help": "width of the embedding"})
    precision: Precision = field(
        default="auto",
        metadata={"help": "arithmetic of the backbone; auto is bfloat16 where the device is quick at it"},
    )
    optimizer: Literal["sgd", "adamw"] = field(default="sgd", metadata={"help": "of backbone and head"})
    checkpointing: bool = field(
        default=False, metadata={"help": "compute the backbone's activations again instead of keeping them"}
    )
    mask_ratio: float | None = field(default=None, metadata={"help": "ViT: share of the tokens left out in training"})
    ema: bool = field(default=False, metadata={"help": "keep a moving average of the backbone's weights"})
    head_update: Literal["sparse", "deferred"] = field(
        default="sparse", metadata={"help": "store the gradient of sampled rows, or never"}
    )
    head_operand_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "what the head's products round operands to"}
    )
    head_dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "how centers are stored"})
    state_dtype: Literal["float32", "bfloat16"] | None = field(
        default=None, metadata={"help": "how their momentum is; by default as centers"}
    )
    state_on_host: bool = field(default=False, metadata={"help": "keep their momentum in host memory"})
    checkpoint_async: bool = field(
        default=True, metadata={"help": "checkpoints are written from a copy in host memory"}
    )
    processes_backbone: Literal["ddp", "fsdp"] = field(
        default="ddp", metadata={"help": "each process has all of the backbone, or a part of it (FSDP2)"}
    )
    gradients: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "what the backbone's gradients are exchanged in"}
    )
    workers: int = field(default=4, metadata={"help": "reading processes a GPU"})
    gpus_per_node: int = field(default=8, metadata={"help": "GPUs of one machine; more are joined by the network"})
    gpu_memory: float | None = field(default=None, metadata={"help": "GiB of a GPU; by default what the device has"})

    def check(self) -> None:
        """Raise an InputError, naming the option, for what no training can have."""
        if self.classes == 0:
            raise InputError("--classes is missing: give the number of identities, or a recipe of known data.")
        counts = ("classes", "gpus", "batch_size", "micro_steps", "image_size", "embedding_dim", "gpus_per_node")
        for name in counts:
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1.")
        if self.workers < 0:
            raise InputError(f"--workers is {self.workers}; it must be at least 0.")
        if not 0 <= self.sample_rate <= 1:
            raise InputError(f"--sample-rate is {self.sample_rate}; it is a part of the classes, from 0 to 1.")
        if self.gpu_memory is not None and not self.gpu_memory > 0:
            raise InputError(f"--gpu-memory is {self.gpu_memory}; it is a number of GiB above 0.")
        check_backbone(self.backbone)

    def with_rate(self, sample_rate: float) -> PlanRequest:
        """The same at another sample rate."""
        return replace(self, sample_rate=sample_rate)

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"

    @property
    def local_classes(self) -> int:
        """L, of the rank that owns the most."""
        return -(-self.classes // self.gpus)

    @property
    def gathered(self) -> int:
        """Images of all ranks that the head sees at once."""
        return self.batch_size * self.gpus

    @property
    def sampled(self) -> int:
        """S, classes that a rank uses in a step: its share of the sample, or of the positives where they are more."""
        positives = min(self.classes, self.gathered * self.micro_steps)
        used = max(sample_size(self.classes, self.sample_rate), positives)
        return min(self.local_classes, -(-used // self.gpus))

    @property
    def backbone_parts(self) -> int:
        """Processes that the backbone's weights, gradient and states are spread over."""
        return self.gpus if self.processes_backbone == "fsdp" else 1

    @property
    def states(self) -> int:
        """State tensors of an optimizer for each parameter."""
        return 2 if self.optimizer == "adamw" else 1

    @property
    def center_bytes(self) -> int:
        """Bytes of a center's element."""
        return 2 if self.head_dtype == "bfloat16" else 4

    @property
    def state_bytes(self) -> int:
        """Bytes of an element of momentum or average."""
        return 2 if (self.state_dtype or self.head_dtype) == "bfloat16" else 4

    @property
    def operand_bytes(self) -> int:
        """Bytes of an operand of the head's products."""
        return 2 if self.head_operand_dtype == "bfloat16" else 4

    @property
    def compiled_head(self) -> bool:
        """Whether the compiled loops of the CPU take this head."""
        return self.on_cpu and self.head_dtype == "float32" and numba_kernels() is not None
