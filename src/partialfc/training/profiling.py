"""A trace of some steps, for chrome://tracing or ui.perfetto.dev, and the memory that a process has needed."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from partialfc.core.errors import InputError


def parse_steps(text: str | None) -> range:
    """The steps of "first:stop", none for None.

    Raises:
        InputError: it is no such range.
    """
    if text is None:
        return range(0)
    first, colon, stop = text.partition(":")
    if not (colon and first.isdecimal() and stop.isdecimal() and int(first) < int(stop)):
        raise InputError(
            f"output.profile_steps is {text!r}; write the first step and the one after the last, as in 10:15."
        )
    return range(int(first), int(stop))


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


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has held so far: on its GPU, or in the machine's memory for a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):  # Linux; getrusage would count what the parent held before exec
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB
