"""`partialfc report`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from partialfc.cli.parser import add_benchmarks, add_command, add_device, named_paths, show
from partialfc.core.device import choose_device
from partialfc.evaluation.pairs import evaluate_pair_set
from partialfc.evaluation.run import read_benchmarks
from partialfc.model.files import load_model
from partialfc.report.page import write_report


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "report", run)
    parser.add_argument("folder", type=Path, metavar="RUN", help="run folder")
    add_benchmarks(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page; by default report.html in the run folder")
    parser.add_argument("--title", metavar="TEXT", help="its title")
    add_device(parser)


def run(options: Namespace) -> None:
    """Show one run as one HTML page; with benchmarks, also their scores and the hardest pairs."""
    results, pairs = {}, {}
    if options.benchmark:
        model = load_model(options.folder, choose_device(options.device))
        pairs = read_benchmarks(named_paths(options.benchmark), model.config)
        results = {name: evaluate_pair_set(model, pair_set) for name, pair_set in pairs.items()}
    path = write_report(options.folder, out=options.out, results=results, pairs=pairs, title=options.title)
    show(options, {"report": str(path)}, f"report: {path}")
