"""The result of a finished run, and where its time went: step clock and trace."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from partialfc.core.console import counted
from partialfc.data.loader import Batch


@dataclass(frozen=True)
class TrainResult:
    """The result of a finished run; its models and metrics are in the folder.

    Attributes:
        steps, images: optimizer steps and images in all, those before a resume included.
        seconds: wall time of this process, start-up included.
        images_per_second: of this process's training steps alone, over all ranks; None if there were no steps left.
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

    def text(self, benchmarks: Sequence[str] = ()) -> str:
        """The result as text of a few lines: speed, how good the model is, and what to do next.

        Args:
            benchmarks: the words that followed --benchmark.
        """
        speed = f", {self.images_per_second:,.0f} images/s" if self.images_per_second else ""
        lines = [f"{counted(self.steps, 'step')}, {counted(self.images, 'image')} in {self.seconds:,.0f} s{speed}"]
        for name, result in self.benchmarks.items():
            versus = "above guessing (50%)" if beats_guessing(result) else "no better than guessing (50%)"
            accuracy = f"{result['accuracy']:.2%} ± {result['accuracy_std']:.2%}"
            lines.append(f"{name}: accuracy {accuracy} of {counted(result['pairs'], 'pair')}, {versus}")
        if self.benchmarks and not any(map(beats_guessing, self.benchmarks.values())):
            lines.append("It has learned nothing that shows: train longer (--epochs), on more people, or")
            lines.append("train a trained model further (partialfc finetune MODEL DATA).")
        if self.best_step is not None:
            best = f"best model (step {self.best_step:,})" if self.benchmarks else "model"
            lines.append(f"{best}: {self.folder / 'model' / 'best'}")
        given = " ".join(["--benchmark", *benchmarks]) if benchmarks else "--benchmark lfw.bin"
        lines.append(f"next: partialfc {'report' if benchmarks else 'evaluate'} {self.folder} {given}")
        if not benchmarks:
            lines.append("      (how good the model is on other people is unknown without a benchmark)")
        return "\n".join(lines)


def beats_guessing(result: Mapping[str, Any]) -> bool:
    """Whether an accuracy lies more than three standard errors above 50 %, that of guessing on as many pairs."""
    return bool(result["accuracy"] > 0.5 + 3 * math.sqrt(0.25 / result["pairs"]))


class StepClock:
    """Times the training steps, since the last line of the log and in all; evaluation and checkpoints stop it.

    Attributes:
        images: trained on since the last line.
    """

    def __init__(self) -> None:
        self.images = self._all_images = 0
        self._started, self._waited, self._all_seconds = time.monotonic(), 0.0, 0.0

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """The next micro-batch; the wait for it is counted."""
        before = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - before
        return batch

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Exclude the time of the block."""
        before = time.monotonic()
        yield
        self._started += time.monotonic() - before

    def figures(self) -> dict[str, float]:
        """Images a second, and the share of the time spent waiting for data, since the last line."""
        seconds = time.monotonic() - self._started
        return {"images_per_second": self.images / seconds, "data_wait": self._waited / seconds}

    def restart(self) -> None:
        """Begin a new line."""
        now = time.monotonic()
        self._all_images += self.images
        self._all_seconds += now - self._started
        self.images, self._started, self._waited = 0, now, 0.0

    @property
    def images_per_second(self) -> float | None:
        """Over all lines; None before the first."""
        return self._all_images / self._all_seconds if self._all_seconds else None


class StepProfiler:
    """Records a range of steps and writes `trace-<first>-<stop>.json`, for chrome://tracing or ui.perfetto.dev.

    Args:
        steps: counted from 0; an empty range records nothing. A resumed run records those that are left.
        folder: where the trace is written.
    """

    def __init__(self, steps: range, folder: Path) -> None:
        self._steps, self._folder = steps, folder
        self._profile: torch.profiler.profile | None = None
        self._first = steps.start

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the optimizer step `number`, the wait for its data included."""
        if number not in self._steps:
            yield
            return
        if self._profile is None:
            self._first = number
            self._profile = torch.profiler.profile()
            self._profile.start()
        with torch.profiler.record_function(f"step {number}"):
            yield
        if number == self._steps[-1]:
            self.close()

    def close(self) -> None:
        """Write the trace of a run that ends within the range."""
        if self._profile is not None:
            self._profile.stop()
            self._profile.export_chrome_trace(str(self._folder / f"trace-{self._first}-{self._steps.stop}.json"))
            self._profile = None
