"""A trace of some steps, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch


class StepProfiler:
    """Records the steps of a range and leaves `trace-<first>-<stop>.json` in `folder`. Steps count from 0.

    Args:
        steps: which; an empty range records nothing. Of a resumed run, those that are left of it.
        folder: where the trace goes.
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
        """Write what was recorded, if the run ends within the range."""
        if self._profile is not None:
            self._profile.stop()
            self._profile.export_chrome_trace(str(self._folder / f"trace-{self._first}-{self._steps.stop}.json"))
            self._profile = None
