"""Puts what a benchmark measured between its markers of a document.

As a program it writes docs/commands.md and the table of docs/reproduce.md.
"""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from partialfc.cli import build_parser
from partialfc.cli.parser import Parser
from partialfc.config.recipes import GPU_HOURS, RECIPES, SCORES, data_set

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


def commands_below(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of all commands below it."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from commands_below(below)


def command_pages() -> str:
    """docs/commands.md: the help of every command at 80 columns."""
    os.environ["COLUMNS"] = "80"
    parts = ["# Commands", "", "What `--help` of each command prints, and `--help-all` of `train`.", ""]
    for parser in commands_below(build_parser()):
        assert isinstance(parser, Parser)
        text = parser.format_help(everything=parser.prog == "partialfc train").rstrip()
        parts += [f"## {parser.prog}", "", "```text", text, "```", ""]
    return "\n".join(parts)


def recipe_table() -> list[str]:
    """The table of docs/reproduce.md: every recipe for a public data set, with what it takes and what to expect."""
    lines = ["| recipe | data | GPUs | GPU-hours | MFR-ALL | IJB-C 1e-4 | 1e-5 |", "|---|---|---|---|---|---|---|"]
    for name, config in RECIPES.items():
        if (data := data_set(name)) is not None:
            scores = [f"{score:.2f}" for score in SCORES.get(name, ())] or ["–"] * 3
            cells = [f"`{name}`", data[0], str(config.data.fewest_processes), f"{GPU_HOURS[name]:,.0f}", *scores]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    write_between("reproduce.md", "benchmarks/documents.py", recipe_table())
    (DOCS / "commands.md").write_text(command_pages(), encoding="utf-8")
