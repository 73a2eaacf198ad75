"""The loss curve with gradients exchanged in bfloat16 beside that in float32: two processes, three seeds of each.

    python benchmarks/compression.py --out /tmp/compression

300 steps of 64 procedural faces with the small network in float32, tested on pairs of other identities. Writes a table
into docs/results/training.md and a plot beside it. Runs in the folder are resumed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from documents import DOCS, write_between
from partialfc.bench.machine import describe
from partialfc.config.options import ProcessesConfig, TrainConfig
from partialfc.faces.sets import FaceWorld
from partialfc.pages.plots import Line, Scale, chart
from partialfc.training.loop import train
from processes import run_processes
from seeds import IDENTITIES, SHOTS, SIZE, SeedRun, seed_table, small_training
from timeline import standalone_svg

GRADIENTS, SEEDS = ("float32", "bfloat16"), (0, 1, 2)
STEPS = 300
PICTURE = "images/compression.svg"


def configuration(gradients: Any, seed: int, data: Path, steps: int) -> TrainConfig:
    return replace(small_training(seed, data, steps), processes=ProcessesConfig(gradients=gradients))


def work(rank: int, gradients: str, seed: int, out: Path, steps: int) -> None:
    config = configuration(gradients, seed, out / "data" / "train", steps)
    pairs = {"pairs": out / "data" / "pairs.bin"}
    train(config, out / f"{gradients}-{seed}", benchmarks=pairs, resume=True, quiet=True)


def picture(results: dict[tuple[str, ...], list[SeedRun]], steps: int) -> str:
    """The mean over the seeds of both, with the spread of float32's as a band."""
    lines = []
    for (gradients,), runs in results.items():
        curves = np.array([run.curve for run in runs])  # (seeds, points, step and loss)
        mean, std = curves[:, :, 1].mean(axis=0), curves[:, :, 1].std(axis=0, ddof=1)
        band = (mean - std, mean + std) if gradients == GRADIENTS[0] else (None, None)
        lines.append(Line(gradients, curves[0, :, 0], mean, *band))
    x = Scale("optimizer step", "step", (0, steps), "count", snug=True)
    return standalone_svg(chart(lines, name="loss", x=x, y=Scale("loss")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for data and runs")
    parser.add_argument("--steps", type=int, default=STEPS, help="another number writes neither table nor plot")
    options = parser.parse_args()
    world = FaceWorld(identities=IDENTITIES, shots=SHOTS, pairs=2000, pair_identities=500, image_size=SIZE)
    world.write(options.out / "data", resume=True)
    results: dict[tuple[str, ...], list[SeedRun]] = {}
    for gradients in GRADIENTS:
        for seed in SEEDS:
            run_processes(2, work, gradients, seed, options.out, options.steps)
            run = SeedRun.read(options.out / f"{gradients}-{seed}")
            results.setdefault((gradients,), []).append(run)
            print(gradients, seed, f"{run.accuracy:.2%}", flush=True)
    facts = describe("cpu")
    lines = [
        f"{facts['cpu']}, torch {facts['torch']}, two gloo processes.",
        "",
        *seed_table(["gradients"], results),
        "",
    ]
    lines.append(f"![Mean loss over three seeds: float32 solid with its spread, bfloat16 dashed](../{PICTURE})")
    print("\n".join(lines))
    if options.steps == STEPS:
        (DOCS / PICTURE).write_text(picture(results, options.steps))
        write_between("results/training.md", "benchmarks/compression.py", lines)


if __name__ == "__main__":
    main()
