"""The same run at 1 and 3 processes, and from 3 resumed at 1: losses, sampled classes and final tensors, in float64.

The long form, with more world sizes, r18 and float32, is benchmarks/elastic.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_workers import run_ranks
from small_runs import final_tensors, interrupt_at, losses, tiny_config, write_images
from torch import Tensor

from partialfc.config.options import BackboneConfig, TrainConfig
from partialfc.head import sampled_softmax
from partialfc.training.loop import train

NETWORKS: dict[str, dict[str, Any]] = {"mini": {}, "vit_t": {"drop_path": 0.2}}
STEPS, STOP = 6, 4


def config_of(name: str, images: Path) -> TrainConfig:
    """6 steps of 11 images in two micro-steps; a process of three may have 1 image, or 2."""
    backbone = BackboneConfig(name, 16, sync_batch_norm=True, **NETWORKS[name])
    config = tiny_config(images, backbone=backbone, precision="float64", device="cpu")
    data = replace(config.data, global_batch_size=11, micro_batch_size=11, micro_steps=2)
    optimizer = replace(config.optimizer, lr=0.01)
    schedule = replace(config.schedule, epochs=STEPS * 11 / 32)
    return replace(config, data=data, optimizer=optimizer, schedule=schedule, output=replace(config.output, keep=9))


def recorded_run(config: TrainConfig, out: Path, stop: int | None = None) -> list[list[int]]:
    """Train, from the last checkpoint on and up to step `stop`; this rank's classes of each micro-step."""
    original, sampled = sampled_softmax.sample_classes, []

    def sample(*arguments: Any, **options: Any) -> Tensor:
        classes: Tensor = original(*arguments, **options)
        sampled.append(classes.tolist())
        return classes

    sampled_softmax.sample_classes = sample
    try:
        with nullcontext() if stop is None else interrupt_at(stop):
            train(config, out, resume=True, quiet=True)
    finally:
        sampled_softmax.sample_classes = original
    return sampled


def on_three(rank: int, folder: Path) -> None:
    sampled = {}
    for name in NETWORKS:
        config = config_of(name, folder / "images")
        sampled[name] = recorded_run(config, folder / f"{name}-3")
        recorded_run(config, folder / f"{name}-3-1", stop=STOP)
    torch.save(sampled, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    write_images(folder / "images", [f"person {number}" for number in range(8)])
    run_ranks(3, on_three, folder)
    return folder


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("name", NETWORKS)
def test_three_processes_and_three_then_one_are_one(folder: Path, name: str) -> None:
    config = config_of(name, folder / "images")
    alone = recorded_run(config, folder / f"{name}-1")
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=True)[name] for rank in range(3)]
    assert len(alone) == 2 * STEPS
    assert [[label for part in parts for label in part] for parts in zip(*ranks, strict=True)] == alone
    assert all(first == second for first, second in zip(alone[::2], alone[1::2], strict=True))  # micro-steps of a step
    recorded_run(config, folder / f"{name}-3-1")
    expected = final_tensors(folder / f"{name}-1")
    curve = losses(folder / f"{name}-1")
    assert len(curve) == STEPS
    for other in (f"{name}-3", f"{name}-3-1"):
        assert losses(folder / other) == pytest.approx(curve, rel=1e-9)
        for key, value in final_tensors(folder / other).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-9, msg=f"{other}: {key}")
