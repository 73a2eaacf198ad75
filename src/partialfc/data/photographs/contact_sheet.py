"""What `align` made, on one page to look at."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

from partialfc.data.images import data_uri, decode_image
from partialfc.pages.template import definition_list, render_page

_SPREAD, _DOUBTFUL, _NAMED = 48, 24, 100


def contact_sheet(
    header: dict[str, Any], facts: dict[str, Any], records: Callable[[], Iterator[dict[str, Any]]], folder: Path
) -> str:
    """The page, as HTML that is complete in itself.

    Args:
        header: of the record: where the photographs were, and what found the faces.
        facts: the numbers of the set, among them `crops` and `left_out`.
        records: reads the record from its start.
        folder: where the crops are.
    """

    def faces() -> Iterator[dict[str, Any]]:
        return (face for record in records() for face in record.get("faces", []))

    numbers = [(name.replace("_", " "), f"{value:,}") for name, value in facts.items() if isinstance(value, int)]
    finder = [(name, str(value)) for name, value in header["finder"].items() if isinstance(value, str)]
    files = [(name, f"SHA-256 {digest[:16]}…") for name, digest in header["finder"].get("sha256", {}).items()]
    left_out = (f"{one['photograph']}: {one['left_out']}" for one in records() if "left_out" in one)
    lines = [*islice(left_out, _NAMED), *([f"… {facts['left_out']:,} in all"] if facts["left_out"] > _NAMED else [])]
    sections = {
        "Figures": f'<div class="card">{definition_list([*numbers, *finder, *files])}</div>',
        "Crops, spread over the set": _pictures(islice(faces(), 0, None, -(-facts["crops"] // _SPREAD)), folder),
    }
    if facts["crops"] > _SPREAD:
        lowest = heapq.nsmallest(_DOUBTFUL, faces(), key=lambda face: face["score"])
        farthest = heapq.nlargest(_DOUBTFUL, faces(), key=lambda face: face["residual"])
        sections |= {"The lowest scores": _pictures(lowest, folder)}
        sections |= {"The farthest from the template": _pictures(farthest, folder)}
    if lines:
        items = "".join(f"<li>{escape(line)}</li>" for line in lines)
        sections["Left out"] = f'<ul class="card notes">{items}</ul>'
    body = "\n".join(f"<h2>{title}</h2>{content}" for title, content in sections.items())
    footer = "Written by partialfc align. The page is complete in itself and loads nothing."
    return render_page("Aligned faces", header["photographs"], body, footer)


def _pictures(faces: Iterable[dict[str, Any]], folder: Path) -> str:
    figures = [
        f'<figure><img src="{data_uri(decode_image((folder / face["crop"]).read_bytes()))}" alt="">'
        f"score {face['score']:.3f}, {face['residual']:.1f} px<br>"
        f'<span class="soft">{escape(face["crop"])}</span></figure>'
        for face in faces
    ]
    return f'<div class="faces">{"".join(figures)}</div>'
