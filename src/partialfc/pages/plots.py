"""Plots as inline SVG: pure functions from numbers to text, coloured by the classes of the page's style sheet.

A plot has a fixed inner size and scales with the page. Its values are also text: each vertical strip has a <title>,
which a browser shows on hovering and the page's script under the pointer and the arrow keys, and the plot has a label
for screen readers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from partialfc.pages.axes import (
    Axis,
    Format,
    decade_format,
    linear_axis,
    log_axis,
    number_format,
    percent_format,
    value_format,
)

Floats = NDArray[np.float64]

WIDTH, HEIGHT = 360.0, 196.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 348.0, 10.0, 158.0
COLOURS = 6  # of lines; a seventh looks like the first

_MAX_POINTS = 800  # of a path: more than the pixels that it covers on most screens
_MAX_STRIPS = 100
_MAX_DOTS = 40
_LOG_FROM = 50.0  # the ratio of largest to smallest value from which a logarithmic scale is used


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: "" for one that tooltips leave out.
        x: (N,), ascending.
        y: (N,); a value that is not finite interrupts the curve.
        low, high: (N,), the ends of a band around it.
        look: classes of the style sheet; by default the colour of the line's place among the others.
        shape: an area has a bin of equal width around each x.
    """

    name: str
    x: ArrayLike
    y: ArrayLike
    low: ArrayLike | None = None
    high: ArrayLike | None = None
    look: str = ""
    shape: Literal["line", "dots", "area"] = "line"

    def columns(self) -> tuple[Floats, Floats]:
        """x and y as arrays."""
        return np.asarray(self.x, dtype=np.float64), np.asarray(self.y, dtype=np.float64)


@dataclass(frozen=True)
class Scale:
    """What an axis shows.

    Attributes:
        name: of the values.
        unit: what a tooltip calls a value, such as "step".
        ends: values that the axis holds, whatever the lines do.
        kind: "count" for whole numbers, "share" for percentages.
        log: logarithmic; None if all values are positive and span more than a factor of 50.
        snug: end at the smallest and largest value, not at a tick.
    """

    name: str
    unit: str = ""
    ends: Sequence[float] = ()
    kind: Literal["number", "count", "share"] = "number"
    log: bool | None = False
    snug: bool = False

    def axis(self, values: Floats, start: float, stop: float) -> Axis:
        """For values (N,), of which those that are not finite do not count; at least one does."""
        values = values[np.isfinite(values)]
        low, high = float(values.min()), float(values.max())
        if self.log or (self.log is None and low > 0 and high / low > _LOG_FROM):
            positive = values[values > 0]
            return log_axis(float(min(positive, default=0.1)), float(max(positive, default=1.0)), start, stop)
        low, high = min([low, *self.ends]), max([high, *self.ends])
        least = float(self.kind == "count")
        return linear_axis(low, max(high, low + least), start, stop, snug=self.snug, least_step=least)

    def ticks(self, axis: Axis) -> Format:
        """The format of the axis's labels."""
        if axis.log:
            return decade_format
        step = axis.ticks[1] - axis.ticks[0] if len(axis.ticks) > 1 else axis.high
        return (percent_format if self.kind == "share" else number_format)(step)

    def words(self, value: float) -> str:
        """A value in a tooltip."""
        if self.kind == "share":
            return f"{value:.2%}" if abs(value) >= 1e-3 or not value else f"{100 * value:.3g}%"
        return f"{value:,.0f}" if self.kind == "count" else value_format(value)


def chart(
    lines: Sequence[Line],
    *,
    name: str,
    x: Scale,
    y: Scale,
    marks: Sequence[float] = (),
    threshold: float | None = None,
) -> str:
    """Curves over a common axis.

    Args:
        lines: at least one, of which one has a finite value.
        name: of the plot.
        marks: x of events, ticks at the foot of the plot.
        threshold: x of a line from top to bottom that is labelled so.
    """
    pairs = [
        (line, line.look or f"s{1 + place % COLOURS}")
        for place, line in enumerate(lines)
        if np.isfinite(line.columns()[1]).any()
    ]
    shown, looks = [line for line, _ in pairs], [look for _, look in pairs]
    extent = [part for line in shown for part in (line.y, line.low, line.high) if part is not None]
    values = np.concatenate([np.asarray(part, np.float64) for part in extent])
    across = np.concatenate([line.columns()[0] for line in shown] + [[] if threshold is None else [threshold]])
    x_axis = x.axis(across, LEFT, RIGHT)
    y_axis = y.axis(np.clip(values, 0, 1) if y.kind == "share" else values, BOTTOM, TOP)
    parts = [_frame(x_axis, y_axis, x.ticks(x_axis), y.ticks(y_axis), x.name)]
    for line, look in zip(shown, looks, strict=True):
        parts.append(_drawn(x_axis, y_axis, line, look))
    if len(marks):
        at = sorted({round(x_axis.place(mark)) for mark in marks})
        parts.append(f'<path class="mark" d="{"".join(f"M{place} {BOTTOM:g}v-8" for place in at)}"/>')
    if threshold is not None:
        parts.append(_threshold(x_axis.place(threshold), threshold))
    parts.append(_strips(x_axis, y_axis, shown, looks, x, y))
    return _svg(parts, _summary(name, shown, x, y, len(marks)))


def thin(y: Floats, most: int = _MAX_POINTS) -> NDArray[np.int64]:
    """The places of at most about `most` points of y (N,) that look like all of them.

    Of each stretch remain its ends, its extremes and a gap.
    """
    size = math.ceil(len(y) / max(most // 4, 1))
    if len(y) <= most or size < 2:
        return np.arange(len(y))
    starts = np.arange(0, len(y), size)
    rows = np.pad(y, (0, len(starts) * size - len(y)), mode="edge").reshape(len(starts), size)
    gaps = ~np.isfinite(rows)
    extremes = np.where(gaps, np.inf, rows).argmin(axis=1), np.where(gaps, -np.inf, rows).argmax(axis=1)
    places = [starts, starts + size - 1, *(starts + at for at in extremes), (starts + gaps.argmax(axis=1))]
    return np.unique(np.minimum(np.concatenate(places), len(y) - 1))


# -- parts of a plot -------------------------------------------------------------------------------------------------


def _svg(parts: Sequence[str], summary: str) -> str:
    label = escape(summary)
    return f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _summary(name: str, lines: Sequence[Line], x: Scale, y: Scale, marks: int) -> str:
    """First and last value of each line, in words."""
    texts = []
    for line in lines:
        if not line.name:
            continue
        across, values = line.columns()
        finite = np.flatnonzero(np.isfinite(values))
        ends = [f"{y.words(values[at])} at {x.unit} {x.words(across[at])}" for at in dict.fromkeys(finite[[0, -1]])]
        texts.append(f"{line.name} {', '.join(ends)}")
    return f"{name}: {'; '.join(texts)}{f'; {marks:,} marks' if marks else ''}"


def _frame(x: Axis, y: Axis, x_format: Format, y_format: Format, x_name: str) -> str:
    """Grid, ticks and the name of the horizontal axis."""
    parts = []
    for value in y.ticks:
        at = y.place(value)
        parts.append(
            f'<line class="grid-line" x1="{LEFT:g}" x2="{RIGHT:g}" y1="{at:.2f}" y2="{at:.2f}"/>'
            f'<text class="y-tick" x="{LEFT - 6:g}" y="{at + 3.5:.2f}">{y_format(value)}</text>'
        )
    return "".join([*parts, horizontal_axis(x, BOTTOM, x_format, x_name)])


def horizontal_axis(x: Axis, bottom: float, x_format: Format, name: str) -> str:
    """The line of an axis at height `bottom`, its ticks with labels, and its name."""
    parts = []
    for value in x.ticks:
        at = x.place(value)
        parts.append(
            f'<line class="tick" x1="{at:.2f}" x2="{at:.2f}" y1="{bottom:g}" y2="{bottom + 4:g}"/>'
            f'<text class="x-tick" x="{at:.2f}" y="{bottom + 16:g}">{x_format(value)}</text>'
        )
    parts.append(
        f'<line class="axis" x1="{x.start:g}" x2="{x.stop:g}" y1="{bottom:g}" y2="{bottom:g}"/>'
        f'<text class="axis-name" x="{(x.start + x.stop) / 2:g}" y="{bottom + 32:g}">{escape(name)}</text>'
    )
    return "".join(parts)


def _drawn(x: Axis, y: Axis, line: Line, look: str) -> str:
    """The band, the curve, and its points if they are few."""
    across, values = line.columns()
    if line.shape == "area":
        half = (across[1] - across[0]) / 2
        ends = np.stack([across - half, across + half], axis=1).ravel()
        outline = np.concatenate([[0.0], values.repeat(2), [0.0]])
        return _path(x, y, ends[[0, *range(len(ends)), -1]], outline, f"area {look}", close="Z")
    parts = []
    if line.low is not None and line.high is not None:
        ends = np.concatenate([across, across[::-1]])
        corners = np.concatenate([np.asarray(line.high), np.asarray(line.low)[::-1]])
        known = np.isfinite(corners)
        parts.append(_path(x, y, ends[known], corners[known], f"band {look}", close="Z"))
    if line.shape == "line":
        kept = thin(values)
        parts.append(_path(x, y, across[kept], values[kept], f"line {look}"))
    if line.name and (line.shape == "dots" or len(across) <= _MAX_DOTS):
        parts += [
            _dot(x, y, *point, f"dot {look}") for point in zip(across, values, strict=True) if np.isfinite(point[1])
        ]
    return "".join(parts)


def _path(x: Axis, y: Axis, across: Floats, values: Floats, look: str, close: str = "") -> str:
    """A curve, interrupted by each value that is not finite; `close` is "Z" for an outline."""
    words, drawing = [], False
    for step, value in zip(across.tolist(), values.tolist(), strict=True):
        if math.isfinite(value):
            words.append(f"{'L' if drawing else 'M'}{x.place(step):.2f} {y.place(value):.2f}")
        drawing = math.isfinite(value)
    return f'<path class="{look}" d="{"".join(words)}{close}"/>'


def _dot(x: Axis, y: Axis, across: float, value: float, look: str) -> str:
    return f'<circle class="{look}" cx="{x.place(across):.2f}" cy="{y.place(value):.2f}" r="2.5"/>'


def _threshold(at: float, value: float) -> str:
    side, anchor = (-5, "end") if at > (LEFT + RIGHT) / 2 else (5, "start")
    return (
        f'<line class="threshold" x1="{at:.2f}" x2="{at:.2f}" y1="{TOP:g}" y2="{BOTTOM:g}"/>'
        f'<text class="mark-name" x="{at + side:.2f}" y="{TOP + 9:g}" text-anchor="{anchor}">'
        f"threshold {value:.3f}</text>"
    )


def _strips(x: Axis, y: Axis, lines: Sequence[Line], looks: Sequence[str], x_scale: Scale, y_scale: Scale) -> str:
    """Strips over the plot, each with the values near one x and marks that show while the pointer is on it."""
    named = [(line, look) for line, look in zip(lines, looks, strict=True) if line.name]
    known = []
    for line, look in named:
        across, values = line.columns()
        finite = np.isfinite(values)
        ends = [None if end is None else np.asarray(end)[finite] for end in (line.low, line.high)]
        known.append((line.name, look, across[finite], values[finite], ends))
    most = _MAX_STRIPS // max(len(known), 1)
    positions = np.unique(np.concatenate([across[thin(values, most)] for _, _, across, values, _ in known]))
    at = [x.place(position) for position in positions]
    borders = [LEFT, *[(left + right) / 2 for left, right in pairwise(at)], RIGHT]
    parts = []
    for position, (left, right) in zip(positions.tolist(), pairwise(borders), strict=True):
        texts, dots = [], []
        for name, look, across, values, (low, high) in known:
            if not across[0] <= position <= across[-1]:
                continue
            after = min(int(np.searchsorted(across, position)), len(across) - 1)
            near = after - (after > 0 and position - across[after - 1] < across[after] - position)
            band = (
                "" if low is None or high is None else f" ({y_scale.words(low[near])} to {y_scale.words(high[near])})"
            )
            texts.append(f"{name} {y_scale.words(values[near])}{band}")
            dots.append(_dot(x, y, across[near], values[near], f"dot {look}"))
        words = escape(f"{x_scale.unit} {x_scale.words(position)}: {', '.join(texts)}")
        rect = f'<rect x="{left:.2f}" y="{TOP:g}" width="{right - left:.2f}" height="{BOTTOM - TOP:g}"/>'
        parts.append(f'<g class="strip"><title>{words}</title>{rect}{"".join(dots)}</g>')
    return "".join(parts)
