"""Small trainings that differ in their seed: configuration, curves, accuracies, and a table of them with the spread."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from partialfc.config.options import TrainConfig
from partialfc.config.recipes import RECIPES
from partialfc.training.run.log import read_metrics

BATCH, IDENTITIES, SHOTS, SIZE = 64, 1_000, 8, 64  # of a small training


def small_training(seed: int, data: Path, steps: int) -> TrainConfig:
    """The recipe `demo` in float32 on a CPU, for a few steps on the faces of `IDENTITIES` people."""
    base = RECIPES["demo"]
    epochs = steps * BATCH / (IDENTITIES * SHOTS)
    return replace(
        base,
        seed=seed,
        precision="float32",
        device="cpu",
        data=replace(base.data, path=str(data), global_batch_size=BATCH, micro_batch_size=BATCH, workers=0),
        schedule=replace(base.schedule, epochs=epochs, warmup_epochs=epochs / 12),
        output=replace(base.output, log_every=5, evaluate_every=steps, checkpoint_every=steps),
    )


class SeedRun(NamedTuple):
    """What one run shows: its loss curve as (step, loss), and its last accuracy."""

    curve: list[tuple[float, float]]
    accuracy: float

    @classmethod
    def read(cls, folder: Path) -> SeedRun:
        """Take the figures from a run folder."""
        lines = read_metrics(folder / "metrics.jsonl")
        curve = [(float(line["step"]), line["loss"]) for line in lines if line["kind"] == "train"]
        return cls(curve, [line["accuracy"] for line in lines if line["kind"] == "evaluation"][-1])

    def row(self) -> tuple[float, float, float]:
        """Mean loss of the first and of the last quarter, and the accuracy."""
        losses = [loss for _, loss in self.curve]
        quarter = max(1, len(losses) // 4)
        return statistics.mean(losses[:quarter]), statistics.mean(losses[-quarter:]), self.accuracy


def seed_table(names: Sequence[str], groups: Mapping[tuple[str, ...], Sequence[SeedRun]]) -> list[str]:
    """A line for each run, its seed from 0 on, and one with mean ± deviation for each group of runs."""
    columns = [*names, "seed", "loss, first quarter", "loss, last quarter", "accuracy"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for group, runs in groups.items():
        begin = f"| {' | '.join(group)} |"
        rows = [run.row() for run in runs]
        for seed, (first, last, accuracy) in enumerate(rows):
            lines.append(f"{begin} {seed} | {first:.3f} | {last:.3f} | {accuracy:.2%} |")
        means = [statistics.mean(column) for column in zip(*rows, strict=True)]
        spread = [statistics.stdev(column) for column in zip(*rows, strict=True)]
        lines.append(
            f"{begin} mean ± deviation | {means[0]:.3f} ± {spread[0]:.3f} | {means[1]:.3f} ± {spread[1]:.3f} "
            f"| {means[2]:.2%} ± {spread[2]:.2%} |"
        )
    return lines
