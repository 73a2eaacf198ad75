"""Progress of a job on standard error: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

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


class _LastingConsole(Console):
    """A console that goes quiet, instead of ending the process as rich does, once its reader (`tee`) has closed."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def say(text: str, console: Console | None = None) -> None:
    """Print a line, by default on standard error; a terminal shows it broken between words."""
    console = console or _LastingConsole(stderr=True)
    console.print(text, markup=False, highlight=False, soft_wrap=not console.is_terminal)


class Progress:
    """The progress of one job, as a context manager: amount done, figures, rate and time left.

    On a terminal it is a bar with the figures below it, drawn by `update` and once a second by another thread, so that
    a long step is seen to go on; otherwise it is a line at the start, about every ten seconds, and at the end.

    Args:
        description: a word or two in front of the bar, such as "reading".
        total: the amount to do, including what an earlier process has done; 0 if only `update` knows it.
        unit: the counted item, in the singular, whose rate is shown; None counts steps and shows no rate.
        quiet: show nothing (for --json, and on ranks other than the first).
        console: the output; None is standard error.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        description: str,
        total: int = 0,
        *,
        unit: str | None = "image",
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.description, self.total, self.unit = description, total, unit
        self._console = console or _LastingConsole(stderr=True)
        self._clock, self._shown = clock, not quiet
        self._done: int | None = None
        self._figures: list[str] = []
        self._given: dict[str, float] = {}
        self._ended = False
        self._samples: deque[tuple[float, int]] = deque()
        self._started = clock()
        self._shown_at: float | None = None
        self._shown_done: int | None = None
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        self._started = self._clock()
        if self._shown and self._console.is_terminal and not self._console.is_dumb_terminal:
            # Standard output stays as it is: it may be a file that waits for results.
            self._live = Live(
                get_renderable=self._draw, console=self._console, refresh_per_second=1, redirect_stdout=False
            )
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        if self._live is not None:
            self._live.stop()
        elif self._shown and self._done is not None and self._done != self._shown_done:
            self._print_line()

    def update(self, done: int, total: int | None = None, **figures: float) -> None:
        """Show the amount done and the figures of the last part.

        Args:
            done: amount done.
            total: the amount to do, where it was not known before.
            figures: epoch, loss, target_cosine, lr, images_per_second and data_wait (the share of time, 0 to 1, that a
                step waits for data) are shown with their units, any other under its name; without any, the last ones.
        """
        now = self._clock()
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[1][0] >= _SECONDS_OF_RATE:
            self._samples.popleft()
        self._done, self.total = done, self.total if total is None else total
        self._given = figures or self._given
        self._figures = [_describe(name, value) for name, value in self._given.items()]
        if self.unit is not None and (rate := self._rate()) is not None:
            self._figures.append(f"{_count(rate)} {self.unit}s/s")
        if not self._shown:
            return
        wait = _SECONDS_BETWEEN_LINES if self._live is None else _SECONDS_BETWEEN_DRAWINGS
        if self._shown_at is None or now - self._shown_at >= wait:
            self._shown_at, self._shown_done = now, done
            if self._live is None:
                self._print_line()
            else:
                self._live.refresh()

    def message(self, text: str) -> None:
        """Print a permanent line above the bar."""
        if self._shown:
            say(text, self._console)

    def _rate(self) -> float | None:
        """Units per second over the last half minute, None while unknown."""
        if len(self._samples) < 2:
            return None
        (then, first), (now, last) = self._samples[0], self._samples[-1]
        return (last - first) / (now - then) if now > then and last > first else None

    def _print_line(self) -> None:
        what = "step " if self.unit is None else ""
        parts = [f"{self.description}: {what}{self._position()}", *self._figures, self._time()]
        self.message(", ".join(part for part in parts if part))

    def _draw(self) -> Group:
        # A Ctrl-C is shown as ^C behind the last character, and would break a full line in two.
        row = Table.grid(padding=(0, 2, 0, 0), expand=True)
        row.width = self._console.width - 2
        bar = ProgressBar(total=self.total or None, completed=self._done or 0, pulse=self.total == 0)
        beside = [self._position(), *(self._figures if len(self._figures) == 1 else []), self._time()]
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        for _ in beside:
            row.add_column(no_wrap=True, justify="right")
        row.add_row(Text(self.description, style="bold"), bar, *(Text(text) for text in beside))
        return Group(row, Text("  ".join(self._figures), style="dim")) if len(self._figures) > 1 else Group(row)

    def _position(self) -> str:
        done = self._done or 0
        return f"{done:,}/{self.total:,} ({done / self.total:.0%})" if self.total else f"{done:,}"

    def _time(self) -> str:
        elapsed = _duration(self._clock() - self._started)
        if self.total and self._done == self.total:
            return f"in {elapsed}"
        if self._ended:
            return f"stopped after {elapsed}"
        rate = self._rate()
        if not self.total:
            return ""
        if rate is None:
            seen = self._clock() - self._started >= 1
            return f"estimating time left, {elapsed} so far" if seen else "estimating time left"
        return f"{_duration((self.total - (self._done or 0)) / rate)} left"


def _describe(name: str, value: float) -> str:
    if name in _FIGURES:
        return _FIGURES[name](value)
    return f"{name.replace('_', ' ')} {value:.4g}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def counted(number: int, noun: str) -> str:
    """1 step, 1,000 steps, 2 identities."""
    several = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else several}"


def duration_words(seconds: float) -> str:
    """90 s, 100 min, 3 h 05 min or 4 days."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes < 2 * 24 * 60 else f"{minutes // 1440} days"


def _duration(seconds: float) -> str:
    """0:07, 12:34 or 3:12:45."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
