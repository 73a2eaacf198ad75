"""How well `partialfc plan` predicts memory and time on this machine, and plans for machines that are not here.

    python benchmarks/plan.py [--only NAME ...] [--device cpu]    measure, and write the checked table
    python benchmarks/plan.py --tables                            write the tables of plans; measures nothing

On a GPU, `--device cuda` prints the same comparison as lines of JSON, and fails only for errors.

Each configuration runs in a fresh process: its peak memory beyond imports, the median of its steps and, for whole
trainings, the step that the planner puts together from backbone and head, each timed alone. The table goes to
docs/results/plan.md. Exit status 1 if memory is off by more than 15 % in any of them; times are shown and not judged.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from documents import paragraph, write_between
from partialfc.bench.head_step import HeadCase, median_seconds
from partialfc.bench.machine import describe
from partialfc.config.build import build_head, build_head_optimizer
from partialfc.config.options import (
    BackboneConfig,
    DataConfig,
    HeadConfig,
    OptimizerConfig,
    OutputConfig,
    ScheduleConfig,
    TrainConfig,
)
from partialfc.core.device import peak_bytes
from partialfc.data.images import encode_jpeg
from partialfc.data.sources.recordio import RecordWriter
from partialfc.plan.memory import (
    CONTEXT_BYTES,
    head_pass_memory,
    head_update_memory,
    plan_memory,
    scratch_memory,
    weights_memory,
)
from partialfc.plan.planning import LEANER_HEADS, Plan, make_plan
from partialfc.plan.rates import GIB
from partialfc.plan.step_time import measure_rates, step_time
from partialfc.plan.workload import Device, Workload
from partialfc.training.loop import train
from partialfc.training.run.log import read_metrics

MEMORY_LIMIT = 0.15
_IMAGES = 512
_TRAINED_STEPS = 8
_MIB = 1 << 20
T = TypeVar("T")


def head(classes: int, rate: float, batch: int, optimizer: Literal["sgd", "adamw"] = "sgd", **options: Any) -> Workload:
    """A head alone, on one process."""
    config = TrainConfig(
        data=DataConfig(global_batch_size=batch, micro_batch_size=batch, workers=1, num_classes=classes),
        backbone=BackboneConfig("mini", 512),
        head=HeadConfig(rate, **options),
        optimizer=OptimizerConfig(optimizer),
        precision="float32",
        device="cpu",
    )
    return Workload(config, classes, gpus=1, device="cpu")


def training(backbone: str, classes: int, batch: int, ema_decay: float = 0.0, **options: Any) -> Workload:
    """Whole training steps at 64 pixels, with asynchronous checkpoints."""
    workload = head(classes, 0.1, batch, **options)
    config = replace(
        workload.config,
        backbone=BackboneConfig(backbone, 512),
        optimizer=replace(workload.config.optimizer, ema_decay=ema_decay),
    )
    return replace(workload, config=config, image_size=64)


def on_device(workload: Workload, device: Literal["cpu", "cuda"]) -> Workload:
    return replace(workload, device=device, config=replace(workload.config, device=device))


def gpu_training(backbone: str) -> Workload:
    workload = on_device(training(backbone, 360_000, 128), "cuda")
    return replace(workload, config=replace(workload.config, precision="bfloat16"), image_size=112)


HEADS = {
    "50k-all": head(50_000, 1.0, 128),
    "100k": head(100_000, 0.1, 256),
    "200k-deferred": head(200_000, 0.3, 64, update="deferred"),
    "360k-rounded": head(360_000, 0.1, 128, update="deferred", operand_dtype="bfloat16"),
    "500k-small-batch": head(500_000, 0.05, 32),
    "1m": head(1_000_000, 0.1, 128),
    "1m-rounded": head(1_000_000, 0.1, 256, operand_dtype="bfloat16"),
    "500k-half": head(500_000, 0.1, 128, dtype="bfloat16"),
    "1m-half-deferred": head(1_000_000, 0.05, 128, dtype="bfloat16", update="deferred"),
    "300k-adamw": head(300_000, 0.1, 128, optimizer="adamw"),
}
TRAININGS = {
    "mini": training("mini", 100_000, 128),
    "r18": training("r18", 200_000, 32, update="deferred"),
    "r18-average": training("r18", 50_000, 48, ema_decay=0.99, optimizer="adamw"),
}
GPU_TRAININGS = {f"{name}-gpu": gpu_training(name) for name in ("r50", "r100", "vit_b")}
ALL = HEADS | TRAININGS | GPU_TRAININGS


@dataclass(frozen=True)
class Measured:
    """What a configuration took, and for a whole training the step that the planner predicts."""

    peak_bytes: int
    seconds: float
    predicted_seconds: float | None = None


def in_fresh_process(work: Callable[[], T]) -> T:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work).result()


def head_step(workload: Workload) -> Callable[[], None]:
    """A training step of the head alone."""
    config = workload.config
    width, rate = config.backbone.embedding_dim, workload.largest_rate
    case = HeadCase(workload.classes, width, workload.gathered, rate, workload.device)
    head = build_head(config, workload.classes, device=torch.device(workload.device))
    optimizer = build_head_optimizer(config, head)

    def step() -> None:
        embeddings, labels = case.batch(head.step)
        head(embeddings, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def warm_up(workload: Workload) -> None:
    """Load libraries and compile kernels; what a first process compiles, the next one loads."""
    data = replace(workload.config.data, global_batch_size=4)
    small = replace(workload.config, data=data, backbone=replace(workload.config.backbone, embedding_dim=8))
    head_step(replace(workload, classes=64, config=small).with_rate(0.5))()


def measure_head(workload: Workload) -> Measured:
    """Peak and median step of a head, in this process."""
    device = torch.device(workload.device)
    warm_up(workload)
    before = 0 if device.type == "cuda" else peak_bytes(device)
    step = head_step(workload)
    for _ in range(2):
        step()
    return Measured(peak_bytes(device) - before, median_seconds(step, device, steps=5))


def measure_training(workload: Workload, data: Path) -> Measured:
    """Peak and median step of a run that saves a checkpoint in its middle, in this process."""
    device, config = torch.device(workload.device), run_config(workload, data, _TRAINED_STEPS)
    small = replace(config, backbone=BackboneConfig("mini", 8), head=HeadConfig(0.5, update=config.head.update))
    small = replace(small, data=replace(config.data, global_batch_size=4, num_classes=64))
    with tempfile.TemporaryDirectory() as folder:
        train(replace(small, schedule=ScheduleConfig(epochs=8 / _IMAGES)), Path(folder) / "warm-up", quiet=True)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = 0 if device.type == "cuda" else peak_bytes(device)
        train(config, Path(folder) / "run", quiet=True)
        lines = [line for line in read_metrics(Path(folder) / "run" / "metrics.jsonl") if line["kind"] == "train"]
    peak = peak_bytes(device) - before
    images = config.data.global_batch_size
    seconds = float(np.median([images / line["images_per_second"] for line in lines[2:]]))
    return Measured(peak, seconds, step_time(workload, measure_rates(workload)).step)


def run_config(workload: Workload, data: Path, steps: int) -> TrainConfig:
    """The planned training as a run of some steps."""
    config = workload.config
    return replace(
        config,
        data=replace(config.data, path=str(data)),
        schedule=ScheduleConfig(epochs=steps * config.data.global_batch_size / _IMAGES),
        output=OutputConfig(log_every=1, checkpoint_every=_TRAINED_STEPS // 2, evaluate_every=10**9),
    )


def write_images(path: Path, size: int) -> None:
    """Smooth random images of 64 identities as a .rec file."""
    generator = np.random.default_rng(0)
    with RecordWriter(path) as writer:
        for number in range(_IMAGES):
            coarse = torch.from_numpy(generator.uniform(0, 255, (1, 3, size // 4, size // 4)))
            smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")[0].permute(1, 2, 0)
            writer.write(encode_jpeg(smooth.numpy().astype(np.uint8)), number * 64 // _IMAGES)


def head_memory(workload: Workload) -> int:
    """Predicted peak bytes of the steps of a head alone."""
    exact = weights_memory(workload)
    kept = exact["centers"] + exact["sampled rows' gradient"] + scratch_memory(workload)
    kept += 0 if workload.state_on_host else exact["centers' optimizer"]
    return kept + max(head_pass_memory(workload), head_update_memory(workload))


@dataclass(frozen=True)
class Checked:
    """A configuration, what it took, and its predicted memory."""

    name: str
    workload: Workload
    measured: Measured
    predicted_bytes: int

    @property
    def memory_error(self) -> float:
        return self.predicted_bytes / self.measured.peak_bytes - 1

    @property
    def holds(self) -> bool:
        return abs(self.memory_error) <= MEMORY_LIMIT

    def row(self) -> str:
        config, measured = self.workload.config, self.measured
        storage = f"{config.head.update}, {config.head.dtype}"
        storage += ", bfloat16 operands" if config.head.operand_dtype == "bfloat16" else ""
        predicted = "" if measured.predicted_seconds is None else f"{1000 * measured.predicted_seconds:,.0f} "
        if measured.predicted_seconds is not None:
            predicted += f"({measured.predicted_seconds / measured.seconds - 1:+.0%})"
        return (
            f"| {'head alone' if self.name in HEADS else config.backbone.name + ', 64 px'} "
            f"| {self.workload.classes:,} | {config.head.sample_rate:g} | {config.data.global_batch_size} "
            f"| {storage}, {config.optimizer.name} | {measured.peak_bytes / _MIB:,.0f} "
            f"| {self.predicted_bytes / _MIB:,.0f} ({self.memory_error:+.0%}) "
            f"| {1000 * measured.seconds:,.0f} | {predicted} |"
        )


def check(name: str, data: Path, device: Literal["cpu", "cuda"]) -> Checked:
    """Measure and predict one configuration."""
    workload = on_device(ALL[name], device)
    in_fresh_process(partial(warm_up, workload))
    if name in HEADS:
        measured, predicted = in_fresh_process(partial(measure_head, workload)), head_memory(workload)
    else:
        measured = in_fresh_process(partial(measure_training, workload, data))
        predicted = plan_memory(workload).peak
        predicted -= CONTEXT_BYTES * (device == "cuda")  # which PyTorch's own count leaves out
    checked = Checked(name, workload, measured, predicted)
    line = {"name": name, "peak_bytes": measured.peak_bytes, "predicted_bytes": predicted}
    line |= {"seconds": measured.seconds, "predicted_seconds": measured.predicted_seconds}
    print(json.dumps(line | {"memory_error": checked.memory_error}), flush=True)
    return checked


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(ALL), help="check these, and write no table")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
    parser.add_argument("--tables", action="store_true", help="write the tables of plans instead")
    arguments = parser.parse_args()
    if arguments.tables:
        write_between("results/plan.md", "benchmarks/plan.py plans", plans_table())
        return 0
    on_cpu = arguments.device == "cpu"
    names = arguments.only or [*HEADS, *(TRAININGS if on_cpu else GPU_TRAININGS)]
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            write_images(Path(folder) / "train.rec", ALL[name].image_size)
            rows.append(check(name, Path(folder), arguments.device))
    missed = [row.name for row in rows if not row.holds]
    if on_cpu and not arguments.only:
        write_between("results/plan.md", "benchmarks/plan.py checked", checked_table(rows))
    print(f"off by more than allowed: {', '.join(missed) or 'none'}", file=sys.stderr)
    return 1 if missed and on_cpu else 0


def checked_table(rows: list[Checked]) -> list[str]:
    hardware = describe("cpu")
    caption = (
        f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} threads, torch {hardware['torch']}; "
        "D = 512. Memory beyond imports in MiB, median step in ms, prediction (error)."
    )
    return [
        *paragraph(caption),
        "",
        "| | classes | rate | batch | head | memory | predicted | step | predicted |",
        "|---|---|---|---|---|---|---|---|---|",
        *(row.row() for row in rows),
    ]


IDENTITIES = (1_000_000, 10_000_000, 100_000_000, 1_000_000_000)
MACHINES: tuple[tuple[Device, int], ...] = (("h200", 1), ("h100", 1), ("h100", 8), ("h100", 64), ("h100", 512))


def plans_table() -> list[str]:
    """Plans for H100s and one H200: IResNet-100, 128 images a GPU, bfloat16 operands, rate 0.1."""
    lines = [
        "| identities | GPUs | head stored as | memory a GPU (host) | rate that fits | head = backbone at rate | "
        "backbone, head, communication | images/s | limit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return lines + [plan_row(leanest_that_fits(*case)) for case in ((c, *m) for c in IDENTITIES for m in MACHINES)]


def leanest_that_fits(classes: int, device: Device, gpus: int) -> Plan:
    """The plan with the first way to store the head that fits, or with the last if none does."""
    config = TrainConfig(
        data=DataConfig(global_batch_size=128 * gpus, workers=8),
        backbone=BackboneConfig("r100"),
        head=HeadConfig(operand_dtype="bfloat16"),
    )
    for changes in ({}, *LEANER_HEADS):
        plan = make_plan(Workload(config.with_values(changes), classes, gpus, device))
        if plan.fits:
            break
    return plan


def plan_row(plan: Plan) -> str:
    workload, time = plan.workload, plan.time
    head = workload.config.head
    assert time is not None
    start = f"| {workload.classes:,} | {workload.gpus} {workload.device.upper()} | "
    memory = f"{plan.memory.peak / GIB:,.0f} ({sum(plan.memory.host.values()) / GIB:,.0f}) GiB"
    if not plan.fits:
        gpus = next((word for word in plan.advice if word.startswith("--gpus")), "no number of GPUs tried")
        return f"{start}none fits at rate {head.sample_rate:g}; the last fits with {gpus} | {memory} | | | | | memory |"
    storage = f"{head.dtype}, {head.update}" + (", state on the host" if head.state_on_host else "")
    equal = "never" if plan.equal_rate is None else f"{plan.equal_rate:g}"
    return start + (
        f"{storage} | {memory} | {plan.fitting_rate:g} | {equal} | "
        f"{1000 * time.backbone:.0f}, {1000 * time.head:.0f}, {1000 * time.communication:.1f} ms | "
        f"{plan.images_per_second:,.0f} | {time.limit} |"
    )


if __name__ == "__main__":
    sys.exit(main())
