"""What people see while something runs: a bar on a terminal, sparse lines anywhere else, all of it on stderr."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from partialfc.distributed.collectives import rank_of

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_OF_RATE = 30.0
_SECONDS_BETWEEN_DRAWINGS = 0.2
_FIGURES: dict[str, Callable[[float], str]] = {
    "epoch": lambda value: f"epoch {value:.2f}" if value % 1 else f"epoch {value:.0f}",
    "loss": lambda value: f"loss {value:.2f}",
    "target_cosine": lambda value: f"cosine {value:.2f}",
    "lr": lambda value: f"lr {value:.3g}",
    "images_per_second": lambda value: f"{value:,.0f} images/s",
    "data_wait": lambda value: f"data wait {value:.0%}",
}


class TrainingProgress:
    """The progress of a training: steps, figures and time left.

    On a terminal it is a bar with a line of figures below it; otherwise a line at the start, about every ten seconds,
    and at the end. It is drawn within `update`: no thread of its own competes with the training. Ranks other than the
    first show nothing.
    """

    def __init__(
        self,
        total_steps: int,
        description: str,
        *,
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; nothing is shown before the `with`.

        Args:
            total_steps: steps in all, those done by an earlier process included.
            description: a word or two in front of the bar.
            quiet: show nothing (for --json).
            console: where to show it, standard error if not given.
            clock: seconds, monotonic.
        """
        self._display = _Display(total_steps, description, None, quiet=quiet, console=console, clock=clock)

    def update(self, step: int, **figures: float) -> None:
        """Show that `step` steps are done, with what is known of the last ones.

        Known figures are shown with their units: epoch, loss, target_cosine, lr, images_per_second and data_wait (the
        share of time, 0 to 1, that the step waits for data). Any other is shown under its name.
        """
        self._display.update(step, [_describe(name, value) for name, value in figures.items()])

    def message(self, text: str) -> None:
        """Print a line that stays, above the bar."""
        self._display.message(text)

    def __enter__(self) -> TrainingProgress:
        self._display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.stop()


@contextmanager
def track(
    description: str,
    total: int = 0,
    *,
    unit: str = "image",
    quiet: bool = False,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[int, int], None]]:
    """The progress of any other job, as a function to call with (done, total); with rate and time left.

    Args:
        description: what is being done, such as "reading".
        total: how much there is, if it is known before the first call.
        unit: what is counted, in the singular.
        quiet: show nothing.
        console: where to show it, standard error if not given.
        clock: seconds, monotonic.
    """
    display = _Display(total, description, unit, quiet=quiet, console=console, clock=clock)

    def report(done: int, total: int) -> None:
        display.total = total
        display.update(done, [])

    display.start()
    try:
        yield report
    finally:
        display.stop()


class _LastingConsole(Console):
    """A job goes on, unseen, when whoever read its messages is gone, such as `tee`; rich would end the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


class _Display:
    """Draws one job's progress; `unit` is what its rate counts, None if the rate is not shown."""

    def __init__(
        self,
        total: int,
        description: str,
        unit: str | None,
        *,
        quiet: bool,
        console: Console | None,
        clock: Callable[[], float],
    ) -> None:
        self.total, self.description, self.unit, self.clock = total, description, unit, clock
        self.console = console or _LastingConsole(stderr=True)
        self.shown = not quiet and rank_of() == 0
        self.done: int | None = None
        self.figures: list[str] = []
        self.ended = False
        self._samples: deque[tuple[float, int]] = deque()
        self._started = clock()
        self._shown_at: float | None = None
        self._shown_done: int | None = None
        self._live: Live | None = None

    def start(self) -> None:
        self._started = self.clock()
        if self.shown and self.console.is_terminal and not self.console.is_dumb_terminal:
            # Standard output stays as it is: it may be a file that waits for results.
            self._live = Live(
                get_renderable=self._draw,
                console=self.console,
                auto_refresh=False,
                redirect_stdout=False,
            )
            self._live.start(refresh=True)

    def update(self, done: int, figures: list[str]) -> None:
        now = self.clock()
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[1][0] >= _SECONDS_OF_RATE:
            self._samples.popleft()
        self.done, self.figures = done, figures
        if self.unit is not None and (rate := self.rate()) is not None:
            self.figures = [*figures, f"{_count(rate)} {self.unit}s/s"]
        if not self.shown:
            return
        wait = _SECONDS_BETWEEN_LINES if self._live is None else _SECONDS_BETWEEN_DRAWINGS
        if self._shown_at is None or now - self._shown_at >= wait:
            self._shown_at, self._shown_done = now, done
            if self._live is None:
                self._print_line()
            else:
                self._live.refresh()

    def message(self, text: str) -> None:
        if self.shown:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        self.ended = True
        if self._live is not None:
            self._live.stop()
        elif self.shown and self.done is not None and self.done != self._shown_done:
            self._print_line()

    def rate(self) -> float | None:
        """Units a second over the last half minute, None while that is unknown."""
        if len(self._samples) < 2:
            return None
        (then, first), (now, last) = self._samples[0], self._samples[-1]
        return (last - first) / (now - then) if now > then and last > first else None

    def _print_line(self) -> None:
        what = "step " if self.unit is None else ""
        parts = [f"{self.description}: {what}{self._position()}", *self.figures, self._time()]
        self.message(", ".join(part for part in parts if part))

    def _draw(self) -> Group:
        row = Table.grid(padding=(0, 2, 0, 0), expand=True)
        bar = ProgressBar(total=self.total or None, completed=self.done or 0, pulse=self.total == 0)
        beside = [self._position(), *(self.figures if len(self.figures) == 1 else []), self._time()]
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        for _ in beside:
            row.add_column(no_wrap=True, justify="right")
        row.add_row(Text(self.description, style="bold"), bar, *(Text(text) for text in beside))
        return Group(row, Text("  ".join(self.figures), style="dim")) if len(self.figures) > 1 else Group(row)

    def _position(self) -> str:
        done = self.done or 0
        return f"{done:,}/{self.total:,} ({done / self.total:.0%})" if self.total else f"{done:,}"

    def _time(self) -> str:
        elapsed = _duration(self.clock() - self._started)
        if self.total and self.done == self.total:
            return f"in {elapsed}"
        if self.ended:
            return f"stopped after {elapsed}"
        rate = self.rate()
        if rate is None or not self.total:
            return ""
        return f"{_duration((self.total - (self.done or 0)) / rate)} left"


def _describe(name: str, value: float) -> str:
    if name in _FIGURES:
        return _FIGURES[name](value)
    return f"{name.replace('_', ' ')} {value:.4g}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _duration(seconds: float) -> str:
    """Such as 0:07, 12:34 or 3:12:45."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
