"""`partialfc export`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any, get_args

from partialfc.cli.parser import add_command, show
from partialfc.core.console import say
from partialfc.use.export import ExportOptions, Target, export
from partialfc.use.graph import WeightType
from partialfc.use.model import load_model


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "export", run)
    help_ = "run folder, model folder or file of weights; for insightface also an ONNX file"
    parser.add_argument("model", type=Path, metavar="MODEL", help=help_)
    help_ = "new file or folder; of insightface the plain file if it ends with .onnx, else the package"
    parser.add_argument("--to", type=Path, metavar="PATH", required=True, help=help_)
    help_ = "program that is to read it"
    parser.add_argument("--for", dest="target", choices=get_args(Target), default="onnx", help=help_)
    help_ = "of ONNX: how weights are stored; images and embeddings are float32 in any case"
    parser.add_argument("--weights", choices=get_args(WeightType), default="float32", help=help_)
    help_ = "of ONNX: add the embeddings of mirrored images in the graph, in twice the time"
    parser.add_argument("--mirror", action="store_true", help=help_)
    help_ = "name of the model in manifests and card; by default that of PATH"
    parser.add_argument("--name", metavar="TEXT", help=help_)
    help_ = "of insightface-server: the detector (.onnx) beside the model"
    parser.add_argument("--detector", type=Path, metavar="FILE", help=help_)
    help_ = "of hub: results.json of evaluate --out, for the model card"
    parser.add_argument("--results", type=Path, metavar="FILE", help=help_)
    help_ = "of an .onnx file: refuse what that challenge would not take"
    parser.add_argument("--check", choices=["mfr"], help=help_)


def run(options: Namespace) -> None:
    """Write a model for other programs, compare the result with it on faces, and measure its speed."""
    model = load_model(options.model)
    say(f"model: {model.origin}")
    names = ("target", "weights", "mirror", "name", "detector", "results")
    chosen = ExportOptions(**{name: getattr(options, name) for name in names}, mfr=options.check == "mfr")
    exported = export(model, options.to, chosen)
    parity = exported.parity
    batches = " and ".join(", ".join(map(str, parity.batches)).rsplit(", ", 1))
    lines = [
        f"{exported.path}: {exported.bytes / 1e6:,.1f} MB, contract {exported.contract[:12]}…",
        f"agrees with the model: cosine {parity.cosine:.7f} at least, on faces in batches of {batches}",
        f"{parity.milliseconds:.1f} ms an image on this machine's CPU",
        *(f"note: {note}" for note in exported.notes),
    ]
    show(options, exported.to_dict(), "\n".join(lines))
