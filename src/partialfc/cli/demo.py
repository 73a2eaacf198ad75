"""`partialfc demo`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from partialfc.cli.parser import add_command, show
from partialfc.core.errors import StoppedBySignal
from partialfc.demo import demo


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "demo", run)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of data, run and report")
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="faces and training are functions of it")


def run(options: Namespace) -> None:
    """Train on procedural faces and test on identities never seen: the whole job on this machine."""
    try:
        summary = demo(options.out, seed=options.seed, quiet=options.json)
    except StoppedBySignal as stop:
        stop.args = (str(stop).replace("--resume", "the same command"),)  # the demo goes on by itself
        raise
    show(options, summary.to_dict(), summary.text())
