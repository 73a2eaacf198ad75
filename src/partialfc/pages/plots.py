"""Plots as inline SVG: pure functions from numbers to text, coloured by the classes of the page's style sheet.

A plot has a fixed inner size and scales with the page. Its values are also text: each vertical strip has a <title>,
which a browser shows on hovering, and the plot has a label for screen readers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

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

Point = tuple[float, float]

WIDTH, HEIGHT = 360.0, 196.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 348.0, 10.0, 158.0

_MAX_POINTS = 1200  # of a path: more than the pixels that it covers on any screen
_MAX_STRIPS = 100
_MAX_DOTS = 40
_LOG_FROM = 50.0  # the ratio of largest to smallest value from which a logarithmic scale is used


@dataclass(frozen=True)
class Line:
    """One curve. Points ascend in x; one whose y is not finite interrupts the curve."""

    name: str
    points: Sequence[Point]


def line_chart(
    lines: Sequence[Line],
    *,
    name: str,
    last_step: float,
    percent: bool = False,
    from_zero: bool = False,
    may_log: bool = False,
    spread: Sequence[float] = (),
) -> str:
    """Curves over the optimizer step.

    Args:
        lines: at least one; the first has a finite value and gives the tooltips.
        name: of the values.
        last_step: the end of the horizontal scale, which begins at 0; no point lies beyond.
        percent: write values as percentages.
        from_zero: begin the vertical scale at 0, unless it is logarithmic.
        may_log: use a logarithmic scale if all values are positive and span more than a factor of 50.
        spread: half the height of the shaded band around the first line, for each of its points.
    """
    values = [y for line in lines for _, y in line.points if math.isfinite(y)]
    main = lines[0].points
    reach = [y + side * half for (_, y), half in zip(main, spread, strict=False) for side in (-1, 1)]
    low, high = min(values), max(values)
    for value in filter(math.isfinite, reach):
        value = min(max(value, 0.0), 1.0) if percent else value
        low, high = min(low, value), max(high, value)
    x = linear_axis(0.0, max(last_step, 1.0), LEFT, RIGHT, snug=True, least_step=1.0)
    log = may_log and low > 0 and high / low > _LOG_FROM
    low = min(low, 0.0) if from_zero and not log else low
    y = log_axis(low, high, BOTTOM, TOP) if log else linear_axis(low, high, BOTTOM, TOP)
    tick_format = decade_format if log else (percent_format if percent else number_format)(y.ticks[1] - y.ticks[0])
    words = "{:.2%}".format if percent else value_format
    parts = [_frame(x, y, number_format(1), tick_format, "optimizer step")]
    if spread:
        parts.append(_band(x, y, main, spread))
    for number, line in enumerate(lines):
        parts.append(_path(x, y, thin(line.points), f"line s{number + 1}"))
        if len(line.points) <= _MAX_DOTS:
            parts += [_dot(x, y, point, f"dot s{number + 1}") for point in line.points if math.isfinite(point[1])]
    parts.append(_curve_strips(x, y, lines, words))
    finite = [point for point in main if math.isfinite(point[1])]
    summary = f"{name}: {words(finite[0][1])} at step {finite[0][0]:,.0f}"
    if len(finite) > 1:
        summary += f", {words(finite[-1][1])} at step {finite[-1][0]:,.0f}"
    return _svg(parts, summary)


def thin(points: Sequence[Point], most: int = _MAX_POINTS) -> Sequence[Point]:
    """At most about `most` points that look like all of them: the ends and the extremes of each stretch remain."""
    if len(points) <= most:
        return points
    result: list[Point] = []
    for stretch in np.array_split(np.arange(len(points)), most // 4):
        finite = [index for index in stretch if math.isfinite(points[index][1])]
        extremes = [min(finite, key=lambda i: points[i][1]), max(finite, key=lambda i: points[i][1])] if finite else []
        result += [points[index] for index in sorted({stretch[0], *extremes, stretch[-1]})]
    return result


def histogram(genuine: NDArray[np.float64], impostor: NDArray[np.float64], threshold: float) -> str:
    """The distribution of the cosines of both kinds of pairs, as the share of each kind in a bin, and the threshold.

    Args:
        genuine, impostor: (M,) and (N,), neither empty.
        threshold: the cosine above which a pair is called "same".
    """
    everything = np.concatenate([genuine, impostor, [threshold]])
    x = linear_axis(float(everything.min()), float(everything.max()), LEFT, RIGHT, ticks=6)
    edges = np.linspace(x.low, x.high, 41)
    shares = [np.histogram(np.clip(kind, x.low, x.high), edges)[0] / len(kind) for kind in (impostor, genuine)]
    y = linear_axis(0.0, float(max(share.max() for share in shares)), BOTTOM, TOP)
    parts = [_frame(x, y, number_format(x.ticks[1] - x.ticks[0]), percent_format(y.ticks[1]), "cosine of the pair")]
    ends = edges.repeat(2)  # each bin is as high at its right edge as at its left
    for share, kind in zip(shares, ("impostor", "genuine"), strict=True):
        heights = [0.0, *share.repeat(2), 0.0]
        parts.append(_path(x, y, list(zip(ends, heights, strict=True)), f"area {kind}", close="Z"))
    at = x.place(threshold)
    side, anchor = (-5, "end") if at > (LEFT + RIGHT) / 2 else (5, "start")
    parts.append(
        f'<line class="threshold" x1="{at:.2f}" x2="{at:.2f}" y1="{TOP:g}" y2="{BOTTOM:g}"/>'
        f'<text class="mark-name" x="{at + side:.2f}" y="{TOP + 9:g}" text-anchor="{anchor}">'
        f"threshold {threshold:.3f}</text>"
    )
    for left, right, false, true in zip(edges[:-1], edges[1:], *shares, strict=True):
        words = f"cosine {left:.3f} to {right:.3f}: {true:.1%} of genuine pairs, {false:.1%} of impostors"
        parts.append(_strip(x.place(left), x.place(right), words))
    summary = (
        f"Histogram of cosines: genuine pairs around {np.median(genuine):.3f}, impostors around "
        f"{np.median(impostor):.3f}, threshold {threshold:.3f}"
    )
    return _svg(parts, summary)


def roc_chart(far: NDArray[np.float64], tar: NDArray[np.float64], impostors: int, marked: Sequence[float]) -> str:
    """True accept rate over false accept rate, the latter on a logarithmic scale.

    The height at a rate is the highest TAR whose FAR does not exceed it, so the curve has steps.

    Args:
        far, tar: (K,) operating points, both ascending from 0.
        impostors: number of impostor pairs: rates below its inverse cannot be measured.
        marked: false accept rates that get a dot; those below the scale are left out.
    """
    x = log_axis(1.0 / max(impostors, 2), 1.0, LEFT, RIGHT)
    y = linear_axis(0.0, 1.0, BOTTOM, TOP)

    def reached(rate: float) -> float:
        return float(tar[np.searchsorted(far, rate, side="right") - 1])

    points = [(x.low, reached(x.low))]
    for rate in np.unique(far[far > x.low]):
        if reached(rate) > points[-1][1]:
            points += [(float(rate), points[-1][1]), (float(rate), reached(rate))]
    points.append((1.0, points[-1][1]))
    chance = [(float(rate), float(rate)) for rate in np.geomspace(x.low, 1.0, 60)]
    parts = [
        _frame(x, y, decade_format, percent_format(0.1), "false accept rate (FAR)"),
        _path(x, y, chance, "line chance"),
        _path(x, y, points, "line s1"),
    ]
    parts += [_dot(x, y, (rate, reached(rate)), "dot s1") for rate in marked if x.low <= rate <= 1]
    cuts = np.geomspace(x.low, 1.0, 41)
    for left, right in pairwise(cuts):
        words = f"FAR {value_format(float(right))}: TAR {reached(right):.2%}"
        parts.append(_strip(x.place(left), x.place(right), words))
    summary = "ROC: " + ", ".join(f"TAR {reached(rate):.2%} at FAR {value_format(rate)}" for rate in marked)
    return _svg(parts, summary)


# -- parts of a plot -------------------------------------------------------------------------------------------------


def _svg(parts: Sequence[str], summary: str) -> str:
    label = escape(summary)
    return f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


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


def _path(x: Axis, y: Axis, points: Sequence[Point], css_class: str, close: str = "") -> str:
    """A curve, interrupted by each value that is not finite; `close` is "Z" for an outline."""
    words, drawing = [], False
    for step, value in points:
        if math.isfinite(value):
            words.append(f"{'L' if drawing else 'M'}{x.place(step):.2f} {y.place(value):.2f}")
        drawing = math.isfinite(value)
    return f'<path class="{css_class}" d="{"".join(words)}{close}"/>'


def _dot(x: Axis, y: Axis, point: Point, css_class: str) -> str:
    return f'<circle class="{css_class}" cx="{x.place(point[0]):.2f}" cy="{y.place(point[1]):.2f}" r="2.5"/>'


def _band(x: Axis, y: Axis, points: Sequence[Point], spread: Sequence[float]) -> str:
    """The area between value - spread and value + spread."""
    both = list(zip(points, spread, strict=True))
    corners = [(step, value + half) for (step, value), half in both]
    corners += [(step, value - half) for (step, value), half in reversed(both)]
    return _path(x, y, [point for point in corners if math.isfinite(point[1])], "band s1", close="Z")


def _curve_strips(x: Axis, y: Axis, lines: Sequence[Line], words: Format) -> str:
    """Strips over the plot, each with the values of one step and a mark that shows while the pointer is on it."""
    main = thin([point for point in lines[0].points if math.isfinite(point[1])], _MAX_STRIPS)
    others = [(line.name, dict(line.points)) for line in lines[1:]]
    at = [x.place(step) for step, _ in main]
    borders = [LEFT, *[(left + right) / 2 for left, right in pairwise(at)], RIGHT]
    parts = []
    for (step, value), (left, right) in zip(main, pairwise(borders), strict=True):
        text = f"step {step:,.0f}: {lines[0].name} {words(value)}"
        text += "".join(f", {name} {words(points[step])}" for name, points in others if step in points)
        parts.append(_strip(left, right, text, _dot(x, y, (step, value), "dot s1")))
    return "".join(parts)


def _strip(left: float, right: float, words: str, mark: str = "") -> str:
    rect = f'<rect x="{left:.2f}" y="{TOP:g}" width="{right - left:.2f}" height="{BOTTOM - TOP:g}"/>'
    return f'<g class="strip"><title>{escape(words)}</title>{rect}{mark}</g>'
