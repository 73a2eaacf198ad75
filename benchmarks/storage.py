"""Do centers and momentum in bfloat16 train as well as in float32? Five seeds of each on procedural faces.

    python benchmarks/storage.py --out /tmp/storage

Every run is 2,000 steps of 32 images (2,000 identities, 8 images each, rate 0.1), tested on 6,000 pairs of
other identities. Writes its table into docs/results/head.md. Runs that are there are taken over, so that an
interrupted one goes on.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from documents import write_between
from partialfc.bench.machine import describe
from partialfc.config.options import OptimizerConfig, TrainConfig
from partialfc.config.recipes import RECIPES
from partialfc.faces.sets import FaceWorld
from partialfc.training.loop import train
from seeds import SeedRun, seed_table

DType = Literal["float32", "bfloat16"]
STORAGES: tuple[tuple[DType, DType], ...] = (
    ("float32", "float32"),
    ("bfloat16", "float32"),
    ("bfloat16", "bfloat16"),
)
STEPS, BATCH, IDENTITIES, SHOTS = 2_000, 32, 2_000, 8


def configuration(centers: DType, momentum: DType, seed: int, data: Path) -> TrainConfig:
    base = RECIPES["demo"]
    return replace(
        base,
        seed=seed,
        data=replace(base.data, path=str(data), global_batch_size=BATCH, micro_batch_size=BATCH),
        head=replace(base.head, dtype=centers, state_dtype=momentum, update="deferred"),
        # SGD, whose momentum is rounded too.
        optimizer=OptimizerConfig(name="sgd", lr=0.05, lr_scaling="absolute", head_lr_factor=2.0),
        schedule=replace(base.schedule, epochs=STEPS * BATCH / (IDENTITIES * SHOTS)),
        output=replace(base.output, evaluate_every=STEPS, checkpoint_every=STEPS),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for data and runs")
    parser.add_argument("--seeds", type=int, default=5, help="at least 2")
    options = parser.parse_args()
    torch.set_num_threads(1)
    world = FaceWorld(identities=IDENTITIES, shots=SHOTS, pairs=6000, pair_identities=2000, image_size=64)
    world.write(options.out / "data", resume=True)
    found: dict[tuple[str, ...], list[SeedRun]] = {}
    for seed in range(options.seeds):
        for storage in STORAGES:
            found.setdefault(storage, []).append(trained(*storage, seed, options.out))
    lines = seed_table(["centers", "momentum"], found)
    hardware = describe("cpu")
    lines = [f"{hardware['cpu']}, torch {hardware['torch']}.", "", *lines]
    print("\n".join(lines))
    write_between("results/head.md", "benchmarks/storage.py", lines)


def trained(centers: DType, momentum: DType, seed: int, out: Path) -> SeedRun:
    """Train one run, or take it over."""
    run = out / f"{centers}-{momentum}-{seed}"
    data = out / "data"
    config, pairs = configuration(centers, momentum, seed, data / "train"), {"pairs": data / "pairs.bin"}
    train(config, run, benchmarks=pairs, resume=True, quiet=True)
    figures = SeedRun.read(run)
    print(f"{centers} {momentum} seed {seed}: {figures.accuracy:.2%}", flush=True)
    return figures


if __name__ == "__main__":
    main()
