"""How well `partialfc plan` predicts memory and time on this machine, and plans for machines that are not here.

    python benchmarks/plan.py [--only NAME ...] [--device cpu]    measure, and write the checked table
    python benchmarks/plan.py --tables                            write the tables of plans; measures nothing

On a GPU, `--device cuda` prints the same comparison as lines of JSON, and fails for nothing but errors.

Each configuration runs in a fresh process: its peak memory beyond imports, then the median of its steps, in turn with
the small steps of the same kind from which the rates of the prediction come. The table goes to docs/results/plan.md.
Exit status 1 if memory is off by more than 15 % or the head's time by more than 25 % in any of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from partialfc.bench.machine import describe, peak_resident_bytes
from partialfc.config.options import BackboneConfig, DataConfig, HeadConfig, OutputConfig, ScheduleConfig, TrainConfig
from partialfc.data.images import encode_jpeg
from partialfc.data.sources.recordio import RecordWriter
from partialfc.plan.measure import HeadRates, head_step, measure_backbone, measure_head
from partialfc.plan.memory import CONTEXT_BYTES, cpu_threads, head_memory, plan_memory
from partialfc.plan.planning import Plan, leanest_that_fits, make_plan
from partialfc.plan.rates import GIB, MachineRates
from partialfc.plan.request import PlanRequest
from partialfc.plan.step_time import head_time, step_time
from partialfc.training.loop import train
from partialfc.training.run.log import read_metrics

MEMORY_LIMIT, TIME_LIMIT = 0.15, 0.25
DOCUMENT = Path(__file__).parent.parent / "docs" / "results" / "plan.md"
_MEMORY_STEPS = 2
_IMAGES = 512
_TRAINED_STEPS = 8
_MIB = 1 << 20
T = TypeVar("T")


def head(classes: int, rate: float, batch: int, **options: Any) -> PlanRequest:
    """A head alone, on one process."""
    return PlanRequest(
        classes=classes, sample_rate=rate, batch_size=batch, gpus=1, device="cpu", backbone="mini", **options
    )


def training(backbone: str, classes: int, batch: int, **options: Any) -> PlanRequest:
    """Whole training steps at 64 pixels, with asynchronous checkpoints."""
    request = head(classes, 0.1, batch, image_size=64, embedding_dim=512, workers=1, precision="float32", **options)
    return replace(request, backbone=backbone)


DEFERRED: dict[str, Any] = {"head_update": "deferred"}
ROUNDED: dict[str, Any] = {"head_operand_dtype": "bfloat16"}
HALF: dict[str, Any] = {"head_dtype": "bfloat16"}
HEADS = {
    "50k-all": head(50_000, 1.0, 128),
    "100k": head(100_000, 0.1, 256),
    "200k-deferred": head(200_000, 0.3, 64, **DEFERRED),
    "360k-rounded": head(360_000, 0.1, 128, **DEFERRED, **ROUNDED),
    "500k-small-batch": head(500_000, 0.05, 32),
    "1m": head(1_000_000, 0.1, 128),
    "1m-rounded": head(1_000_000, 0.1, 256, **ROUNDED),
    "500k-half": head(500_000, 0.1, 128, **HALF),
    "1m-half-deferred": head(1_000_000, 0.05, 128, **HALF, **DEFERRED),
    "300k-adamw": head(300_000, 0.1, 128, optimizer="adamw"),
}
TRAININGS = {
    "mini": training("mini", 100_000, 128),
    "r18": training("r18", 200_000, 32, **DEFERRED),
    "r18-average": training("r18", 50_000, 48, ema=True, optimizer="adamw"),
}
GPU_TRAININGS = {
    f"{name}-gpu": replace(training(name, 360_000, 128), device="cuda", precision="bfloat16", image_size=112)
    for name in ("r50", "r100", "vit_b")
}
ALL = HEADS | TRAININGS | GPU_TRAININGS


@dataclass(frozen=True)
class Measured:
    """What a configuration took, and the rates of its kind."""

    peak_bytes: int
    seconds: float
    rates: MachineRates


def in_fresh_process(work: Callable[[], T]) -> T:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work).result()


def rates_of(head: HeadRates, backbone: tuple[float, float] = (1.0, 0.0)) -> MachineRates:
    """The rates that the checks need; the rest is not asked for."""
    measured = head.flops, head.row_bytes, head.seconds
    return MachineRates("this machine", "measured", 0, *backbone, *measured, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1e6)


def warm_up(request: PlanRequest) -> None:
    """Load libraries and compile loops; what a first process compiles, the next one loads."""
    head_step(replace(request, classes=64, embedding_dim=8, sample_rate=0.5))[1](4)()


def measure_head_alone(request: PlanRequest) -> Measured:
    """Peak of a head, and its median step in turn with the small ones that give the rates; in this process."""
    is_cuda = request.device == "cuda"
    warm_up(request)
    before = 0 if is_cuda else peak_resident_bytes()
    step = head_step(request)[1](request.batch_size)
    for _ in range(_MEMORY_STEPS):
        step()
    peak = torch.cuda.max_memory_allocated() if is_cuda else peak_resident_bytes() - before
    head, (seconds,) = measure_head(request, [step])
    return Measured(peak, seconds, rates_of(head))


def measure_training(request: PlanRequest, data: Path) -> Measured:
    """Peak and median step of a run that saves a checkpoint in its middle, in this process."""
    is_cuda = request.device == "cuda"
    small = replace(request, classes=64, batch_size=4, backbone="mini", embedding_dim=8)
    with tempfile.TemporaryDirectory() as folder:
        train(configuration(small, data, steps=2), Path(folder) / "warm-up", quiet=True)
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
        before = 0 if is_cuda else peak_resident_bytes()
        train(configuration(request, data, steps=_TRAINED_STEPS), Path(folder) / "run", quiet=True)
        lines = [line for line in read_metrics(Path(folder) / "run" / "metrics.jsonl") if line["kind"] == "train"]
    peak = torch.cuda.max_memory_allocated() if is_cuda else peak_resident_bytes() - before
    seconds = float(np.median([request.batch_size / line["images_per_second"] for line in lines[2:]]))
    head, _ = measure_head(request)
    return Measured(peak, seconds, rates_of(head, measure_backbone(request, request.precision)))


def configuration(request: PlanRequest, data: Path, steps: int) -> TrainConfig:
    """The training that the request plans."""
    assert request.precision != "auto"
    return TrainConfig(
        data=DataConfig(
            path=str(data),
            global_batch_size=request.batch_size,
            micro_batch_size=request.batch_size,
            workers=request.workers,
            num_classes=request.classes,
        ),
        backbone=BackboneConfig(request.backbone, request.embedding_dim, checkpointing=request.checkpointing),
        head=HeadConfig(request.sample_rate, update=request.head_update),
        optimizer=replace(TrainConfig().optimizer, name=request.optimizer, ema_decay=0.99 if request.ema else 0.0),
        schedule=ScheduleConfig(epochs=steps * request.batch_size / _IMAGES),
        output=OutputConfig(log_every=1, checkpoint_every=_TRAINED_STEPS // 2, evaluate_every=10**9),
        precision=request.precision,
        device="cuda" if request.device == "cuda" else "cpu",
    )


def write_images(path: Path, size: int) -> None:
    """Smooth random images of 64 identities as a .rec file."""
    generator = np.random.default_rng(0)
    with RecordWriter(path) as writer:
        for number in range(_IMAGES):
            coarse = torch.from_numpy(generator.uniform(0, 255, (1, 3, size // 4, size // 4)))
            smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")[0].permute(1, 2, 0)
            writer.write(encode_jpeg(smooth.numpy().astype(np.uint8)), number * 64 // _IMAGES)


@dataclass(frozen=True)
class Checked:
    """A configuration, what it took, and what was predicted."""

    name: str
    request: PlanRequest
    measured: Measured
    peak_bytes: int
    seconds: float
    is_training: bool

    @property
    def memory_error(self) -> float:
        return self.peak_bytes / self.measured.peak_bytes - 1

    @property
    def time_error(self) -> float:
        return self.seconds / self.measured.seconds - 1

    @property
    def holds(self) -> bool:
        return abs(self.memory_error) <= MEMORY_LIMIT and (self.is_training or abs(self.time_error) <= TIME_LIMIT)

    def row(self) -> str:
        asked, measured = self.request, self.measured
        storage = f"{asked.head_update}, {asked.head_dtype}" + (
            ", bfloat16 operands" if asked.operand_bytes == 2 else ""
        )
        what = f"{asked.backbone}, 64 px" if self.is_training else "head alone"
        return (
            f"| {what} | {asked.classes:,} | {asked.sample_rate:g} | {asked.batch_size} | "
            f"{storage}, {asked.optimizer} | "
            f"{measured.peak_bytes / _MIB:,.0f} | {self.peak_bytes / _MIB:,.0f} ({self.memory_error:+.0%}) | "
            f"{1000 * measured.seconds:,.0f} | {1000 * self.seconds:,.0f} ({self.time_error:+.0%}) |"
        )


def check(name: str, data: Path, device: str) -> Checked:
    """Measure and predict one configuration."""
    is_training = name not in HEADS
    request = replace(ALL[name], device=device)
    in_fresh_process(partial(warm_up, request))
    if is_training:
        measured = in_fresh_process(partial(measure_training, request, data))
        memory = plan_memory(request, request.precision, cpu_threads()).peak
        memory -= CONTEXT_BYTES * (device == "cuda")  # which PyTorch's own count leaves out
        seconds = step_time(request, measured.rates, request.precision).step
    else:
        measured = in_fresh_process(partial(measure_head_alone, request))
        memory = head_memory(request, cpu_threads())
        seconds = head_time(request, measured.rates)
    checked = Checked(name, request, measured, memory, seconds, is_training)
    line = {"name": name, "peak_bytes": measured.peak_bytes, "predicted_bytes": memory}
    line |= {"seconds": measured.seconds, "predicted_seconds": seconds, "rates": asdict(measured.rates)}
    print(json.dumps(line | {"memory_error": checked.memory_error, "time_error": checked.time_error}), flush=True)
    return checked


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(ALL), help="check these, and write no table")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
    parser.add_argument("--tables", action="store_true", help="write the tables of plans instead")
    arguments = parser.parse_args()
    if arguments.tables:
        write("plans", plans_tables())
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
        write("checked", checked_table(rows))
    print(f"off by more than allowed: {', '.join(missed) or 'none'}", file=sys.stderr)
    return 1 if missed and on_cpu else 0


def checked_table(rows: list[Checked]) -> list[str]:
    hardware = describe("cpu")
    return [
        f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} threads, torch {hardware['torch']}; "
        "D = 512. Memory beyond imports in MiB, median step in ms, prediction (error).",
        "",
        "| | classes | rate | batch | head | memory | predicted | step | predicted |",
        "|---|---|---|---|---|---|---|---|---|",
        *(row.row() for row in rows),
    ]


IDENTITIES = (1_000_000, 10_000_000, 100_000_000, 1_000_000_000)
MACHINES = (("h200", 1), ("h100", 1), ("h100", 8), ("h100", 64), ("h100", 512))


def plans_tables() -> list[str]:
    """Plans for H100s and one H200: IResNet-100, 128 images a GPU, bfloat16 operands, rate 0.1."""
    lines = [
        "| identities | GPUs | head stored as | memory a GPU (host) | rate that fits | head = backbone at rate | "
        "backbone, head, communication | images/s | limit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for classes in IDENTITIES:
        for device, gpus in MACHINES:
            request = PlanRequest(classes, gpus, "r100", device, head_operand_dtype="bfloat16", workers=8)  # type: ignore[arg-type]
            lines.append(_plan_row(*leanest_that_fits(request, make_plan)))
    return lines


def _plan_row(storage: str, plan: Plan) -> str:
    asked, time = plan.request, plan.time
    start = f"| {asked.classes:,} | {asked.gpus} {asked.device.upper()} | "
    memory = f"{plan.memory.peak / GIB:,.0f} ({sum(plan.memory.host.values()) / GIB:,.0f}) GiB"
    if not plan.fits:
        gpus = next((word for word in plan.advice if word.startswith("--gpus")), "no number of GPUs tried")
        return (
            start + f"none fits at rate {asked.sample_rate:g}; the last fits with {gpus} | {memory} | | | | | memory |"
        )
    equal = "never" if plan.equal_rate is None else f"{plan.equal_rate:g}"
    return start + (
        f"{storage} | {memory} | {plan.fitting_rate:g} | {equal} | "
        f"{1000 * time.backbone:.0f}, {1000 * time.head:.0f}, {1000 * time.communication:.1f} ms | "
        f"{plan.images_per_second:,.0f} | {time.limit} |"
    )


def write(part: str, lines: list[str]) -> None:
    """Put lines between the markers of a part of docs/results/plan.md."""
    print("\n".join(lines))
    begin, end = f"<!-- benchmarks/plan.py {part} begin -->", f"<!-- benchmarks/plan.py {part} end -->"
    before, rest = DOCUMENT.read_text().split(begin)
    DOCUMENT.write_text("\n".join([before + begin, *lines, end + rest.split(end)[1]]))


if __name__ == "__main__":
    sys.exit(main())
