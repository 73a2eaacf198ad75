"""`partialfc finetune`."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from partialfc.cli.parser import add_benchmarks, add_command, add_device, named_paths, show
from partialfc.core.errors import InputError, StoppedBySignal
from partialfc.finetune import finetune

# Options without a default of their own: the preset, which depends on the model, has one.
_KEYS = {"epochs": "schedule.epochs", "lr": "optimizer.lr", "freeze": "backbone.freeze", "seed": "seed"}


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "finetune", run)
    help_ = "run folder, model folder or file of weights"
    parser.add_argument("model", type=Path, metavar="MODEL", help=help_)
    help_ = "aligned faces of your own people: one folder for each, or a set of another format"
    parser.add_argument("people", type=Path, metavar="PEOPLE", help=help_)
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", default=Path("runs/finetune"), help="folder of the result"
    )
    help_ = "a set of people that must not be forgotten, best the one the model was trained on; a part trains along"
    parser.add_argument("--old", type=Path, metavar="DATA", help=help_)
    help_ = "share of the training images that come from it"
    parser.add_argument("--old-share", type=float, metavar="X", default=0.5, help=help_)
    add_benchmarks(parser, what="benchmarks that are tested before and after")
    parser.add_argument("--epochs", type=float, metavar="X", help="passes over the data; 10 by default")
    parser.add_argument("--lr", type=float, metavar="X", help="peak learning rate of AdamW; 0.0005 by default")
    help_ = "layers that stay as they are; by default the first third"
    parser.add_argument("--freeze", nargs="*", metavar="LAYER", help=help_)
    parser.add_argument("--seed", type=int, metavar="N", help="of sample order and augmentation; 0 by default")
    add_device(parser)


def run(options: Namespace) -> None:
    """Train a model further on one's own people, hold some of them out, and say for whom it has become better."""
    if "RANK" in os.environ:
        raise InputError("finetune starts its processes itself: leave torchrun out.")
    values = {key: value for name, key in _KEYS.items() if (value := getattr(options, name)) is not None}
    try:
        result = finetune(
            options.model,
            options.people,
            options.out,
            old=options.old,
            old_share=options.old_share,
            benchmarks=named_paths(options.benchmark),
            values={**values, "device": options.device},
            quiet=options.json,
        )
    except StoppedBySignal as stop:
        stop.args = (str(stop).replace("--resume", "the same command"),)  # which goes on by itself
        raise
    show(options, result.to_dict(), result.text())
