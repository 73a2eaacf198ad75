"""The same run at 1, 2, 3 and 4 processes, and on a changing number: how far the loss curves are apart.

    python benchmarks/elastic.py --out runs/elastic

IResNet (r18) with synchronised batch statistics and ViT (vit_t) on small images of identities that are patterns, in
float64 and in float32, with a step cut into two micro-steps. Each process writes the classes that it sampled in every
step. In float32 one more run of one process starts from weights that differ in the last place: it shows how far
rounding alone moves this training. Writes its table into docs/results/training.md. The processes are gloo's, on this
machine; complete runs in the folder are reused.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from documents import write_between
from partialfc.bench.machine import describe
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
from partialfc.core import keyed_random
from partialfc.data.images import encode_png
from partialfc.distributed import collectives
from partialfc.head import sampled_softmax
from partialfc.training import step as training_step
from partialfc.training.loop import train
from partialfc.training.replicas import replicated
from partialfc.training.run.log import read_metrics
from processes import run_processes

IDENTITIES, SHOTS, BATCH, STEPS = 30, 5, 22, 100
SIZES = {"r18": 16, "vit_t": 27}
# Learning rates. At the higher ones float32 is chaotic: a rounded sum on the other side of a kink (PReLU, ReLU6) is
# another gradient.
STUDIES = {
    "r18": (("float64", 2e-3), ("float32", 5e-5), ("float32", 2e-3)),
    "vit_t": (("float64", 1e-3), ("float32", 2e-5), ("float32", 1e-3)),
}
WORLD_SIZES, RESUMED = (1, 2, 3, 4), (4, 3, 1, 2)


def write_patterns(folder: Path, size: int) -> Path:
    """Identity folders of noisy coarse patterns, size × size."""
    if folder.exists():
        return folder
    for identity in range(IDENTITIES):
        (folder / f"{identity:03d}").mkdir(parents=True)
        coarse = keyed_random.uniform(keyed_random.derive_key("pattern", identity), torch.arange(27)).view(3, 3, 3)
        pattern = coarse.repeat_interleave(-(-size // 3), 0).repeat_interleave(-(-size // 3), 1)[:size, :size]
        for shot in range(SHOTS):
            key = keyed_random.derive_key("noise", identity, shot)
            noise = keyed_random.uniform(key, torch.arange(size * size * 3)).view(size, size, 3)
            image = (pattern * 200 + noise * 55).to(torch.uint8).numpy()
            (folder / f"{identity:03d}" / f"{shot}.png").write_bytes(encode_png(image))
    return folder


def elastic_config(data: Path, name: str, precision: Any, lr: float, steps: int) -> TrainConfig:
    """A run of `steps` steps that is the same at any world size: fixed micro-steps, synchronised statistics."""
    options: dict[str, Any] = {"dropout": 0.1} if name == "r18" else {"drop_path": 0.1, "mask_ratio": 0.1}
    return TrainConfig(
        data=DataConfig(str(data), global_batch_size=BATCH, micro_batch_size=BATCH, micro_steps=2, workers=0),
        backbone=BackboneConfig(name, 32, sync_batch_norm=True, channels_last=False, **options),
        head=HeadConfig(sample_rate=0.5, scale=16.0),
        optimizer=OptimizerConfig(lr=lr, lr_scaling="absolute"),
        schedule=ScheduleConfig(epochs=steps * BATCH / (IDENTITIES * SHOTS), kind="constant"),
        output=OutputConfig(log_every=1, checkpoint_every=max(1, steps // 4), evaluate_every=10**9, keep=9),
        precision=precision,
        device="cpu",
    )


class _Stopped(Exception):
    """The process has done the steps that it was started for."""


def run_part(rank: int, config: TrainConfig, folder: Path, stop: int, last_place: bool) -> None:
    """One process of a run that is resumed from its last checkpoint and stops after step `stop`.

    Args:
        last_place: start from weights that are one unit in float32's last place larger or smaller, at random.
    """
    if last_place:
        training_step.replicated = _nudged
    original = sampled_softmax.sample_classes
    with (folder.parent / f"{folder.name}-sampled-{rank}.jsonl").open("a") as log:

        def recorded(positives: Tensor, *, step: int, **others: Any) -> Tensor:
            if step == stop:
                raise _Stopped
            classes = original(positives, step=step, **others)
            log.write(json.dumps([step, classes.tolist()]) + "\n")
            return classes

        sampled_softmax.sample_classes = recorded
        try:
            train(config, folder, resume=True, quiet=True)
        except _Stopped:
            collectives.all_reduce(torch.zeros(1))  # every rank waits for the others


def _nudged(network: nn.Module, gradients: torch.dtype) -> nn.Module:
    for number, parameter in enumerate(network.parameters()):
        draws = keyed_random.uniform(keyed_random.derive_key("nudge", number), torch.arange(parameter.numel()))
        parameter.data *= 1 + (draws.view(parameter.shape) < 0.5).to(parameter.dtype).mul_(2).sub_(1) * 2.0**-23
    return replicated(network, gradients)


def run(
    world_size: int, config: TrainConfig, folder: Path, steps: int, stop: int = -1, *, last_place: bool = False
) -> None:
    """`run_part` in fresh processes, unless the run has its last step."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    checkpoints = folder / "checkpoints"
    if not checkpoints.exists() or steps not in steps_in(checkpoints):
        run_processes(world_size, run_part, config, folder, stop, last_place)


def losses(folder: Path) -> list[float]:
    """The loss curve of a run."""
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]


def sampled(folder: Path) -> dict[int, list[int]]:
    """The union of the classes over ranks and micro-steps, by step."""
    union: dict[int, set[int]] = {}
    for path in folder.parent.glob(f"{folder.name}-sampled-*.jsonl"):
        for line in path.read_text().splitlines():
            step, classes = json.loads(line)
            union.setdefault(step, set()).update(classes)
    return {step: sorted(classes) for step, classes in union.items()}


def rows_of(folder: Path, step: int) -> dict[str, Tensor]:
    """Centers and momentum in a checkpoint."""
    checkpoint = Checkpoint(folder / "checkpoints" / f"step-{step:08d}")
    return {name: checkpoint.rows(name, 0, shape[0]) for name, shape in checkpoint.row_shapes.items()}


def difference(one: list[float], other: list[float]) -> float:
    """The largest relative difference of two curves; infinite if one is shorter."""
    if len(one) != len(other) or not one:
        return math.inf
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))


def row_difference(one: Path, other: Path) -> float:
    """The largest difference of any center or momentum row of the last checkpoints, relative to the largest value."""
    step = steps_in(one / "checkpoints")[-1]
    left, right = rows_of(one, step), rows_of(other, step)
    return max(float((left[name] - right[name]).abs().max() / left[name].abs().max()) for name in left)


def compare(data: Path, out: Path, name: str, precision: str, lr: float, steps: int) -> Iterator[str]:
    """Run at every world size and on changing ones: a line for each."""
    config = elastic_config(data, name, precision, lr, steps)
    begin = f"| {name} | {precision} | {lr:g} |"
    for world_size in WORLD_SIZES:
        run(world_size, config, out / f"{world_size}", steps)
        yield line(out, f"{world_size}", f"{begin} {world_size} |")
    for part, world_size in enumerate(RESUMED, start=1):
        run(world_size, config, out / "changing", steps, stop=steps * part // len(RESUMED))
    yield line(out, "changing", f"{begin} {' → '.join(map(str, RESUMED))} |")
    if precision == "float32":
        run(1, config, out / "last-place", steps, last_place=True)
        yield line(out, "last-place", f"{begin} 1, from weights that differ in the last place |")


def line(out: Path, run_name: str, begin: str) -> str:
    """One line of the table: this run against the one of a single process."""
    one, other = out / "1", out / run_name
    curve, same = losses(other), sampled(one) == sampled(other)
    apart, rows = difference(losses(one), curve), row_difference(one, other)
    return (
        f"{begin} {curve[0]:.3f} → {curve[-1]:.3f} | {apart:.1e} | {rows:.1e} "
        f"| {'identical' if same else 'DIFFERENT'} in {len(sampled(other))} steps |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for data and runs")
    parser.add_argument("--steps", type=int, default=STEPS, help="a multiple of 4")
    parser.add_argument("--backbones", nargs="+", default=list(SIZES), choices=list(SIZES))
    options = parser.parse_args()
    lines = [f"{describe('cpu')['cpu']}, torch {torch.__version__}, {options.steps} steps.", ""]
    lines += [
        "| backbone | precision | learning rate | processes | loss | difference of the loss | of centers and momentum "
        "| classes |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name in options.backbones:
        data = write_patterns(options.out / f"images-{name}", SIZES[name])
        for precision, lr in STUDIES[name]:
            for row in compare(data, options.out / f"{name}-{precision}-{lr:g}", name, precision, lr, options.steps):
                print(row, flush=True)
                lines.append(row)
    if options.steps == STEPS and options.backbones == list(SIZES):
        write_between("results/training.md", "benchmarks/elastic.py", lines)


if __name__ == "__main__":
    main()
