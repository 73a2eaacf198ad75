"""Recipes: complete configurations with a name, each derived from another in a few lines."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from partialfc.config.options import (
    BackboneConfig,
    DataConfig,
    HeadConfig,
    OptimizerConfig,
    OutputConfig,
    ScheduleConfig,
    TrainConfig,
)
from partialfc.core.errors import InputError
from partialfc.plan.memory import weights_memory
from partialfc.plan.request import PlanRequest


def demo() -> TrainConfig:
    """What `partialfc demo` trains: a small network on 80,000 procedural faces of 10,000 identities, rate 0.1.

    Command: partialfc demo. Cost: about 5 minutes on 2 CPU cores. Score: see docs/demo.md.
    """
    return TrainConfig(
        data=DataConfig(global_batch_size=128, micro_batch_size=128, workers=1),
        backbone=BackboneConfig("mini", 128),
        # Eight images an identity and minutes of training: the published scale of 64 and margin of 0.4 are too stiff.
        head=HeadConfig(sample_rate=0.1, margin="cosface", margin_value=0.1, scale=16.0),
        optimizer=OptimizerConfig(name="adamw", lr=0.002, lr_scaling="absolute", head_lr_factor=2.0, weight_decay=0.05),
        schedule=ScheduleConfig(epochs=3, warmup_epochs=0.2, kind="polynomial", power=1.0),
        output=OutputConfig(log_every=25, keep=1),
    )


def demo_r18() -> TrainConfig:
    """The same faces with an IResNet-18 and a longer schedule."""
    base = demo()
    return replace(
        base,
        backbone=BackboneConfig("r18", 512),
        schedule=replace(base.schedule, epochs=12),
    )


def webface_r50() -> TrainConfig:
    """What the convolutional rows share: IResNet-50, CosFace 0.4, SGD, 8 GPUs with 128 images each."""
    return TrainConfig(
        data=DataConfig(global_batch_size=1024, micro_batch_size=128),
        backbone=BackboneConfig("r50"),
        head=HeadConfig(sample_rate=0.1, margin="cosface", margin_value=0.4, scale=64.0),
        optimizer=OptimizerConfig(name="sgd", lr=0.1, lr_scaling="absolute", weight_decay=5e-4, max_grad_norm=5.0),
        schedule=ScheduleConfig(epochs=20, kind="polynomial", power=2.0),
    )


def with_backbone(base: TrainConfig, name: str) -> TrainConfig:
    """`base` with another network; MobileFaceNets decay less."""
    decay = 1e-4 if name.startswith("mbf") else base.optimizer.weight_decay
    optimizer = replace(base.optimizer, weight_decay=decay)
    return replace(base, backbone=BackboneConfig(name), optimizer=optimizer)


def with_rate(base: TrainConfig, sample_rate: float, conflict_threshold: float | None = None) -> TrainConfig:
    """`base` with another sample rate; with a conflict threshold it is PFC*."""
    return replace(base, head=replace(base.head, sample_rate=sample_rate, conflict_threshold=conflict_threshold))


def ms1m(name: str) -> TrainConfig:
    """MS1MV2 and MS1MV3: ArcFace 0.5; MobileFaceNets train for 40 epochs."""
    base = with_backbone(webface_r50(), name)
    head = replace(base.head, margin="arcface", margin_value=0.5)
    return replace(base, head=head, schedule=replace(base.schedule, epochs=40 if name.startswith("mbf") else 20))


def glint360k(name: str) -> TrainConfig:
    """Glint360K: weight decay 1e-4."""
    base = with_backbone(webface_r50(), name)
    return replace(base, optimizer=replace(base.optimizer, weight_decay=1e-4))


def noisy(sample_rate: float, conflict_threshold: float | None = None) -> TrainConfig:
    """The Conflict and Flip sets: two epochs of warm-up."""
    base = with_rate(webface_r50(), sample_rate, conflict_threshold)
    return replace(base, schedule=replace(base.schedule, warmup_epochs=2))


def large_batch(base: TrainConfig, row: tuple[int, float, float]) -> TrainConfig:
    """`base` by another row of `BATCH_ROWS`, on 8 GPUs up to 2048 images and with 256 images a GPU beyond."""
    batch, lr, warmup_epochs = row
    return replace(
        base,
        data=replace(base.data, global_batch_size=batch, micro_batch_size=256),
        optimizer=replace(base.optimizer, lr=lr),
        schedule=replace(base.schedule, warmup_epochs=warmup_epochs),
    )


def vit(name: str) -> TrainConfig:
    """WebFace42M with a ViT on 64 GPUs: AdamW, 40 epochs, token mask 0.10 for B and L; H as its own row says."""
    large = name in ("vit_b", "vit_l", "vit_h")
    base = with_rate(webface_r50(), 0.3)
    mask = 0.1 if name in ("vit_b", "vit_l") else None
    config = replace(
        base,
        data=replace(base.data, global_batch_size=384 * 64, micro_batch_size=384),
        backbone=BackboneConfig(name, mask_ratio=mask, drop_path=0.05, checkpointing=large),
        optimizer=replace(base.optimizer, name="adamw", lr=1e-3, weight_decay=0.1),
        schedule=replace(base.schedule, epochs=40, warmup_epochs=4),
    )
    if name != "vit_h":
        return config
    return replace(
        with_rate(config, 0.5),
        data=replace(config.data, global_batch_size=768 * 64, micro_batch_size=768),
        schedule=replace(config.schedule, epochs=16, warmup_epochs=2),
    )


# Global batch, learning rate and warm-up epochs of the published convolutional trainings beside 1024 images and 0.1.
BATCH_ROWS: dict[str, tuple[int, float, float]] = {
    "batch2048": (2048, 0.2, 2),
    "batch4096": (4096, 0.3, 1),
    "batch4096-warmup2": (4096, 0.4, 2),
    "batch8192": (8192, 0.6, 4),
}
MOBILE_BATCH_ROW = (8192, 0.4, 2)

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "demo": demo,
    "demo-r18": demo_r18,
    **{f"{data}-{name}": partial(ms1m, name) for data in ("ms1mv2", "ms1mv3") for name in ("r50", "r100", "mbf")},
    **{f"glint360k-{name}": partial(glint360k, name) for name in ("r50", "r100", "mbf")},
    **{f"wf4m-{name}": partial(with_backbone, webface_r50(), name) for name in ("r50", "r100", "mbf")},
    **{
        f"wf12m-r100-pfc{rate:g}": partial(with_rate, with_backbone(webface_r50(), "r100"), rate)
        for rate in (0.05, 0.1, 0.2, 0.3, 1.0)
    },
    "wf12m-conflict-r50": partial(noisy, 1.0),
    "wf12m-conflict-r50-pfcstar0.3": partial(noisy, 0.3, 0.4),
    "wf12m-flip40-r50": partial(noisy, 1.0),
    "wf12m-flip40-r50-pfcstar0.1": partial(noisy, 0.1, 0.4),
    **{
        f"wf42m-{name}": partial(with_rate, with_backbone(webface_r50(), name), 0.3) for name in ("r100", "r200", "mbf")
    },
    **{
        f"wf42m-r100-{row}": partial(large_batch, with_rate(with_backbone(webface_r50(), "r100"), 0.3), figures)
        for row, figures in BATCH_ROWS.items()
    },
    "wf42m-mbf-batch8192": partial(large_batch, with_rate(with_backbone(webface_r50(), "mbf"), 0.3), MOBILE_BATCH_ROW),
    **{f"wf42m-{name}": partial(vit, name) for name in ("vit_t", "vit_s", "vit_b", "vit_l", "vit_h")},
}

# Name, identities (classes of the head) and images, by the start of a recipe's name.
DATA_SETS: dict[str, tuple[str, int, int]] = {
    "ms1mv2": ("MS1MV2", 85_742, 5_822_653),
    "ms1mv3": ("MS1MV3", 93_431, 5_179_510),
    "glint360k": ("Glint360K", 360_232, 17_091_657),
    "wf4m": ("WebFace4M", 205_990, 4_235_242),
    "wf12m-conflict": ("WebFace12M-Conflict", 1_017_970, 12_720_066),
    "wf12m-flip40": ("WebFace12M-Flip40", 617_970, 12_720_066),
    "wf12m": ("WebFace12M", 617_970, 12_720_066),
    "wf42m": ("WebFace42M", 2_059_906, 42_474_557),
}

# MFR-ALL, IJB-C TAR at FAR 1e-4, at 1e-5, in percent.
SCORES: dict[str, tuple[float, float, float]] = {
    "wf12m-r100-pfc0.05": (94.05, 97.51, 95.75),
    "wf12m-r100-pfc0.1": (94.49, 97.56, 95.92),
    "wf12m-r100-pfc0.2": (94.75, 97.60, 95.90),
    "wf12m-r100-pfc0.3": (94.71, 97.64, 96.01),
    "wf12m-r100-pfc1": (94.69, 97.59, 95.97),
    "wf12m-conflict-r50": (79.93, 95.30, 91.56),
    "wf12m-conflict-r50-pfcstar0.3": (91.68, 97.28, 95.75),
    "wf12m-flip40-r50": (43.87, 88.35, 80.78),
    "wf12m-flip40-r50-pfcstar0.1": (80.20, 96.11, 93.79),
    "wf42m-r200": (97.70, 97.97, 96.93),
    "wf42m-vit_l": (97.85, 98.00, 97.23),
}


def recipe_config(name: str) -> TrainConfig:
    """The configuration of a recipe.

    Raises:
        InputError: unknown name; the sentence offers the nearest.
    """
    if name not in RECIPES:
        nearest = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.4)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise InputError(f"There is no recipe {name!r}: choose one of {', '.join(RECIPES)}.{hint}")
    return RECIPES[name]()


def data_set(name: str) -> tuple[str, int, int] | None:
    """Name, identities and images of a recipe's data; None for procedural faces."""
    # The longer names stand first, so that wf12m does not take what belongs to wf12m-conflict.
    return next((each for key, each in DATA_SETS.items() if name.startswith(key + "-")), None)


def describe(name: str) -> dict[str, Any]:
    """Command, data, learning rates, what is our choice, expected score and memory plan of a recipe, as plain values.

    The memory is that of weights, gradients and optimizers on a GPU; `partialfc plan --recipe` plans the whole.

    Raises:
        InputError: unknown name.
    """
    config = recipe_config(name)
    facts: dict[str, Any] = {
        "name": name,
        "command": "partialfc demo" if name == "demo" else f"partialfc train --recipe {name} --data.path PATH",
        "learning_rate": config.describe_lr(),
        "epochs": config.schedule.epochs,
    }
    data = data_set(name)
    if data is None:
        return facts | {"data": "procedural faces", "score": "see docs/demo.md", "memory": None}
    gpus = config.data.global_batch_size // config.data.micro_batch_size
    torchrun = f"torchrun --nproc-per-node {min(gpus, 8)} " + (f"--nnodes {gpus // 8} " if gpus > 8 else "")
    score = SCORES.get(name)
    return facts | {
        "command": f"{torchrun}-m partialfc train --recipe {name} --data.path PATH",
        "data": f"{data[0]}: {data[1]:,} identities, {data[2]:,} images",
        "cost": f"{gpus} GPUs, {int(config.schedule.epochs * data[2] / config.data.global_batch_size):,} steps",
        "other_batches": other_batches(config),
        "our_choice": ", ".join(open_values(name)) or "nothing",
        "score": "no published figure in our records"
        if score is None
        else f"MFR-ALL {score[0]:.2f}, IJB-C 1e-4 {score[1]:.2f}, 1e-5 {score[2]:.2f}",
        "memory": plan_memory(config, data[1], gpus),
    }


def other_batches(config: TrainConfig) -> str:
    """Which learning rate goes with another global batch."""
    if config.optimizer.name == "adamw":
        return "no rule published: keep the learning rate, or search"
    rows = (f"{batch:,} lr {lr:g} (warm-up {warm_up:g})" for batch, lr, warm_up in BATCH_ROWS.values())
    return "in proportion; published: " + ", ".join(rows)


def open_values(name: str) -> list[str]:
    """What the published records leave open for a recipe, so that its value is a choice of ours."""
    convolutional = "vit" not in name
    rate = not (name.startswith(("wf12m", "wf42m-vit_h", "wf42m-vit_l")) or name in ("wf42m-r200",))
    batch = convolutional and "batch" not in name
    gpus = convolutional and "batch" in name
    return [
        value
        for value, is_open in (
            ("the sample rate", rate),
            ("which of the published global batches", batch),
            ("the number of GPUs", gpus),
        )
        if is_open
    ]


def plan_request(config: TrainConfig, num_classes: int, gpus: int) -> PlanRequest:
    """What `partialfc plan` has to know of a configuration."""
    data, backbone, head = config.data, config.backbone, config.head
    return PlanRequest(
        classes=num_classes,
        gpus=gpus,
        backbone=backbone.name,
        batch_size=min(data.micro_batch_size, -(-data.global_batch_size // gpus)),
        micro_steps=data.micro_steps or -(-data.global_batch_size // (gpus * data.micro_batch_size)),
        sample_rate=head.sample_rate,
        embedding_dim=backbone.embedding_dim,
        precision="auto" if config.precision == "float64" else config.precision,
        optimizer=config.optimizer.name,
        checkpointing=backbone.checkpointing,
        mask_ratio=backbone.mask_ratio,
        ema=config.optimizer.ema_decay > 0,
        head_update=head.update,
        head_operand_dtype=head.operand_dtype,
        head_dtype=head.dtype,
        state_dtype=head.state_dtype,
        state_on_host=head.state_on_host,
        checkpoint_async=config.output.checkpoint_async,
        processes_backbone=config.processes.backbone,
        gradients=config.processes.gradients,
        workers=data.workers,
    )


def recipe_plan_request(name: str) -> PlanRequest:
    """The same of a recipe, on its own data and number of GPUs; `classes` is 0 for procedural faces.

    Raises:
        InputError: unknown name.
    """
    config = recipe_config(name)
    data = data_set(name)
    gpus = max(1, config.data.global_batch_size // config.data.micro_batch_size)
    return plan_request(config, 0 if data is None else data[1], gpus)


def plan_memory(config: TrainConfig, num_classes: int, gpus: int) -> dict[str, int]:
    """Bytes on each of `gpus` for weights, gradients and optimizers; `partialfc plan` adds activations and scratch."""
    plan = {name: size for name, size in weights_memory(plan_request(config, num_classes, gpus)).items() if size}
    return plan | {"total": sum(plan.values())}
