"""The configuration of a training run: a frozen dataclass for each component; a field's docstring is its help."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
import yaml

from partialfc.config.sample_rate import SampleRate, rate_phases
from partialfc.core.errors import InputError
from partialfc.head.sampling import Sampler

MarginName = Literal[
    "cosface", "arcface", "combined", "adaface", "magface", "curricularface", "elasticface", "subcenter", "none"
]
LR_BATCH = 512  # the global batch that lr_scaling "per_512" refers to


@dataclass(frozen=True)
class DataConfig:
    """The training images and how they are batched."""

    path: str = ""
    """A .rec file, a folder that holds one, or a folder with one folder for each identity."""
    global_batch_size: int = 128
    """Images of one optimizer step, over all processes."""
    micro_batch_size: int = 128
    """The most images in a process at once; gradients are accumulated if its share of the step is larger."""
    micro_steps: int | None = None
    """Micro-batches of a step; null is as few as fit. With a fixed number, a run can go on with other processes."""
    workers: int = 2
    """Loader processes for each training process; 0 loads in the training process itself."""
    flip: bool = True
    """Mirror images with probability one half; with false, evaluation adds no embeddings of mirrored images either."""
    augment: Literal["flip", "strong", "masks", "all"] = "flip"
    """Beyond mirroring: nothing (flip), crops, low resolution and light (strong), medical masks, or all and more."""
    color_order: Literal["rgb", "bgr"] = "rgb"
    """Channel order of the stored images."""
    overlay: str | None = None
    """A file of decisions, applied on reading: records with other labels or left out, identities merged or split."""
    min_images: int = 0
    """Leave out identities with fewer images and renumber the others; 0 keeps all."""
    num_classes: int | None = None
    """Classes of the head; null takes their number from the data."""
    max_unreadable: int | None = None
    """Unreadable images to skip before the run stops; null is a thousandth of the set, and at least 10."""

    @property
    def fewest_processes(self) -> int:
        """Processes that hold the global batch at once."""
        return -(-self.global_batch_size // max(1, self.micro_batch_size))


@dataclass(frozen=True)
class BackboneConfig:
    """The network from images to embeddings."""

    name: str = "auto"
    """Name of the network, such as r18, r50, r100, vit_b or mini; auto is r50 on a GPU and mini on a CPU."""
    embedding_dim: int = 512
    """Dimension of the embedding."""
    dropout: float | None = None
    """Dropout rate of the features, for networks that have it, such as IResNet; null is the network's default."""
    mask_ratio: float | None = None
    """ViT: part of the tokens left out in training; null is the network's default."""
    drop_path: float | None = None
    """ViT: the largest drop rate of a residual branch (stochastic depth); null is the network's default."""
    checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them: less memory, more time."""
    init: str | None = None
    """Model folder or run folder whose weights to start from; null is random weights, or those of head.from_run."""
    freeze: list[str] = field(default_factory=list)
    """Names of layers or parameters that are not trained, such as conv1 or layer1."""
    channels_last: bool = True
    """Store the weights of convolutions in channels-last order, which is faster."""
    sync_batch_norm: bool = False
    """Compute batch statistics over all processes, so that the run is the same at any number of them."""
    compile: bool = False
    """Compile the network with torch.compile; on a CPU this needs a C++ compiler. It pays off in long runs."""

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `create_backbone` that are set."""
        options = {
            "dropout": self.dropout,
            "mask_ratio": self.mask_ratio,
            "drop_path": self.drop_path,
            "checkpointing": self.checkpointing or None,
        }
        return {name: value for name, value in options.items() if value is not None}


@dataclass(frozen=True)
class HeadConfig:
    """The sampled margin softmax (Partial FC)."""

    sample_rate: SampleRate = 0.1
    """Fraction of the classes that a step uses, from 0 (positives only) to 1 (all); or [[0.8,0.1],[0.2,1]] for 0.1 in
    the first 80 % of the steps, and then 1."""
    sampler: Sampler = "uniform"
    """Negatives drawn anew in each step, in sweeps over all classes, or in runs of 32 neighbours."""
    margin: MarginName = "cosface"
    """Margin: cosface, arcface, combined, adaface, magface, curricularface, elasticface, subcenter or none."""
    margin_value: float | None = None
    """The margin's m: a cosine for cosface (null is 0.4), an angle in radians for arcface (null is 0.5) and others."""
    margin_options: list[str] = field(default_factory=list)
    """Other options of the margin, such as h=0.333 for adaface or m1=1,m2=0.3,m3=0.2; docs/head.md has all."""
    margin_gradient: Literal["exact", "straight_through"] = "exact"
    """ArcFace and its kin: the exact derivative of the margin, or 1 as in the reference implementation."""
    scale: float = 64.0
    """Factor of the cosines before the softmax."""
    conflict_threshold: float | None = None
    """Leave out negatives with a higher cosine, as the same person under another label (PFC*); the paper uses 0.4."""
    conflict_as_zero_logit: bool = False
    """Keep those negatives with logit 0 instead, as the reference implementation does."""
    update: Literal["sparse", "deferred"] = "sparse"
    """Store the gradient of the sampled centers, or compute it inside the optimizer's step."""
    operand_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the operands of the large products; bfloat16 takes about half the time on hardware that supports it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the centers; bfloat16 takes half the memory and is rounded stochastically."""
    state_dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the optimizer state of the centers; null is the dtype of the centers."""
    state_on_host: bool = False
    """On a GPU, keep the optimizer state of the centers in page-locked host memory."""
    unsampled: Literal["freeze", "lazy_dense"] = "freeze"
    """Centers that a step does not sample: leave them unchanged, or move them as dense SGD would (SGD only)."""
    from_run: str | None = None
    """Run folder whose centers of known identities to keep, and whose backbone unless backbone.init is set."""
    new_centers: Literal["mean", "random"] = "mean"
    """With from_run or backbone.init: start new identities from the mean of their embeddings, or at random."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizers of backbone and head."""

    name: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    lr: float = 0.05
    """Peak learning rate; for a global batch of 512 images, unless optimizer.lr_scaling is absolute."""
    lr_scaling: Literal["per_512", "absolute"] = "per_512"
    """Whether lr is given for a global batch of 512 images and scales in proportion, or is used as it is."""
    head_lr_factor: float = 1.0
    """Learning rate of the head, as a multiple of the backbone's."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """Weight decay of the backbone and of the sampled centers."""
    max_grad_norm: float = 5.0
    """Clip the norm of the backbone's gradient to this value; 0 never clips."""
    ema_decay: float = 0.0
    """Evaluate and save a moving average of the backbone's weights with this decay, such as 0.9999; 0 keeps none."""
    fused: bool = False
    """Use PyTorch's fused optimizer for the backbone."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Length of the run and learning-rate schedule."""

    epochs: float = 20.0
    """Passes over the data."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up."""
    kind: Literal["polynomial", "cosine", "constant"] = "polynomial"
    """Decay of the learning rate after the warm-up."""
    power: float = 2.0
    """Exponent of the polynomial decay."""


@dataclass(frozen=True)
class ProcessesConfig:
    """Training on several processes."""

    timeout_seconds: float = 600.0
    """How long a process may make no progress, waiting for others included, before the run fails."""
    heartbeat_timeout_seconds: float = 30.0
    """How long a process may send no heartbeat before it counts as dead and the run fails."""
    backbone: Literal["ddp", "fsdp"] = "ddp"
    """Replicate the backbone in each process, or shard it and its optimizer state (FSDP2), for large networks."""
    gradients: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which the backbone's gradients are exchanged; bfloat16 halves the traffic and rounds them."""


@dataclass(frozen=True)
class OutputConfig:
    """What a run writes, and how often."""

    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    evaluate_every: int = 0
    """Steps between evaluations; 0 is once per epoch. The run always ends with one."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 is once per epoch. The run always ends with one."""
    checkpoint_minutes: float = 0.0
    """Also write a checkpoint when this many minutes have passed since the last one; 0 is never."""
    checkpoint_async: bool = True
    """Write checkpoints in the background, from a copy in host memory; false pauses training instead."""
    on_checkpoint_error: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be written, such as on a full disk: stop, or log the error and continue."""
    keep: int = 2
    """Number of checkpoints to keep."""
    tensorboard: bool = False
    """Also log to TensorBoard, in the run folder; needs the extra tensorboard."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Also log to Weights & Biases; offline stays on this machine. Needs the extra wandb."""
    profile_steps: str | None = None
    """Steps to profile, such as 10:15, counted from 0; the trace is written into the run folder."""


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    data: DataConfig = field(default_factory=DataConfig)
    """Training images."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """Backbone."""
    head: HeadConfig = field(default_factory=HeadConfig)
    """Head."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Length and learning-rate schedule."""
    processes: ProcessesConfig = field(default_factory=ProcessesConfig)
    """Several processes."""
    output: OutputConfig = field(default_factory=OutputConfig)
    """Logs, evaluations and checkpoints."""
    seed: int = 0
    """Seed of initial weights, sample order, augmentation and sampled classes."""
    precision: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Compute dtype of the backbone; auto is bfloat16 where it is faster, else float32; float64 is for proofs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; auto is a GPU if there is one."""

    def check(self) -> None:
        """Raise InputError, naming the key, for values that no run can have.

        What only the backbone or the head can tell is refused when they are built (`config.build`).
        """
        for key, value in flatten(self.to_dict()).items():
            if isinstance(value, float) and not math.isfinite(value):  # YAML has them; a checkpoint's JSON has not
                raise InputError(f"{key} is {value}; it must be a finite number.")
            least = _AT_LEAST.get(key)
            if least is not None and value is not None and value < least:
                raise InputError(f"{key} is {value}; it must be at least {least}.")
        optimizer, schedule = self.optimizer, self.schedule
        for name, value in (("momentum", optimizer.momentum), ("ema_decay", optimizer.ema_decay)):
            if value >= 1:
                raise InputError(f"optimizer.{name} is {value}; it must lie in [0, 1).")
        if schedule.epochs <= 0:
            raise InputError(f"schedule.epochs is {schedule.epochs}; it must be more than 0.")
        if schedule.warmup_epochs > schedule.epochs:
            many = f"schedule.warmup_epochs is {schedule.warmup_epochs}, more than the {schedule.epochs} epochs"
            raise InputError(f"{many} of the run: shorten it.")
        parse_steps(self.output.profile_steps)
        rate_phases(self.head.sample_rate)
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Refuse options that contradict each other or would do nothing."""
        data, backbone, head = self.data, self.backbone, self.head
        if data.micro_steps is not None and data.micro_steps > data.global_batch_size:
            many = f"data.micro_steps is {data.micro_steps}, more than the {data.global_batch_size} images"
            raise InputError(f"{many} of data.global_batch_size: take fewer.")
        renumbers = "data.min_images" if data.min_images else "data.overlay" if data.overlay is not None else None
        if renumbers is not None and data.num_classes is not None:
            raise InputError(f"{renumbers} renumbers the classes and data.num_classes counts them: leave one out.")
        if backbone.freeze and backbone.init is None and head.from_run is None:
            remedy = "give backbone.init or head.from_run too"
            raise InputError(f"backbone.freeze keeps layers as they start, at random: {remedy}.")
        if backbone.compile and backbone.sync_batch_norm:
            raise InputError("backbone.compile cannot compile the exchange of backbone.sync_batch_norm: leave one out.")
        if backbone.compile and self.processes.backbone == "fsdp":
            raise InputError("backbone.compile does not go together with processes.backbone fsdp: leave one out.")
        if head.conflict_as_zero_logit and head.conflict_threshold is None:
            raise InputError("head.conflict_as_zero_logit needs head.conflict_threshold: set it, to 0.4 for example.")
        if head.unsampled == "lazy_dense" and self.optimizer.name != "sgd":
            raise InputError("head.unsampled lazy_dense is exact for optimizer.name sgd only: choose that, or freeze.")
        if self.precision == "float64" and self.processes.gradients != "float32":
            raise InputError("precision float64 is for proofs, and processes.gradients bfloat16 rounds: leave one out.")
        dtypes = (head.dtype, head.state_dtype, head.operand_dtype)
        if self.precision == "float64" and dtypes != ("float32", None, "float32"):
            keys = "head.dtype, head.state_dtype and head.operand_dtype"
            raise InputError(f"precision float64 sets the head too: leave {keys} out.")

    def micro_steps(self) -> int | None:
        """Micro-batches of a step, None for as few as fit; 1 by default where batch statistics span all of a step."""
        if self.data.micro_steps is None and self.backbone.sync_batch_norm:
            return 1
        return self.data.micro_steps

    def peak_lr(self) -> float:
        """The peak learning rate for this global batch."""
        if self.optimizer.lr_scaling == "absolute":
            return self.optimizer.lr
        return self.optimizer.lr * self.data.global_batch_size / LR_BATCH

    def describe_lr(self) -> str:
        """The rule behind `peak_lr`, in words."""
        if self.optimizer.lr_scaling == "absolute":
            return f"lr {self.peak_lr():g}"
        return (
            f"lr {self.peak_lr():g} = {self.optimizer.lr:g} x global batch {self.data.global_batch_size} / {LR_BATCH}"
        )

    def with_backbone(self, device: str | None = None) -> TrainConfig:
        """This configuration with the network that "auto" stands for on a device; by default that of the run."""
        if self.backbone.name != "auto":
            return self
        has_gpu = torch.cuda.is_available() if (device or self.device) == "auto" else (device or self.device) == "cuda"
        return self.with_values({"backbone.name": "r50" if has_gpu else "mini"})

    def with_values(self, values: Mapping[str, Any]) -> TrainConfig:
        """This configuration with other values for some dotted keys, such as {"head.scale": 30.0}."""
        config = self
        for (section, _, name), value in ((key.rpartition("."), value) for key, value in values.items()):
            part: Any = replace(getattr(config, section) if section else config, **{name: value})
            config = replace(config, **{section: part}) if section else part
        return config

    def total_steps(self, images: int) -> int:
        """Optimizer steps of a training on a set of so many images."""
        return max(1, round(self.schedule.epochs * (images / self.data.global_batch_size)))

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values."""
        return asdict(self)

    def to_yaml(self) -> str:
        """YAML that `--config` takes back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def parse_steps(text: str | None) -> range:
    """The steps of "first:stop" (output.profile_steps), none for None.

    Raises:
        InputError: the text is not such a range.
    """
    if text is None:
        return range(0)
    first, colon, stop = text.partition(":")
    if not (colon and first.isdecimal() and stop.isdecimal() and int(first) < int(stop)):
        raise InputError(f"output.profile_steps is {text!r}: write the first step and the one after the last, 10:15.")
    return range(int(first), int(stop))


_AT_LEAST: dict[str, int] = {
    "data.global_batch_size": 1,
    "data.micro_batch_size": 1,
    "data.micro_steps": 1,
    "data.workers": 0,
    "data.min_images": 0,
    "data.num_classes": 1,
    "data.max_unreadable": 0,
    "backbone.embedding_dim": 1,
    "optimizer.lr": 0,
    "optimizer.head_lr_factor": 0,
    "optimizer.momentum": 0,
    "optimizer.weight_decay": 0,
    "optimizer.max_grad_norm": 0,
    "optimizer.ema_decay": 0,
    "schedule.warmup_epochs": 0,
    "schedule.power": 0,
    "processes.timeout_seconds": 10,
    "processes.heartbeat_timeout_seconds": 5,
    "output.log_every": 1,
    "output.evaluate_every": 0,
    "output.checkpoint_every": 0,
    "output.checkpoint_minutes": 0,
    "output.keep": 1,
}

# Keys that may differ between a run and its continuation: they do not change what is computed.
FREE_KEYS = frozenset(
    {
        "data.path",
        "data.overlay",
        "data.workers",
        "data.max_unreadable",
        "processes.timeout_seconds",
        "processes.heartbeat_timeout_seconds",
        "processes.backbone",
        "output",
        "device",
    }
)
