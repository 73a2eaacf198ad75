"""Small trainings on the fixtures, and ways to interrupt, poison and count their steps.

What happens to the steps of a run goes through `on_micro_batch`, which replaces the hook of that name of `Stepper`: it
acts on all runs of this process in the block.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from partialfc.checkpoint.read import Checkpoint, steps_in
from partialfc.config.options import (
    BackboneConfig,
    DataConfig,
    HeadConfig,
    OptimizerConfig,
    OutputConfig,
    ScheduleConfig,
    TrainConfig,
)
from partialfc.data.loader import Batch
from partialfc.training.run.log import read_metrics
from partialfc.training.step import Stepper
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


def config_without_saves(**output: Any) -> TrainConfig:
    """`small_config` in float32 without checkpoints and evaluations before the end; `output` are other options."""
    base = small_config(precision="float32")
    return replace(base, output=replace(base.output, checkpoint_every=1000, evaluate_every=1000, **output))


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


def losses(root: Path, name: str = "loss") -> list[float]:
    """The loss of each step of a run, or another figure."""
    return [line[name] for line in read_metrics(root / "metrics.jsonl") if line["kind"] == "train"]


@contextmanager
def on_micro_batch(hook: Callable[[Stepper, Batch], Batch | None]) -> Iterator[None]:
    """Call `hook` with every micro-batch just before it is computed; a batch that it returns is computed instead."""
    original = Stepper.on_micro_batch

    def call(self: Stepper, batch: Batch) -> Batch:
        batch = original(self, batch)
        return hook(self, batch) or batch

    Stepper.on_micro_batch = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        Stepper.on_micro_batch = original  # type: ignore[method-assign]


class Interrupted(BaseException):
    """The run broke off on purpose, without saving."""


@contextmanager
def interrupt_at(step: int, micro_step: int = 0) -> Iterator[None]:
    """The run in the block breaks off in a step, as if it were killed; the block must reach that step."""

    def interrupt(_: Stepper, batch: Batch) -> None:
        if (batch.step, batch.micro_step) == (step, micro_step):
            raise Interrupted

    try:
        with on_micro_batch(interrupt):
            yield
    except Interrupted:
        return
    raise AssertionError(f"no run reached micro-step {micro_step} of step {step}")


@contextmanager
def signal_at(step: int, signum: signal.Signals = signal.SIGTERM) -> Iterator[None]:
    """This process receives a signal while it computes a step."""

    def send(_: Stepper, batch: Batch) -> None:
        if (batch.step, batch.micro_step) == (step, 0):
            os.kill(os.getpid(), signum)

    with on_micro_batch(send):
        yield


@contextmanager
def poison_images_at(steps: Collection[int], micro_step: int | None = None, value: float = torch.nan) -> Iterator[None]:
    """The images of this process are not finite in these steps, in one micro-step or in all."""

    def poison(_: Stepper, batch: Batch) -> Batch | None:
        if batch.step in steps and micro_step in (None, batch.micro_step):
            return replace(batch, images=batch.images.float() * value)
        return None

    with on_micro_batch(poison):
        yield


@contextmanager
def poison_gradient_at(steps: Collection[int]) -> Iterator[None]:
    """The gradient of this process's loss is NaN in these steps; the loss itself is not."""

    def poison(stepper: Stepper, batch: Batch) -> None:
        if batch.step in steps:

            def poison_loss(head: torch.nn.Module, inputs: Any, loss: torch.Tensor) -> None:
                handle.remove()
                loss.register_hook(lambda gradient: gradient * torch.nan)

            handle = stepper.state.head.register_forward_hook(poison_loss)

    with on_micro_batch(poison):
        yield


@contextmanager
def after_each_step(record: Callable[[Stepper], None]) -> Iterator[None]:
    """Call `record` after every optimizer step."""
    original = Stepper.step

    def step(self: Stepper, micro_batches: list[Batch]) -> dict[str, torch.Tensor]:
        figures = original(self, micro_batches)
        record(self)
        return figures

    Stepper.step = step  # type: ignore[method-assign]
    try:
        yield
    finally:
        Stepper.step = original  # type: ignore[method-assign]
