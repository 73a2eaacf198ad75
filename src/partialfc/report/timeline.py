"""A timeline as inline SVG: what went on at the same time, one row a kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from partialfc.pages.axes import linear_axis, number_format

_WIDTH, _LEFT, _RIGHT, _TOP, _ROW = 560.0, 118.0, 548.0, 8.0, 20.0

Span = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """One kind of thing, and when it went on: (start, stop) in milliseconds, in any order."""

    name: str
    spans: Sequence[Span]


def timeline(rows: Sequence[Row], *, name: str, stop: float) -> str:
    """Bars over the milliseconds from 0 to `stop`; every other row in the second colour.

    Args:
        rows: at least one, from the top.
        name: what is shown.
        stop: where the scale ends; bars are cut there.
    """
    bottom = _TOP + _ROW * len(rows)
    x = linear_axis(0.0, stop, _LEFT, _RIGHT, ticks=6, snug=True)
    label = number_format(x.ticks[1] - x.ticks[0])
    parts = []
    for number, row in enumerate(rows):
        top = _TOP + number * _ROW
        parts.append(f'<text class="y-tick" x="{_LEFT - 6:g}" y="{top + _ROW / 2 + 4:.2f}">{escape(row.name)}</text>')
        color = "orange" if number % 2 else "blue"
        for start, end in _drawn(row.spans, least_gap=stop / (_RIGHT - _LEFT)):
            left, right = x.place(start), x.place(end)
            parts.append(
                f'<rect x="{left:.2f}" y="{top + 3:.2f}" width="{max(right - left, 0.5):.2f}" height="{_ROW - 6:g}" '
                f'fill="var(--{color})"><title>{escape(row.name)}: {start:.1f} to {end:.1f} ms</title></rect>'
            )
    for value in x.ticks:
        at = x.place(value)
        parts.append(
            f'<line class="tick" x1="{at:.2f}" x2="{at:.2f}" y1="{bottom:g}" y2="{bottom + 4:g}"/>'
            f'<text class="x-tick" x="{at:.2f}" y="{bottom + 16:g}">{label(value)}</text>'
        )
    parts.append(
        f'<line class="axis" x1="{_LEFT:g}" x2="{_RIGHT:g}" y1="{bottom:g}" y2="{bottom:g}"/>'
        f'<text class="axis-name" x="{(_LEFT + _RIGHT) / 2:g}" y="{bottom + 32:g}">milliseconds</text>'
    )
    view = f"0 0 {_WIDTH:g} {bottom + 38:g}"
    return f'<svg viewBox="{view}" role="img" aria-label="{escape(name)}">{"".join(parts)}</svg>'


def _drawn(spans: Sequence[Span], least_gap: float) -> list[Span]:
    """The spans in order, those that a gap of less than a pixel parts as one."""
    result: list[Span] = []
    for start, stop in sorted(spans):
        if result and start < result[-1][1] + least_gap:
            result[-1] = (result[-1][0], max(stop, result[-1][1]))
        else:
            result.append((start, stop))
    return result
