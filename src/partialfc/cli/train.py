"""`partialfc train`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from partialfc.cli.config_options import add_config_options, build_config
from partialfc.cli.parser import add_benchmarks, add_command, named_paths, show
from partialfc.core.errors import InputError
from partialfc.distributed.collectives import launched_rank
from partialfc.training.build import check_config
from partialfc.training.cores import train_on_cores


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "train", run)
    what = "training images: a folder with a folder for each identity, or a .rec, .tar, .parquet or .lmdb set"
    parser.add_argument("DATA", nargs="?", help=what)
    parser.add_argument("--out", type=Path, metavar="RUN", default=Path("runs/train"), help="folder of the run")
    add_benchmarks(parser)
    parser.add_argument("--resume", action="store_true", help="continue the run in the folder if there is one")
    verify = "with --resume: first compare every byte of the checkpoint with its digest"
    parser.add_argument("--verify", action="store_true", help=verify)
    parser.add_argument("--print-config", action="store_true", help="print the configuration as YAML and stop")
    add_config_options(parser)


def run(options: Namespace) -> None:
    """Train a model, evaluating on the way; start with torchrun for several processes."""
    config = build_config(options).with_backbone()
    if not config.data.path and options.benchmark and "=" not in options.benchmark[-1]:
        raise InputError(f"DATA is missing; if it is {options.benchmark[-1]}, write it before --benchmark.")
    check_config(config.with_values({"data.path": "DATA"}) if options.print_config else config)
    if options.print_config:
        print(config.to_yaml(), end="")
        return
    result = train_on_cores(
        config,
        options.out,
        benchmarks=named_paths(options.benchmark),
        resume=options.resume,
        verify=options.verify,
        quiet=options.json,
    )
    if launched_rank() == 0:
        show(options, result.to_dict(), result.text(options.benchmark))
