"""`partialfc train`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from partialfc.cli.parser import add_benchmarks, add_command, add_config_options, build_config, named_paths, show
from partialfc.config.options import TrainConfig
from partialfc.distributed.collectives import launched_rank
from partialfc.training.build import check_config
from partialfc.training.loop import train

_USAGE = "partialfc train --data.path PATH [--out RUN] [--recipe NAME] [options]"


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "train", run, usage=_USAGE)
    parser.add_argument("--out", type=Path, metavar="RUN", default=Path("runs/train"), help="folder of the run")
    add_benchmarks(parser)
    parser.add_argument("--resume", action="store_true", help="continue the run in the folder if there is one")
    verify = "with --resume: first compare every byte of the checkpoint with its digest"
    parser.add_argument("--verify", action="store_true", help=verify)
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    add_config_options(parser, TrainConfig)


def run(options: Namespace) -> None:
    """Train a model, evaluating on the way; start with torchrun for several processes."""
    config = build_config(TrainConfig, options)
    check_config(config)
    if options.print_config:
        print(config.to_yaml(), end="")
        return
    result = train(
        config,
        options.out,
        benchmarks=named_paths(options.benchmark),
        resume=options.resume,
        verify=options.verify,
        quiet=options.json,
    )
    if launched_rank() == 0:
        show(options, result.to_dict(), result.text())
