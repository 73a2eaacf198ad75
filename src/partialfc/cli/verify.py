"""`partialfc verify`."""

from __future__ import annotations

import traceback
from argparse import Namespace
from pathlib import Path
from typing import Any

from partialfc.cli.parser import add_command, add_detector, add_device, show
from partialfc.core.device import choose_device
from partialfc.core.errors import InputError, JobError
from partialfc.data.photographs.detect import open_detector
from partialfc.use.model import load_model
from partialfc.use.pictures import check_new, write_side_by_side


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "verify", run)
    help_ = "run folder, model folder, ONNX file or file of weights"
    parser.add_argument("model", type=Path, metavar="MODEL", help=help_)
    parser.add_argument("a", metavar="A", help="image of an aligned face, or with --detector a photograph of one face")
    parser.add_argument("b", metavar="B", help="the other one")
    parser.add_argument("--fmr", type=float, metavar="RATE", default=1e-3, help="false match rate of the threshold")
    help_ = "thresholds of the model; by default thresholds.json beside it"
    parser.add_argument("--thresholds", type=Path, metavar="FILE", help=help_)
    help_ = "write the aligned faces side by side, .png or .jpg"
    parser.add_argument("--picture", type=Path, metavar="FILE", help=help_)
    help_ = "decide with a model that has seen only procedural faces"
    parser.add_argument("--force", action="store_true", help=help_)
    add_detector(parser)
    add_device(parser)


def run(options: Namespace) -> int:
    """Say whether two pictures show the same person: exit status 0 if so, 1 if not, 2 if that cannot be decided."""
    try:
        check_new(options.picture, "--picture")
        model = load_model(options.model, choose_device(options.device))
        faces_in = open_detector(options.detector) if options.detector else None
        choices = {name: getattr(options, name) for name in ("fmr", "thresholds", "force")}
        answer = model.verify(options.a, options.b, faces_in=faces_in, **choices)
        if options.picture is not None:
            write_side_by_side(options.picture, list(answer.crops))
        show(options, {**answer.to_dict(), "model": model.origin}, answer.text())
    except InputError:
        raise
    except (JobError, OSError) as error:  # their status would read as "different"
        raise InputError(str(error)) from error
    except Exception:  # so would Python's own
        traceback.print_exc()
        return 2
    return 0 if answer.is_same else 1
