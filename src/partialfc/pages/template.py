"""The skeleton and the style of a page: one file, no scripts, nothing fetched, light and dark, for paper too."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

MARKER = '<meta name="generator" content="partialfc report">'

STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def is_page(path: Path) -> bool:
    """Whether the file is a page that was made here, and may be replaced by another."""
    try:
        with path.open("rb") as file:
            return MARKER.encode() in file.read(4096)
    except OSError:
        return False


def definition_list(entries: Iterable[tuple[str, str]]) -> str:
    """Terms and their values as a <dl>; both are escaped here."""
    items = [f"<div><dt>{escape(term)}</dt><dd>{escape(value)}</dd></div>" for term, value in entries]
    return f"<dl>{''.join(items)}</dl>"


def render_page(title: str, subtitle: str, body: str, footer: str) -> str:
    """The whole document. `body` is HTML; the other texts are escaped here.

    The content security policy keeps a browser from fetching or executing anything.
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{MARKER}
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="soft">{escape(subtitle)}</p>
</header>
<main>
{body}
</main>
<footer>{escape(footer)}</footer>
</body>
</html>
"""
