"""The configuration of a training run: one frozen dataclass a component; a field's docstring is its help text."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
import yaml

from partialfc.backbones import create_backbone
from partialfc.backbones.sync_batch_norm import synchronise_batch_norm
from partialfc.core.errors import InputError
from partialfc.head.margins.base import ArcFace, CosFace, Margin
from partialfc.head.partial_fc import PartialFC
from partialfc.training.weights import freeze

LR_BATCH = 512


@dataclass(frozen=True)
class DataConfig:
    """Training images and the order they are seen in."""

    path: str = ""
    """A folder with a .rec file, a .rec file, or a folder of one folder an identity."""
    global_batch_size: int = 128
    """Images an optimizer step takes, over all processes."""
    micro_batch_size: int = 128
    """The most images a process holds at once; smaller than its share means accumulation."""
    micro_steps: int | None = None
    """Parts a step is cut into, one after the other; null takes as few as micro_batch_size allows, and 1 with
    backbone.sync_batch_norm. A fixed number lets more or fewer processes go on with the very same run."""
    workers: int = 2
    """Reading processes beside each training process; 0 reads in the training process."""
    flip: bool = True
    """Mirror every other image, drawn anew each epoch."""
    color_order: Literal["rgb", "bgr"] = "rgb"
    """The order of the channels in the stored images."""
    min_images: int = 0
    """Identities with fewer images are left out, and the others renumbered; 0 keeps all."""
    num_classes: int | None = None
    """Classes of the head; null takes them from the data."""
    max_unreadable: int | None = None
    """Unreadable images that are skipped before the run stops; null means a thousandth of the set, at least 10."""


@dataclass(frozen=True)
class BackboneConfig:
    """The network from images to embeddings."""

    name: str = "r50"
    """Its name, such as r18, r50, r100 or mini."""
    embedding_dim: int = 512
    """Width of the embedding."""
    dropout: float | None = None
    """IResNet and others that know it: share of the features dropped in training; null leaves it to the network."""
    mask_ratio: float | None = None
    """ViT: share of the tokens left out in training; null leaves it to the network."""
    drop_path: float | None = None
    """ViT: the largest rate at which a residual branch is left out for an image; null leaves it to the network."""
    checkpointing: bool = False
    """Compute activations again in the backward pass rather than keep them: less memory, more time."""
    init: str | None = None
    """Start from the weights of this model folder or run folder; null is fresh weights, or those of head.from_run."""
    freeze: list[str] = field(default_factory=list)
    """Layers or parameters that keep their weights, by name, such as conv1 or layer1."""
    channels_last: bool = True
    """Keep the weights of convolutions with the channels last, which is quicker."""
    sync_batch_norm: bool = False
    """Normalise over the images of all processes, so that the run is the same at any number of them."""
    compile: bool = False
    """Compile the network with torch.compile; needs a C++ compiler on a CPU, and pays in long runs."""

    def options(self) -> dict[str, Any]:
        """The options of the network itself, those that are set."""
        chosen = {
            "dropout": self.dropout,
            "mask_ratio": self.mask_ratio,
            "drop_path": self.drop_path,
            "checkpointing": self.checkpointing or None,
        }
        return {name: value for name, value in chosen.items() if value is not None}


@dataclass(frozen=True)
class HeadConfig:
    """The sampled margin softmax."""

    sample_rate: float = 0.1
    """Part of the classes that a step uses: 0 for positives only, 1 for all."""
    margin: Literal["cosface", "arcface", "none"] = "cosface"
    """Which margin the target class gets."""
    margin_value: float | None = None
    """The margin: a cosine for cosface (null is 0.4), radians for arcface (null is 0.5)."""
    margin_gradient: Literal["exact", "straight_through"] = "exact"
    """ArcFace only: the exact gradient, or 1 as in the reference implementation."""
    scale: float = 64.0
    """What cosines are multiplied with before the softmax."""
    conflict_threshold: float | None = None
    """Leave out negatives with a cosine above it, as the same person under another label; the paper uses 0.4."""
    conflict_as_zero_logit: bool = False
    """Count such negatives with logit 0, as the reference implementation does."""
    update: Literal["sparse", "deferred"] = "sparse"
    """Store the gradient of the sampled rows, or compute it inside the optimizer's step."""
    operand_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the operands of the large products are rounded to; bfloat16 is about twice as fast where there are units."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """How centers are stored; bfloat16 is rounded stochastically and takes half the memory."""
    state_dtype: Literal["float32", "bfloat16"] | None = None
    """How their momentum or averages are stored; null for as the centers."""
    state_on_host: bool = False
    """Keep momentum or averages of centers on a GPU in page-locked host memory."""
    unsampled: Literal["freeze", "lazy_dense"] = "freeze"
    """What a step does to centers that it does not sample: nothing, or what dense SGD would do (SGD only)."""

    from_run: str | None = None
    """Run folder whose centers are kept for the identities that it knows, and its backbone unless backbone.init is set;
    its identities that are not in the data are dropped."""
    new_centers: Literal["mean", "random"] = "mean"
    """With from_run: new identities start from the mean of their embeddings, or at random."""

    def build_margin(self) -> Margin:
        """The margin object; InputError for an impossible value."""
        if self.margin == "arcface":
            return ArcFace(0.5 if self.margin_value is None else self.margin_value, self.margin_gradient)
        if self.margin == "cosface":
            return CosFace(0.4 if self.margin_value is None else self.margin_value)
        return Margin()


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer of backbone and head."""

    name: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    lr: float = 0.05
    """Peak learning rate."""
    lr_scaling: Literal["per_512", "absolute"] = "per_512"
    """Whether lr is for 512 images of global batch, and grows in proportion, or holds as it stands."""
    head_lr_factor: float = 1.0
    """The head's learning rate over the backbone's."""
    momentum: float = 0.9
    """SGD only."""
    weight_decay: float = 5e-4
    """Weight decay of backbone and sampled centers."""
    max_grad_norm: float = 5.0
    """The backbone's gradient is scaled down to this norm; 0 for never."""
    ema_decay: float = 0.0
    """Evaluate and save the moving average of the backbone's weights with this decay, such as 0.9999; 0 for none."""
    fused: bool = False
    """Use PyTorch's fused update of the backbone."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Length of the run and course of the learning rate."""

    epochs: float = 20.0
    """Passes over the data."""
    warmup_epochs: float = 0.0
    """Linear rise at the start."""
    kind: Literal["polynomial", "cosine", "constant"] = "polynomial"
    """How it falls afterwards."""
    power: float = 2.0
    """Exponent of the polynomial."""


@dataclass(frozen=True)
class ProcessesConfig:
    """How several processes work together."""

    timeout_seconds: float = 600.0
    """How long a process may be at one thing without progress, waiting for others included, before the run fails."""
    heartbeat_timeout_seconds: float = 30.0
    """How long a process may give no sign of life before it is taken for dead and the run fails."""
    backbone: Literal["ddp", "fsdp"] = "ddp"
    """Each process holds all of the backbone, or a part of it and of its optimizer's state (FSDP2), for large ones."""
    gradients: Literal["float32", "bfloat16"] = "float32"
    """What the backbone's gradients are exchanged in; bfloat16 halves the traffic and rounds them."""


@dataclass(frozen=True)
class OutputConfig:
    """What a run writes, and how often."""

    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    evaluate_every: int = 0
    """Steps between evaluations; 0 is once an epoch. There is always one at the end."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 is once an epoch. There is always one at the end."""
    checkpoint_minutes: float = 0.0
    """Also a checkpoint whenever so many minutes have passed since the last; 0 is never."""
    checkpoint_async: bool = True
    """Write checkpoints beside the training, from a copy in host memory; false holds the training up instead."""
    on_checkpoint_error: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be written, as on a full disk: stop, or log it and train on."""
    keep: int = 2
    """Checkpoints kept."""
    tensorboard: bool = False
    """Write the figures for TensorBoard too, into the run folder; needs the extra tensorboard."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Write them for Weights & Biases too; offline stays on this machine. Needs the extra wandb."""
    profile_steps: str | None = None
    """Steps to record a trace of, such as 10:15, counted from 0; it goes into the run folder."""


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    data: DataConfig = field(default_factory=DataConfig)
    """Training images."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """Network."""
    head: HeadConfig = field(default_factory=HeadConfig)
    """Softmax."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Length and learning rate."""
    processes: ProcessesConfig = field(default_factory=ProcessesConfig)
    """Working together."""
    output: OutputConfig = field(default_factory=OutputConfig)
    """What is written."""
    seed: int = 0
    """Initial weights, order, augmentation and sampled classes are functions of it."""
    precision: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Arithmetic of the backbone; auto is bfloat16 where the processor multiplies it faster, and float32 elsewhere.
    float64 is for proofs: weights, centers and all arithmetic."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU if there is one."""

    def check(self) -> None:
        """Raise InputError, naming the key, for values that no run can have."""
        at_least = [
            ("data.global_batch_size", self.data.global_batch_size, 1),
            ("data.micro_batch_size", self.data.micro_batch_size, 1),
            ("data.micro_steps", self.data.micro_steps, 1),
            ("data.workers", self.data.workers, 0),
            ("data.min_images", self.data.min_images, 0),
            ("data.num_classes", self.data.num_classes, 1),
            ("data.max_unreadable", self.data.max_unreadable, 0),
            ("backbone.embedding_dim", self.backbone.embedding_dim, 1),
            ("optimizer.lr", self.optimizer.lr, 0),
            ("optimizer.head_lr_factor", self.optimizer.head_lr_factor, 0),
            ("optimizer.weight_decay", self.optimizer.weight_decay, 0),
            ("optimizer.max_grad_norm", self.optimizer.max_grad_norm, 0),
            ("schedule.warmup_epochs", self.schedule.warmup_epochs, 0),
            ("schedule.power", self.schedule.power, 0),
            ("processes.timeout_seconds", self.processes.timeout_seconds, 10),
            ("processes.heartbeat_timeout_seconds", self.processes.heartbeat_timeout_seconds, 5),
            ("output.log_every", self.output.log_every, 1),
            ("output.evaluate_every", self.output.evaluate_every, 0),
            ("output.checkpoint_every", self.output.checkpoint_every, 0),
            ("output.checkpoint_minutes", self.output.checkpoint_minutes, 0),
            ("output.keep", self.output.keep, 1),
        ]
        for key, value, least in at_least:
            if value is not None and not value >= least:
                raise InputError(f"{key} is {value}; it must be at least {least}.")
        _check_finite(self.to_dict())
        if self.data.micro_steps is not None and self.data.micro_steps > self.data.global_batch_size:
            raise InputError(
                f"data.micro_steps is {self.data.micro_steps}, more than the {self.data.global_batch_size} images of "
                "data.global_batch_size: take fewer."
            )
        if not self.data.path:
            raise InputError("data.path is missing: give the training images with --data.path.")
        self._check_backbone()
        if not 0 <= self.head.sample_rate <= 1:
            raise InputError(f"head.sample_rate is {self.head.sample_rate}; it is a part, from 0 to 1.")
        if not 0 <= self.optimizer.momentum < 1:
            raise InputError(f"optimizer.momentum is {self.optimizer.momentum}; it must lie in [0, 1).")
        if not self.schedule.epochs > 0:
            raise InputError(f"schedule.epochs is {self.schedule.epochs}; it must be more than 0.")
        if self.schedule.warmup_epochs > self.schedule.epochs:
            raise InputError(
                f"schedule.warmup_epochs is {self.schedule.warmup_epochs}, more than the {self.schedule.epochs} epochs "
                "of the run: shorten it."
            )
        if not 0 <= self.optimizer.ema_decay < 1:
            raise InputError(f"optimizer.ema_decay is {self.optimizer.ema_decay}; it must lie in [0, 1).")
        head = self.head
        if head.unsampled == "lazy_dense" and self.optimizer.name != "sgd":
            raise InputError("head.unsampled is lazy_dense, which is made up for exactly with optimizer.name sgd only.")
        # The head's own checks, on one of a single class.
        PartialFC(1, 1, head.sample_rate, head.build_margin(), head.scale, head.conflict_threshold, update=head.update)
        parse_steps(self.output.profile_steps)
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Refuse options that contradict each other or would do nothing."""
        head, backbone = self.head, self.backbone
        starts = backbone.init is not None or head.from_run is not None
        refused = {
            "backbone.freeze keeps layers as they start, at random: give backbone.init or head.from_run too": (
                bool(backbone.freeze) and not starts
            ),
            "head.conflict_as_zero_logit needs head.conflict_threshold: set it, to 0.4 for example": (
                head.conflict_as_zero_logit and head.conflict_threshold is None
            ),
            "head.margin_gradient straight_through is for the margin arcface: choose that, or exact": (
                head.margin_gradient != "exact" and head.margin != "arcface"
            ),
            "head.margin_value is set, but head.margin is none: leave one out": (
                head.margin_value is not None and head.margin == "none"
            ),
            "data.min_images renumbers the classes and data.num_classes counts them: leave one out": (
                self.data.min_images > 0 and self.data.num_classes is not None
            ),
        }
        refused |= {
            "backbone.compile cannot compile the exchange of backbone.sync_batch_norm: leave one out": (
                backbone.compile and backbone.sync_batch_norm
            ),
            "backbone.compile does not go together with processes.backbone fsdp: leave one out": (
                backbone.compile and self.processes.backbone == "fsdp"
            ),
            "precision float64 is for proofs, and processes.gradients bfloat16 rounds: leave one out": (
                self.precision == "float64" and self.processes.gradients != "float32"
            ),
            "precision float64 sets the head too: leave head.dtype, head.state_dtype and head.operand_dtype out": (
                self.precision == "float64"
                and (head.dtype != "float32" or head.state_dtype is not None or head.operand_dtype != "float32")
            ),
        }
        for sentence, applies in refused.items():
            if applies:
                raise InputError(sentence + ".")

    def _check_backbone(self) -> None:
        """Build the network without numbers, at the usual image size: that refuses its unknown options and values."""
        chosen = self.backbone
        with torch.device("meta"):
            network = create_backbone(chosen.name, embedding_dim=chosen.embedding_dim, **chosen.options())
        if chosen.sync_batch_norm:
            synchronise_batch_norm(network)
        freeze(network, chosen.freeze)

    def micro_steps(self) -> int | None:
        """The parts a step is cut into, None for as few as fit: batch statistics belong to a part."""
        if self.data.micro_steps is None and self.backbone.sync_batch_norm:
            return 1
        return self.data.micro_steps

    def peak_lr(self) -> float:
        """The learning rate at the top of the schedule for this global batch."""
        if self.optimizer.lr_scaling == "absolute":
            return self.optimizer.lr
        return self.optimizer.lr * self.data.global_batch_size / LR_BATCH

    def describe_lr(self) -> str:
        """The rule behind `peak_lr`, in words."""
        if self.optimizer.lr_scaling == "absolute":
            rule = "in proportion for another" if self.optimizer.name == "sgd" else "no rule is published for another"
            return f"lr {self.peak_lr():g} for a global batch of {self.data.global_batch_size:,} ({rule})"
        return (
            f"lr {self.peak_lr():g} = {self.optimizer.lr:g} x global batch {self.data.global_batch_size} / {LR_BATCH}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values."""
        return asdict(self)

    def to_yaml(self) -> str:
        """YAML that `--config` takes back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def _check_finite(values: dict[str, Any], prefix: str = "") -> None:
    """Refuse infinity and NaN, which YAML has and a checkpoint, in JSON, has not."""
    for key, value in values.items():
        if isinstance(value, dict):
            _check_finite(value, f"{prefix}{key}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{prefix}{key} is {value}; it must be a finite number.")


def parse_steps(text: str | None) -> range:
    """The steps of "first:stop" (output.profile_steps), none for None.

    Raises:
        InputError: the text is not such a range.
    """
    if text is None:
        return range(0)
    first, colon, stop = text.partition(":")
    if not (colon and first.isdecimal() and stop.isdecimal() and int(first) < int(stop)):
        raise InputError(
            f"output.profile_steps is {text!r}; write the first step and the one after the last, as in 10:15."
        )
    return range(int(first), int(stop))


# Keys that may differ between a run and its continuation: they change where, how fast and how often, not what.
FREE_KEYS = frozenset(
    {
        "data.path",
        "data.workers",
        "data.max_unreadable",
        "processes.timeout_seconds",
        "processes.heartbeat_timeout_seconds",
        "processes.backbone",
        "output",
        "device",
    }
)
