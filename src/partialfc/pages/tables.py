"""Tables with their CSV, bars and legends of a page, from plain text that is escaped here."""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from partialfc.pages.plots import COLOURS


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, which the page's script sorts, with a link to the same as CSV.

    Args:
        caption: of the table; the file is named by it.
        head: of the columns; the first column names the rows.
        rows: of as many cells each.
    """
    columns = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td>{escape(text)}</td>" for text in others)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    label = escape(caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><caption>{label}</caption>'
        f"<thead><tr>{columns}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        f'<p class="csv"><a download="{_file_name(caption)}" href="{_csv([head, *rows])}">'
        f'CSV<span class="unseen"> of {label}</span></a></p>'
    )


def _file_name(caption: str) -> str:
    return f"{'-'.join(re.findall(r'[a-z0-9]+', caption.lower()))[:60] or 'table'}.csv"


def _csv(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a data URI. A spreadsheet must not take a text for a formula: such a cell begins with an apostrophe."""
    stream = io.StringIO()
    writer = csv.writer(stream)
    for row in rows:
        writer.writerow([f"'{cell}" if re.match(r"[=@\t\r]|[+-](?![\d.])", cell) else cell for cell in row])
    content = stream.getvalue().encode("utf-8", "replace")
    return f"data:text/csv;charset=utf-8;base64,{base64.b64encode(content).decode('ascii')}"


class Bar(NamedTuple):
    """A value between the two ends of the bars, with the ends of its interval, if there is one."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    is_main: bool = True


def bars(rows: Sequence[Bar], start: float, stop: float, words: Callable[[float], str]) -> str:
    """Bars from `start` to `stop`, each with its value in words and its interval as a whisker."""

    def place(value: float) -> float:
        return 100 * min(max((value - start) / (stop - start), 0.0), 1.0)

    parts = ['<div class="bars">']
    for row in rows:
        whisker = ""
        if row.low is not None and row.high is not None:
            left, right = place(row.low), place(row.high)
            whisker = f'<span class="whisker" style="left:{left:.2f}%;width:{right - left:.2f}%"></span>'
        parts.append(
            f'<div class="row{" model" if row.is_main else ""}"><span>{escape(row.name)}</span><span class="track">'
            f'<span class="fill" style="width:{place(row.value):.2f}%"></span>{whisker}</span>'
            f'<span class="value">{words(row.value)}</span></div>'
        )
    ends = f'<span class="ends"><span>{words(start)}</span><span>{words(stop)}</span></span>'
    return f"{''.join(parts)}<span></span>{ends}<span></span></div>"


def legend(names: Sequence[str]) -> str:
    """The names of lines, each with a sample of it; nothing for a single one."""
    if len(names) < 2:
        return ""
    items = "".join(
        f'<li><svg class="sample" viewBox="0 0 28 10" aria-hidden="true"><path class="line s{1 + place % COLOURS}" '
        f'd="M2 5H26"/></svg>{escape(name)}</li>'
        for place, name in enumerate(names)
    )
    return f'<ul class="legend" aria-label="Lines">{items}</ul>'


def bullets(sentences: Sequence[str]) -> str:
    """Sentences as a list; nothing without one."""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in dict.fromkeys(sentences))
    return f'<ul class="card notes">{items}</ul>' if items else ""


def figure(name: str, svg: str, hint: str, aside: str = "") -> str:
    """A plot in a card, with its name, what stands beside that (HTML), and a sentence on how to read it."""
    return (
        f'<figure class="card"><figcaption><b>{escape(name)}</b><span>{aside}</span></figcaption>'
        f'{svg}<div class="hint">{escape(hint)}</div></figure>'
    )


def folded(summary: str, content: str) -> str:
    """Something that opens on a click."""
    return f'<details class="card"><summary>{escape(summary)}</summary>{content}</details>'
