"""What a finished run leaves to say, and where its time went."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from partialfc.data.loader import Batch


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves to say; its models and metrics are in the folder.

    Attributes:
        steps, images: optimizer steps and images in all, those before a resume included.
        seconds: wall time of this process, start-up included.
        images_per_second: of this process's training steps alone, over all ranks; None if there was none to do.
        benchmarks: the last result on each benchmark, by name.
        best_score, best_step: the best mean accuracy over the benchmarks, and after which step; None if no model could
            be written.
    """

    folder: Path
    steps: int
    images: int
    seconds: float
    images_per_second: float | None
    benchmarks: dict[str, dict[str, Any]]
    best_score: float | None
    best_step: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {**asdict(self), "folder": str(self.folder)}

    def text(self) -> str:
        """The result for people."""
        speed = f", {self.images_per_second:,.0f} images/s" if self.images_per_second else ""
        lines = [f"{self.steps:,} steps, {self.images:,} images in {self.seconds:,.0f} s{speed}"]
        for name, result in self.benchmarks.items():
            lines.append(f"{name}: accuracy {result['accuracy']:.2%} ± {result['accuracy_std']:.2%}")
        if self.best_step is not None:
            lines.append(f"best model (step {self.best_step}): {self.folder / 'model' / 'best'}")
        return "\n".join(lines)


@dataclass
class Clock:
    """Where the time between two lines of the log went; evaluation and checkpoints stop it."""

    started: float
    waited: float = 0.0
    images: int = 0

    @staticmethod
    def start() -> Clock:
        return Clock(time.monotonic())

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """The next micro-batch, the wait for it counted."""
        before = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - before
        return batch

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        before = time.monotonic()
        yield
        self.started += time.monotonic() - before

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started
