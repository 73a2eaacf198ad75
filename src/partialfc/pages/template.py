"""The skeleton, style and script of a page: one file, nothing fetched, light and dark, for paper too.

Without the script, which shows values under the pointer and sorts tables, everything is there all the same.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from html import escape
from pathlib import Path

MARKER = '<meta name="generator" content="partialfc report">'

STYLE, SCRIPT = (Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
_POLICY = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{_HASH}'"


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


def render_page(title: str, subtitle: str, body: str, footer: str, notice: str = "") -> str:
    """The whole document. `body` is HTML; the other texts are escaped here; the `notice` is the first line.

    The content security policy keeps a browser from fetching anything, and from executing anything but our script.
    """
    first = f'<p class="notice">{escape(notice)}</p>\n' if notice else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{MARKER}
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{STYLE}</style>
</head>
<body>
<header>
{first}<h1>{escape(title)}</h1>
<p class="soft">{escape(subtitle)}</p>
</header>
<main>
{body}
</main>
<footer>{escape(footer)}</footer>
<script>{SCRIPT}</script>
</body>
</html>
"""
