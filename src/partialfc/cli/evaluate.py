"""`partialfc evaluate`."""

from __future__ import annotations

import sys
from argparse import BooleanOptionalAction, Namespace
from pathlib import Path
from typing import Any

from partialfc.cli.parser import add_benchmarks, add_command, add_device, named_paths, show
from partialfc.core.device import choose_device
from partialfc.evaluation.run import evaluate_benchmarks, table, write_results
from partialfc.model.files import load_model


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "evaluate", run)
    parser.add_argument("model", type=Path, help="model folder or run folder")
    add_benchmarks(parser, required=True)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write results.json and score files there")
    parser.add_argument("--batch-size", type=int, metavar="N", default=256, help="images at once")
    help_ = "add the embeddings of mirrored images, or do not; by default as the model's configuration says"
    parser.add_argument("--flip", action=BooleanOptionalAction, default=None, help=help_)
    add_device(parser)


def run(options: Namespace) -> None:
    """Run benchmarks on a trained model."""
    model = load_model(options.model, choose_device(options.device)).with_flip(options.flip)
    print(f"model: {model.origin}", file=sys.stderr)
    results = evaluate_benchmarks(model, named_paths(options.benchmark), batch_size=options.batch_size)
    if options.out is not None:
        write_results(options.out, results)
    show(options, {name: result.summary() for name, result in results.items()}, table(results))
