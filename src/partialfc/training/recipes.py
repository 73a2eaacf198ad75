"""Recipes: complete configurations with a name, each derived from another in a few lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from partialfc.training.config import (
    BackboneConfig,
    DataConfig,
    HeadConfig,
    OptimizerConfig,
    OutputConfig,
    ScheduleConfig,
    TrainConfig,
)


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


RECIPES: dict[str, Callable[[], TrainConfig]] = {"demo": demo, "demo-r18": demo_r18}
