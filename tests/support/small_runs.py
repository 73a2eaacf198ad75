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
from partialfc.core import keyed_random
from partialfc.data.images import encode_png
from partialfc.training.checkpoint.read import Checkpoint, steps_in

FIXTURES = Path(__file__).parents[1] / "fixtures"
PAIRS = {"lfw": FIXTURES / "verification" / "lfw.bin"}


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


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without what depends on the machine's load."""
    passing = ("images_per_second", "data_wait", "peak_bytes")
    return [{key: value for key, value in line.items() if key not in passing} for line in lines]


def final_tensors(root: Path) -> dict[str, torch.Tensor]:
    """Everything that the last checkpoint holds."""
    checkpoint = Checkpoint(root / "checkpoints" / f"step-{steps_in(root / 'checkpoints')[-1]:08d}")
    groups = ("backbone", "backbone-optimizer", "backbone-ema")
    tensors = {f"{group}/{key}": value for group in groups for key, value in checkpoint.tensors(group).items()}
    for name, shape in checkpoint.row_shapes.items():
        tensors[f"rows/{name}"] = checkpoint.rows(name, 0, shape[0])
    return tensors


def write_images(folder: Path, identities: list[str], shots: int = 4, size: int = 16) -> Path:
    """A folder of identity folders; each identity is a coarse pattern, a function of its name, with noise on it."""
    for name in identities:
        (folder / name).mkdir(parents=True)
        pattern = keyed_random.uniform(keyed_random.derive_key(name), torch.arange(48)).view(4, 4, 3)
        pattern = pattern.repeat_interleave(size // 4, 0).repeat_interleave(size // 4, 1)
        for shot in range(shots):
            key = keyed_random.derive_key(name, shot)
            noise = keyed_random.uniform(key, torch.arange(size * size * 3)).view(size, size, 3)
            image = (pattern * 200 + noise * 55).to(torch.uint8)
            (folder / name / f"{shot}.png").write_bytes(encode_png(image.numpy()))
    return folder


def tiny_config(data: Path, **changes: Any) -> TrainConfig:
    """`small_config` on images of `write_images`."""
    base = small_config(**changes)
    return replace(base, data=replace(base.data, path=str(data)))
