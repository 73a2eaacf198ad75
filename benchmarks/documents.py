"""Puts what a benchmark measured between its markers of a document."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
_COLUMNS = 100  # of prose; tables are as wide as they are


def write_between(document: str, name: str, lines: Sequence[str]) -> None:
    """Replace the lines between `<!-- NAME begin -->` and `<!-- NAME end -->` in `document`, a path from docs/."""
    begin, end = f"<!-- {name} begin -->", f"<!-- {name} end -->"
    path = DOCS / document
    before, rest = path.read_text().split(begin)
    path.write_text("\n".join([before + begin, *lines, end + rest.split(end)[1]]))


def paragraph(text: str) -> list[str]:
    """Prose in lines that fit the documents."""
    return textwrap.wrap(text, _COLUMNS)


def items(texts: Sequence[str]) -> list[str]:
    """A list of Markdown in lines that fit the documents."""
    return [line for text in texts for line in textwrap.wrap(f"- {text}", _COLUMNS, subsequent_indent="  ")]
