"""Recipes: complete configurations by name, each derived from another in a few lines.

Scores are those of the papers' own runs on their data: MFR-ALL, IJB-C TAR at FAR 1e-4 and at 1e-5, in percent. None was
reproduced with this package yet. `partialfc recipes NAME` prints command, cost, score and what is our choice.
"""

from __future__ import annotations

import re
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
from partialfc.core.errors import InputError, did_you_mean


def demo() -> TrainConfig:
    """A small network on 80,000 procedural faces of 10,000 identities, sample rate 0.1.

    Command: partialfc demo. Cost: about 5 minutes on 2 CPU cores. Score: docs/demo.md.
    """
    return TrainConfig(
        data=DataConfig(global_batch_size=128, micro_batch_size=128, workers=1),
        backbone=BackboneConfig("mini", 128),
        # For eight images an identity and minutes of training, the published scale of 64 and margin of 0.4 are too
        # stiff.
        head=HeadConfig(sample_rate=0.1, margin="cosface", margin_value=0.1, scale=16.0),
        optimizer=OptimizerConfig(name="adamw", lr=0.002, lr_scaling="absolute", head_lr_factor=2.0, weight_decay=0.05),
        schedule=ScheduleConfig(epochs=3, warmup_epochs=0.2, kind="polynomial", power=1.0),
        output=OutputConfig(log_every=25, keep=1),
    )


def demo_r18() -> TrainConfig:
    """The faces of the demo with an IResNet-18 and a longer schedule.

    Command: partialfc train runs/demo/data/train --recipe demo-r18. Score: docs/demo.md.
    """
    return demo().with_values({"backbone.name": "r18", "backbone.embedding_dim": 512, "schedule.epochs": 12})


def convolutional(name: str, sample_rate: float = 0.1, conflict_threshold: float | None = None) -> TrainConfig:
    """CosFace 0.4 and SGD on 8 GPUs with 128 images each; with a conflict threshold it is PFC*.

    wf12m-r100-pfc0.1: torchrun --nproc-per-node 8 -m partialfc train DATA --recipe wf12m-r100-pfc0.1.
    Cost: 248,439 steps on 8 GPUs. Score: 94.49, 97.56, 95.92.
    wf42m-r200 costs 829,581 steps on 8 GPUs. Score: 97.70, 97.97, 96.93.
    """
    return TrainConfig(
        data=DataConfig(global_batch_size=1024, micro_batch_size=128),
        backbone=BackboneConfig(name),
        head=HeadConfig(sample_rate, margin="cosface", margin_value=0.4, conflict_threshold=conflict_threshold),
        optimizer=OptimizerConfig(
            name="sgd", lr=0.1, lr_scaling="absolute", weight_decay=1e-4 if name == "mbf" else 5e-4, max_grad_norm=5.0
        ),
        schedule=ScheduleConfig(epochs=20, kind="polynomial", power=2.0),
    )


def ms1m(name: str) -> TrainConfig:
    """MS1MV2 and MS1MV3: ArcFace 0.5; MobileFaceNets train for 40 epochs.

    ms1mv3-r50: torchrun --nproc-per-node 8 -m partialfc train DATA --recipe ms1mv3-r50.
    Cost: 101,162 steps on 8 GPUs. No published score in our records.
    """
    epochs = 40 if name == "mbf" else 20
    return convolutional(name).with_values(
        {"head.margin": "arcface", "head.margin_value": 0.5, "schedule.epochs": epochs}
    )


def glint360k(name: str) -> TrainConfig:
    """Glint360K: weight decay 1e-4.

    glint360k-r50: torchrun --nproc-per-node 8 -m partialfc train DATA --recipe glint360k-r50.
    Cost: 333,821 steps on 8 GPUs. No published score in our records.
    """
    return convolutional(name).with_values({"optimizer.weight_decay": 1e-4})


def noisy(sample_rate: float, conflict_threshold: float | None = None) -> TrainConfig:
    """The Conflict and Flip sets: an IResNet-50, two epochs of warm-up.

    wf12m-conflict-r50-pfcstar0.3: torchrun --nproc-per-node 8 -m partialfc train DATA
    --recipe wf12m-conflict-r50-pfcstar0.3. Cost: 248,439 steps on 8 GPUs. Score: 91.68, 97.28, 95.75.
    """
    return convolutional("r50", sample_rate, conflict_threshold).with_values({"schedule.warmup_epochs": 2})


def large_batch(name: str, row: tuple[int, float, float]) -> TrainConfig:
    """WebFace42M by another row of `BATCH_ROWS`, on 8 GPUs up to 2048 images and with 256 images a GPU beyond.

    wf42m-r100-batch8192: torchrun --nproc-per-node 8 --nnodes 4 -m partialfc train DATA
    --recipe wf42m-r100-batch8192. Cost: 103,698 steps on 32 GPUs. No published score in our records.
    """
    batch, lr, warmup_epochs = row
    return convolutional(name, 0.3).with_values(
        {
            "data.global_batch_size": batch,
            "data.micro_batch_size": 256,
            "optimizer.lr": lr,
            "schedule.warmup_epochs": warmup_epochs,
        }
    )


def vit(name: str) -> TrainConfig:
    """WebFace42M with a ViT on 64 GPUs: AdamW, 40 epochs, token mask 0.10 for B and L; H has a row of its own.

    wf42m-vit_l: torchrun --nproc-per-node 8 --nnodes 8 -m partialfc train DATA --recipe wf42m-vit_l.
    Cost: 69,132 steps on 64 GPUs. Score: 97.85, 98.00, 97.23.
    """
    huge = name == "vit_h"
    micro_batch = 768 if huge else 384
    return convolutional(name, 0.5 if huge else 0.3).with_values(
        {
            "data.global_batch_size": micro_batch * 64,
            "data.micro_batch_size": micro_batch,
            "backbone.mask_ratio": 0.1 if name in ("vit_b", "vit_l") else None,
            "backbone.drop_path": 0.05,
            "backbone.checkpointing": name in ("vit_b", "vit_l", "vit_h"),
            "optimizer.name": "adamw",
            "optimizer.lr": 1e-3,
            "optimizer.weight_decay": 0.1,
            "schedule.epochs": 16 if huge else 40,
            "schedule.warmup_epochs": 2 if huge else 4,
        }
    )


# Global batch, learning rate and warm-up epochs of the other published convolutional trainings; 1024 images take 0.1.
BATCH_ROWS: dict[str, tuple[int, float, float]] = {
    "batch2048": (2048, 0.2, 2),
    "batch4096": (4096, 0.3, 1),
    "batch4096-warmup2": (4096, 0.4, 2),
    "batch8192": (8192, 0.6, 4),
}

RECIPES: dict[str, TrainConfig] = {
    "demo": demo(),
    "demo-r18": demo_r18(),
    **{f"{data}-{name}": ms1m(name) for data in ("ms1mv2", "ms1mv3") for name in ("r50", "r100", "mbf")},
    **{f"glint360k-{name}": glint360k(name) for name in ("r50", "r100", "mbf")},
    **{f"wf4m-{name}": convolutional(name) for name in ("r50", "r100", "mbf")},
    **{f"wf12m-r100-pfc{rate:g}": convolutional("r100", rate) for rate in (0.05, 0.1, 0.2, 0.3, 1.0)},
    "wf12m-conflict-r50": noisy(1.0),
    "wf12m-conflict-r50-pfcstar0.3": noisy(0.3, 0.4),
    "wf12m-flip40-r50": noisy(1.0),
    "wf12m-flip40-r50-pfcstar0.1": noisy(0.1, 0.4),
    **{f"wf42m-{name}": convolutional(name, 0.3) for name in ("r100", "r200", "mbf")},
    **{f"wf42m-r100-{row}": large_batch("r100", figures) for row, figures in BATCH_ROWS.items()},
    "wf42m-mbf-batch8192": large_batch("mbf", (8192, 0.4, 2)),
    **{f"wf42m-{name}": vit(name) for name in ("vit_t", "vit_s", "vit_b", "vit_l", "vit_h")},
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

# Hours of the whole training on one H100, over all GPUs: predictions of `partialfc plan` from the data sheet.
_HOURS = """
    ms1mv2-r50 6.29 ms1mv2-r100 9.57 ms1mv2-mbf 6.47 ms1mv3-r50 5.6 ms1mv3-r100 8.52 ms1mv3-mbf 5.75 glint360k-r50
    18.8 glint360k-r100 28.4 glint360k-mbf 9.5 wf4m-r50 4.61 wf4m-r100 7 wf4m-mbf 2.35 wf12m-r100-pfc0.05 21.1
    wf12m-r100-pfc0.1 21.4 wf12m-r100-pfc0.2 22 wf12m-r100-pfc0.3 22.5 wf12m-r100-pfc1 26.5 wf12m-conflict-r50 22.9
    wf12m-conflict-r50-pfcstar0.3 16.4 wf12m-flip40-r50 19.3 wf12m-flip40-r50-pfcstar0.1 14.2 wf42m-r100 88.4
    wf42m-r200 136 wf42m-mbf 39.6 wf42m-r100-batch2048 77.9 wf42m-r100-batch4096 79.5 wf42m-r100-batch4096-warmup2
    79.5 wf42m-r100-batch8192 80 wf42m-mbf-batch8192 30.9 wf42m-vit_t 67 wf42m-vit_s 103 wf42m-vit_b 167 wf42m-vit_l
    305 wf42m-vit_h 420
"""
GPU_HOURS = {name: float(hours) for name, hours in re.findall(r"(\S+)\s+(\S+)", _HOURS)}


def recipe_config(name: str) -> TrainConfig:
    """The configuration of a recipe.

    Raises:
        InputError: unknown name; the sentence offers the nearest.
    """
    if name not in RECIPES:
        hint = did_you_mean(name, RECIPES)
        raise InputError(f"There is no recipe {name!r}; `partialfc recipes` lists them.{hint}")
    return RECIPES[name]


def data_set(name: str) -> tuple[str, int, int] | None:
    """Name, identities and images of a recipe's data; None for procedural faces."""
    # Longer names stand first: wf12m-conflict before wf12m.
    return next((facts for key, facts in DATA_SETS.items() if name.startswith(key + "-")), None)


def describe(name: str) -> dict[str, Any]:
    """Command, data, cost, learning rates, our own choices and expected score of a recipe, as plain values.

    Raises:
        InputError: unknown name.
    """
    config = recipe_config(name)
    facts: dict[str, Any] = {
        "name": name,
        "command": "partialfc demo" if name == "demo" else f"partialfc train DATA --recipe {name}",
        "learning_rate": config.describe_lr(),
        "epochs": config.schedule.epochs,
    }
    data = data_set(name)
    if data is None:
        return facts | {"data": "procedural faces", "score": "see docs/demo.md"}
    gpus = config.data.fewest_processes
    torchrun = f"torchrun --nproc-per-node {min(gpus, 8)} " + (f"--nnodes {gpus // 8} " if gpus > 8 else "")
    score, gpu_hours = SCORES.get(name), GPU_HOURS[name]
    return facts | {
        "command": f"{torchrun}-m {facts['command']}",
        "data": f"{data[0]}: {data[1]:,} identities, {data[2]:,} images",
        "cost": f"{gpus} GPUs, {config.total_steps(data[2]):,} steps",
        "hours": f"{gpu_hours / gpus:.2g} on H100 GPUs, {gpu_hours:.3g} GPU-hours (predicted, not measured)",
        "other_batches": other_batches(config),
        "our_choice": ", ".join(open_values(name)) or "nothing",
        "score": "none published"
        if score is None
        else f"MFR-ALL {score[0]:.2f}, IJB-C 1e-4 {score[1]:.2f}, 1e-5 {score[2]:.2f}",
    }


def other_batches(config: TrainConfig) -> str:
    """The learning rates that go with other global batches."""
    if config.optimizer.name == "adamw":
        return "keep the learning rate, or search for one"
    rows = (f"{batch:,} lr {lr:g} (warm-up {warm_up:g})" for batch, lr, warm_up in BATCH_ROWS.values())
    return "in proportion; published: " + ", ".join(rows)


def open_values(name: str) -> list[str]:
    """The values of a recipe that the published records leave open, so that we chose them."""
    rate_is_published = name.startswith(("wf12m", "wf42m-vit_h", "wf42m-vit_l", "wf42m-r200"))
    values = [] if rate_is_published else ["the sample rate"]
    if "vit" not in name:
        values.append("the number of GPUs" if "batch" in name else "the choice among the published global batches")
    return values
