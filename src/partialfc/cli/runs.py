"""`partialfc runs`."""

from __future__ import annotations

import shutil
import textwrap
from argparse import Namespace
from pathlib import Path
from typing import Any

from partialfc.cli.parser import add_command, show
from partialfc.core.console import duration_words
from partialfc.report.runs import list_runs

_ORDERS = {
    "name": lambda row: row["run"],
    "age": lambda row: row["age"],
    "best": lambda row: -(row.get("accuracy") or 0.0),
    "state": lambda row: (row["state"], row["run"]),
}


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "runs", run)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), metavar="FOLDER", help="by default, runs")
    parser.add_argument("--sort", choices=_ORDERS, default="name", help="the order of the rows")


def run(options: Namespace) -> None:
    """List the runs below a folder: state, progress, best accuracy, what differs between them, and age."""
    rows = sorted(list_runs(options.folder), key=_ORDERS[options.sort])
    show(options, rows, _text(rows) if rows else f"There is no run in {options.folder} or below.")


def _text(rows: list[dict[str, Any]]) -> str:
    width = max(len("run"), *(len(row["run"]) for row in rows))
    lines = [f"{'run':<{width}}  {'state':<10} {'done':>5} {'best':>7} {'age':>12}"]
    wrap = textwrap.TextWrapper(
        max(60, shutil.get_terminal_size().columns) - 1,
        initial_indent="    ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    for row in rows:
        step, steps, accuracy = row.get("step", 0), row.get("steps"), row.get("accuracy")
        done = f"{step / steps:.0%}" if steps else f"{step:,}"
        best = "" if accuracy is None else f"{accuracy:.2%}"
        lines.append(f"{row['run']:<{width}}  {row['state']:<10} {done:>5} {best:>7} {duration_words(row['age']):>12}")
        changed = " ".join(f"{key}={value}" for key, value in row.get("changed", {}).items())
        lines += wrap.wrap(row.get("reason", changed))
    return "\n".join(lines)
