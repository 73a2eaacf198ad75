"""How long a checkpoint delays a step of the training: written within the step, and beside it.

    python benchmarks/checkpoints.py --out /tmp/checkpoints

Two processes of gloo with a head of 1,000,000 classes × 512 and its momentum (4.1 GB) train it (rate 0.1, 128 images
each), and save three times each way. Writes its table into docs/performance.md. Needs 9 GB of disk and of memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from documents import write_between
from partialfc.bench.machine import describe
from partialfc.checkpoint.write import Snapshot
from partialfc.core import keyed_random
from partialfc.distributed import collectives
from partialfc.head.margins import CosFace
from partialfc.head.optim import RowwiseSGD
from partialfc.head.partial_fc import PartialFC
from partialfc.training.saver import CheckpointWriter
from processes import run_processes

CLASSES, WIDTH, IMAGES, PROCESSES, SAVES = 1_000_000, 512, 128, 2, 3


@dataclass(frozen=True)
class Save:
    """Seconds of one save on one rank.

    Attributes:
        held: of the call of `save`.
        written: from the call until the checkpoint was in place.
        step: of the median step meanwhile; 0 if there was none.
    """

    held: float
    written: float
    step: float


class Training:
    """One rank's head, and steps of it."""

    def __init__(self, rank: int, classes: int) -> None:
        self.rank = rank
        self.head = PartialFC(classes, WIDTH, 0.1, CosFace(0.4), update="deferred", operand_dtype=torch.bfloat16)
        self.optimizer = RowwiseSGD(self.head.parameters())

    def step(self) -> float:
        """Take a step and return its seconds."""
        key = keyed_random.derive_key("checkpoints", self.head.step, self.rank)
        labels = (keyed_random.uniform(key, torch.arange(IMAGES)) * self.head.num_classes).long()
        embeddings = keyed_random.normal_rows(key, 0, IMAGES, WIDTH).requires_grad_()
        start = time.perf_counter()
        self.head(embeddings, labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def snapshot(self) -> Snapshot:
        tensors = {"centers": self.head.centers.detach(), **self.optimizer.row_state(self.head.centers)}
        return Snapshot(self.head.step, {}, self.head.shard, tensors, {})

    def save(self, writer: CheckpointWriter) -> Save:
        """Save once, and continue to train while the checkpoint is written."""
        start = time.perf_counter()
        writer.save(self.snapshot())
        held = time.perf_counter() - start
        steps = []
        while any(collectives.gather_json(writer.busy)):
            steps.append(self.step())
        writer.finish()
        return Save(held, time.perf_counter() - start, statistics.median(steps or [0.0]))


def run(rank: int, classes: int, out: Path) -> None:
    """One process: steps without saving, then both ways of saving."""
    training = Training(rank, classes)
    plain = [training.step() for _ in range(8)][3:]
    measured = {"plain": [Save(0.0, 0.0, statistics.median(plain))]}
    for name, asynchronous in (("within", False), ("beside", True)):
        group = collectives.host_group()
        writer = CheckpointWriter(out / "checkpoints", 1, asynchronous=asynchronous, group=group)
        writer.preallocate(training.snapshot().rows)
        for _ in range(8):  # the steps of a run before its first checkpoint
            training.step()
        measured[name] = []
        for _ in range(SAVES):
            measured[name].append(training.save(writer))
            training.step()
    ranks = collectives.gather_json({name: [save.__dict__ for save in saves] for name, saves in measured.items()})
    if rank == 0:
        (out / "saves.json").write_text(json.dumps(ranks))


def slowest(ranks: list[dict[str, list[dict[str, float]]]], name: str) -> list[Save]:
    """The longest times over the ranks, for each save."""
    saves = zip(*(rank[name] for rank in ranks), strict=True)
    return [Save(**{key: max(times[key] for times in save) for key in save[0]}) for save in saves]


def table(ranks: list[dict[str, list[dict[str, float]]]], size: float) -> list[str]:
    plain, within, beside = (slowest(ranks, name) for name in ("plain", "within", "beside"))
    usual = statistics.median(save.held for save in within)
    lines = ["| checkpoint | step held up | until it is in place | a step meanwhile |", "|---|---|---|---|"]
    lines.append(f"| none | – | – | {plain[0].step:.2f} s |")
    lines += [f"| within the step | {save.held:.2f} s | {save.written:.2f} s | – |" for save in within]
    for number, save in enumerate(beside):
        first = " (the first)" if number == 0 else ""
        share = f"{save.held / usual:.1%}"
        lines.append(f"| beside{first} | {save.held:.2f} s ({share}) | {save.written:.2f} s | {save.step:.2f} s |")
    facts = describe("cpu")
    return [f"{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}; {size:.1f} GB.", "", *lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="new folder, on the storage to measure")
    parser.add_argument("--classes", type=int, default=CLASSES, help="another number writes no table")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    try:
        run_processes(PROCESSES, run, options.classes, options.out)
        ranks = json.loads((options.out / "saves.json").read_text())
    finally:
        shutil.rmtree(options.out)
    lines = table(ranks, 8 * options.classes * WIDTH / 1e9)
    print("\n".join(lines))
    if options.classes == CLASSES:
        write_between("performance.md", "benchmarks/checkpoints.py", lines)


if __name__ == "__main__":
    main()
