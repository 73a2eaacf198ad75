"""Workloads for the tests of the planner, in a few words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from partialfc.config.options import BackboneConfig, DataConfig, TrainConfig
from partialfc.plan.workload import Workload


def workload(classes: int = 10_000, batch_size: int = 8, gpus: int = 1, **options: Any) -> Workload:
    """A mini backbone on images of 32 pixels, 64 dimensions, `batch_size` images a GPU in one micro-step."""
    data = DataConfig(global_batch_size=batch_size * gpus, micro_batch_size=batch_size, workers=4)
    base = Workload(TrainConfig(data, BackboneConfig("mini", 64)), classes, gpus, image_size=32)
    return changed(base, **options)


def changed(base: Workload, **options: Any) -> Workload:
    """`base` with other values: its own fields, or dotted keys of the configuration with `__` for the dot."""
    config = base.config
    for key, value in options.items():
        group, _, name = key.partition("__")
        if name:
            config = replace(config, **{group: replace(getattr(config, group), **{name: value})})
        elif key == "precision":
            config = replace(config, precision=value)
        else:
            base = replace(base, **{key: value})
    return replace(base, config=config)
