"""Small trainings on the fixtures, for the tests of the loop and its options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from partialfc.config.options import (
    BackboneConfig,
    DataConfig,
    HeadConfig,
    OptimizerConfig,
    OutputConfig,
    ScheduleConfig,
    TrainConfig,
)
from partialfc.training.checkpoint.read import Checkpoint, steps_in
from tiny_runs import without_timings
from tiny_runs import write_images as write_images

FIXTURES = Path(__file__).parents[1] / "fixtures"
PAIRS = {"lfw": FIXTURES / "verification" / "lfw.bin"}
timeless = without_timings


def small_config(**changes: Any) -> TrainConfig:
    base = TrainConfig(
        data=DataConfig(path=str(FIXTURES / "insightface"), global_batch_size=10, micro_batch_size=4, workers=0),
        backbone=BackboneConfig("mini", 16),
        head=HeadConfig(sample_rate=0.5, scale=16.0),
        optimizer=OptimizerConfig(lr=0.05, lr_scaling="absolute"),
        schedule=ScheduleConfig(epochs=2, warmup_epochs=0.3),
        output=OutputConfig(log_every=1, checkpoint_every=3, keep=2),
    )
    return replace(base, **changes)


def final_tensors(root: Path) -> dict[str, torch.Tensor]:
    """Everything that the last checkpoint holds."""
    checkpoint = Checkpoint(root / "checkpoints" / f"step-{steps_in(root / 'checkpoints')[-1]:08d}")
    groups = ("backbone", "backbone-optimizer", "backbone-ema")
    tensors = {f"{group}/{key}": value for group in groups for key, value in checkpoint.tensors(group).items()}
    for name, shape in checkpoint.row_shapes.items():
        tensors[f"rows/{name}"] = checkpoint.rows(name, 0, shape[0])
    return tensors


def tiny_config(data: Path, **changes: Any) -> TrainConfig:
    """`small_config` on images of `write_images`."""
    base = small_config(**changes)
    return replace(base, data=replace(base.data, path=str(data)))
