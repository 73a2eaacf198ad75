"""A timeline as SVG, and plots as files of their own for docs/images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from partialfc.pages.axes import linear_axis, number_format
from partialfc.pages.plots import horizontal_axis
from partialfc.pages.template import STYLE

_WIDTH, _LEFT, _RIGHT, _TOP, _ROW = 560.0, 118.0, 548.0, 8.0, 20.0

Span = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """One kind of activity, and its intervals: (start, stop) in milliseconds, in any order."""

    name: str
    spans: Sequence[Span]


def timeline(rows: Sequence[Row], *, name: str, stop: float) -> str:
    """Bars over the milliseconds from 0 to `stop`; every other row in the second colour.

    Args:
        rows: at least one, from the top.
        name: of the plot.
        stop: the end of the scale; bars are cut there.
    """
    bottom = _TOP + _ROW * len(rows)
    x = linear_axis(0.0, stop, _LEFT, _RIGHT, ticks=6, snug=True)
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
    parts.append(horizontal_axis(x, bottom, number_format(x.ticks[1] - x.ticks[0]), "milliseconds"))
    view = f"0 0 {_WIDTH:g} {bottom + 38:g}"
    return f'<svg viewBox="{view}" role="img" aria-label="{escape(name)}">{"".join(parts)}</svg>'


def standalone_svg(svg: str) -> str:
    """A plot of `partialfc.pages` or a timeline as a file of its own."""
    opening, rest = svg.split(">", 1)
    style = f"{STYLE}svg {{ background: var(--card); font-family: sans-serif; }}"
    return f'{opening} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>{rest}\n'


def _drawn(spans: Sequence[Span], least_gap: float) -> list[Span]:
    """The spans in order, those with a gap of less than a pixel merged."""
    result: list[Span] = []
    for start, stop in sorted(spans):
        if result and start < result[-1][1] + least_gap:
            result[-1] = (result[-1][0], max(stop, result[-1][1]))
        else:
            result.append((start, stop))
    return result
