"""Puts what a benchmark measured between its markers of a document."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def write_between(document: str, name: str, lines: Sequence[str]) -> None:
    """Replace the lines between `<!-- NAME begin -->` and `<!-- NAME end -->` in docs/`document`."""
    begin, end = f"<!-- {name} begin -->", f"<!-- {name} end -->"
    path = DOCS / document
    before, rest = path.read_text().split(begin)
    path.write_text("\n".join([before + begin, *lines, end + rest.split(end)[1]]))
