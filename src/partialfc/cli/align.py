"""`partialfc align`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from partialfc.cli.parser import add_command, add_detector, facts_text, show
from partialfc.core.errors import InputError
from partialfc.data.photographs.align import align_photographs
from partialfc.data.photographs.detect import open_detector
from partialfc.data.photographs.landmarks import read_landmarks
from partialfc.data.photographs.mtcnn import LEAST_SCORE


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "align", run)
    help_ = "folder with a folder of photographs for each identity, or any other folder, or one photograph"
    parser.add_argument("photographs", metavar="PHOTOS", help=help_)
    parser.add_argument("--out", type=Path, metavar="FOLDER", required=True, help="new folder for the crops")
    add_detector(parser)
    help_ = "instead, a file with the five points of each face"
    parser.add_argument("--landmarks", type=Path, metavar="FILE", help=help_)
    parser.add_argument("--faces", choices=["largest", "all"], default="largest", help="of several in a photograph")
    help_ = "smallest face to find; by default a fiftieth of the longer side, at least 20"
    parser.add_argument("--min-face", type=int, metavar="PIXELS", help=help_)
    help_ = "least score of a face that the detector finds"
    parser.add_argument("--min-score", type=float, metavar="X", default=LEAST_SCORE, help=help_)


def run(options: Namespace) -> None:
    """Cut faces out of photographs, aligned to 112 x 112 pixels; after an interruption, the same command goes on."""
    if (options.detector is None) == (options.landmarks is None):
        raise InputError("Give either --detector, such as mtcnn, or --landmarks FILE.")
    if options.landmarks is not None:
        finder: Any = read_landmarks(options.landmarks)
    else:
        finder = open_detector(options.detector, min_face=options.min_face, min_score=options.min_score)
    every_face = options.faces == "all"
    facts = align_photographs(options.photographs, options.out, finder, every_face=every_face, quiet=options.json)
    lists = {name: value for name, value in facts.items() if isinstance(value, dict)}
    text = {name: ", ".join(f"{key}: {one}" for key, one in value.items()) for name, value in lists.items()}
    show(options, facts, facts_text({**facts, **text}))
