"""`partialfc embed`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any, get_args

from partialfc.cli.parser import add_command, add_detector, add_device, show
from partialfc.core.console import counted, say
from partialfc.core.device import choose_device
from partialfc.core.errors import InputError
from partialfc.data.photographs.detect import open_detector
from partialfc.distributed.collectives import launched_rank, process_group
from partialfc.model.embed import Precision
from partialfc.use.embed import embed_into
from partialfc.use.model import load_model


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "embed", run)
    help_ = "run folder, model folder, ONNX file or file of weights"
    parser.add_argument("model", type=Path, metavar="MODEL", help=help_)
    help_ = "aligned faces: a training set of any format, a list, a folder of images, an image"
    parser.add_argument("data", type=Path, metavar="DATA", help=help_)
    help_ = "new file of features, .parquet or .npy"
    parser.add_argument("--out", type=Path, metavar="FILE", required=True, help=help_)
    parser.add_argument("--batch-size", type=int, metavar="N", default=256, help="images embedded at once")
    parser.add_argument("--precision", choices=get_args(Precision), default="float32", help="dtype of the backbone")
    parser.add_argument("--workers", type=int, metavar="N", default=2, help="processes that read images")
    add_detector(parser)
    add_device(parser)


def run(options: Namespace) -> None:
    """Embed the images of a set into one file, with names, labels and qualities; after an interruption, go on."""
    if options.workers < 0:
        raise InputError(f"--workers is {options.workers}: give 0 or a positive number.")
    device = choose_device(options.device)
    with process_group(device):
        model = load_model(options.model, device)
        say(f"model: {model.origin}")
        choices: dict[str, Any] = {name: getattr(options, name) for name in ("batch_size", "precision", "workers")}
        choices["faces_in"] = open_detector(options.detector) if options.detector else None
        features = embed_into(model, options.data, options.out, quiet=options.json, **choices)
    if launched_rank() != 0:
        return
    images, failed = len(features.failed), int(features.failed.sum())
    facts = {"out": str(options.out), "images": images, "failed": failed, "width": features.embeddings.shape[1]}
    text = f"{options.out} holds {counted(images, 'embedding')} of {facts['width']} numbers"
    text += f"; {counted(failed, 'image')} could not be read" if failed else ""
    show(options, {**facts, "contract": features.contract}, f"{text}; contract {(features.contract or '')[:12]}…")
