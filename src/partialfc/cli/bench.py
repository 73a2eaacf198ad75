"""`partialfc bench head`."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

from partialfc.bench.head import bench_head
from partialfc.cli.parser import add_command, add_commands, add_device
from partialfc.core.device import choose_device


def add_parser(commands: Any) -> None:
    what = "Measure the project's own speed and memory."
    commands = add_commands(commands.add_parser("bench", help=what, description=what))
    parser = add_command(commands, "head", run)
    parser.add_argument("--classes", type=int, metavar="N", required=True, help="number of classes")
    parser.add_argument("--embedding-dim", type=int, metavar="N", default=512, help="width of the embeddings")
    parser.add_argument("--batch-size", type=int, metavar="N", default=128, help="images a step")
    rate = "part of the classes that a step uses"
    parser.add_argument("--sample-rate", type=float, metavar="X", default=0.1, help=rate)
    parser.add_argument("--steps", type=int, metavar="N", default=5, help="timed steps of each variant")
    dtypes, rounded = ["both", "float32", "bfloat16"], "dtype that the operands of the products are rounded to"
    parser.add_argument("--operand-dtype", choices=dtypes, default="both", help=rounded)
    parser.add_argument("--baseline", action="store_true", help="also time the dense head of the reference")
    add_device(parser)


def run(options: Namespace) -> None:
    """Time a step of the head and measure its memory, one line of JSON a variant."""
    for line in bench_head(
        num_classes=options.classes,
        embedding_dim=options.embedding_dim,
        batch_size=options.batch_size,
        sample_rate=options.sample_rate,
        steps=options.steps,
        baseline=options.baseline,
        operand_dtype=None if options.operand_dtype == "both" else options.operand_dtype,
        device=choose_device(options.device).type,
    ):
        print(json.dumps(line), flush=True)
