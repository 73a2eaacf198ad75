"""The skeleton and the style of a page: one file, no scripts, nothing fetched, light and dark, for paper too."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

MARKER = '<meta name="generator" content="partialfc report">'

LIGHT = """
    --paper: #f9f9f7; --card: #ffffff; --ink: #0b0b0b; --soft: #52514e; --faint: #75736c; --grid: #e5e4dd;
    --line: #c3c2b7; --blue: #2a78d6; --orange: #d9581f; --wrong: #c42b2b; --plain: #a9a79d;
"""
_DARK = """
    --paper: #0f0f0e; --card: #1a1a19; --ink: #ffffff; --soft: #c3c2b7; --faint: #97958c; --grid: #2f2f2c;
    --line: #4a4944; --blue: #4a97ef; --orange: #ea6d38; --wrong: #f07373; --plain: #6b6a63;
"""
_COLORS = f"""
:root {{ color-scheme: light dark; {LIGHT} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
"""
RULES = """
* { box-sizing: border-box; }
body {
    margin: 0; padding: 2rem 1rem 3rem; background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
    font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main, header, footer { max-width: 68rem; margin: 0 auto; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.75rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 0.25rem; }
p { margin: 0.35rem 0; max-width: 46rem; }
.soft, .hint, footer { color: var(--soft); }
.hint { font-size: 0.82rem; line-height: 1.35; }
.card { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; padding: 1rem 1.1rem; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); }
.wide { grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
.headline { margin-top: 1.25rem; }
.tiles { display: flex; flex-wrap: wrap; gap: 0.5rem 3rem; }
.tile .name { color: var(--soft); font-size: 0.9rem; }
.tile .figure { font-size: 2.6rem; font-weight: 650; line-height: 1.15; letter-spacing: -0.02em; }
.tile .figure small { font-size: 1.1rem; font-weight: 400; color: var(--soft); letter-spacing: 0; }
.bars { display: grid; grid-template-columns: fit-content(40%) 1fr auto; gap: 0.45rem 0.8rem; margin-top: 1rem;
    align-items: center; font-size: 0.9rem; }
.bars .track { position: relative; height: 1.05rem; background: var(--grid); border-radius: 3px; }
.bars .fill { position: absolute; inset: 0 auto 0 0; background: var(--plain); border-radius: 3px; }
.bars .model .fill { background: var(--blue); }
.bars .whisker { position: absolute; top: 50%; height: 2px; margin-top: -1px; background: var(--ink); }
.bars .value { font-variant-numeric: tabular-nums; white-space: nowrap; }
.bars .ends { display: flex; justify-content: space-between; color: var(--faint); font-size: 0.78rem; }
.row { display: contents; }
dl { display: grid; gap: 0.8rem 1.5rem; margin: 0;
    grid-template-columns: repeat(auto-fill, minmax(min(13rem, 45%), 1fr)); }
dt { color: var(--soft); font-size: 0.82rem; }
dd { margin: 0; }
figure { margin: 0; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem; }
figcaption b { font-weight: 600; }
figcaption span { color: var(--soft); font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; margin: 0.35rem 0; font-size: 12px; }
svg text { fill: var(--faint); font-variant-numeric: tabular-nums; }
.y-tick { text-anchor: end; }
.x-tick, .axis-name { text-anchor: middle; }
.grid-line { stroke: var(--grid); }
.tick, .axis { stroke: var(--line); }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.s1 { stroke: var(--blue); }
.s2 { stroke: var(--orange); stroke-dasharray: 5 3; }
.chance { stroke: var(--plain); stroke-dasharray: 3 3; stroke-width: 1.2; }
.band { fill: var(--blue); fill-opacity: 0.16; stroke-opacity: 0.3; stroke-width: 1; }
.dot { fill: var(--card); stroke-width: 1.6; }
.area { stroke-width: 1.5; fill-opacity: 0.28; stroke-linejoin: round; }
.genuine { fill: var(--blue); stroke: var(--blue); }
.impostor { fill: var(--orange); stroke: var(--orange); }
.threshold { stroke: var(--ink); stroke-width: 1.2; }
svg .mark-name { fill: var(--ink); }
.strip rect { fill: var(--ink); fill-opacity: 0; }
.strip .dot { opacity: 0; }
.strip:hover rect { fill-opacity: 0.07; }
.strip:hover .dot { opacity: 1; }
.key { display: inline-block; width: 0.7rem; height: 0.7rem; border-radius: 2px; margin: 0 0.3rem 0 0.8rem; }
.key.genuine { background: var(--blue); }
.key.impostor { background: var(--orange); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { text-align: right; padding: 0.3rem 0.9rem 0.3rem 0; border-bottom: 1px solid var(--grid); }
th { color: var(--soft); font-weight: 500; }
th:first-child, td:first-child { text-align: left; }
.scroll { overflow-x: auto; }
.faces { display: grid; gap: 0.8rem; margin-top: 0.6rem; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
.faces figure { font-size: 0.8rem; line-height: 1.3; }
.faces .two { display: grid; grid-template-columns: 1fr 1fr; gap: 2px; margin-bottom: 0.25rem; }
.faces img { width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 4px; background: var(--grid); }
.faces .wrong { color: var(--wrong); font-weight: 600; }
.notes { margin: 0; padding-left: 2.2rem; }
.figures { margin-top: 1rem; }
details { margin-top: 1rem; }
summary { cursor: pointer; font-weight: 600; }
pre { font: 0.82rem/1.45 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; }
footer { margin-top: 2.5rem; font-size: 0.82rem; }
@media (min-width: 60rem) { .wide svg { font-size: 10px; } }
@media print {
    body { padding: 0; font-size: 11pt; background: none; }
    * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
    .card, figure, .row, tr, h2 + * { break-inside: avoid; }
    h2, h3 { break-after: avoid; }
    .grid { grid-template-columns: 1fr 1fr; }
}
"""


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
<style>{_COLORS}{RULES}</style>
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
