"""`partialfc data inspect`, `convert`, `pairs` and `faces`."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from partialfc.cli.parser import add_command, add_commands, facts_text, show
from partialfc.core.console import Progress
from partialfc.data.convert import TargetName, convert
from partialfc.data.inspect import inspect
from partialfc.data.make_pairs import write_chosen_pairs
from partialfc.data.sources import open_source
from partialfc.faces.sets import FaceWorld, Layout


def add_parser(commands: Any) -> None:
    commands = add_commands(commands.add_parser("data", help="look at data sets, or write procedural ones"))

    parser = add_command(commands, "inspect", run_inspect)
    parser.add_argument("path", type=Path, help="file or folder of a training set, of any format")

    parser = add_command(commands, "convert", run_convert)
    parser.add_argument("path", type=Path, help="training set of any format, or .tar.gz files")
    parser.add_argument("--out", type=Path, metavar="FOLDER", required=True, help="new folder for the set")
    parser.add_argument("--to", choices=get_args(TargetName), required=True, help="format to write")

    parser = add_command(commands, "pairs", run_pairs)
    parser.add_argument("path", type=Path, help="folder of identity folders, or any other training set")
    parser.add_argument("--out", type=Path, metavar="FILE", required=True, help=".bin or .csv file to write")
    parser.add_argument("--pairs", type=int, metavar="N", default=6000, help="pairs, half of them genuine")
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="the pairs are a function of it")

    parser = add_command(commands, "faces", run_faces)
    parser.add_argument("--out", type=Path, metavar="FOLDER", required=True, help="new folder for train/ and pairs.bin")
    for name, sentence in {
        "identities": "people of the training set",
        "shots": "images of each",
        "pairs": "test pairs, half of them genuine, a multiple of 20",
        "pair-identities": "other people, of the pairs alone",
        "image-size": "side of the images in pixels",
        "seed": "the images are a function of it",
    }.items():
        default = getattr(FaceWorld, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, metavar="N", default=default, help=sentence)
    layouts, default = get_args(Layout), FaceWorld.layout
    parser.add_argument("--layout", choices=layouts, default=default, help="format of the training set")


def run_inspect(options: Namespace) -> None:
    """Count, check and hash the images of a training set."""
    with Progress("inspecting", quiet=options.json) as progress:
        facts = inspect(options.path, progress=progress.update)
    show(options, facts, facts_text(facts))


def run_convert(options: Namespace) -> None:
    """Write a training set in another format; after an interruption, the same command goes on."""
    facts = convert(options.path, options.out, options.to, quiet=options.json)
    show(options, facts, facts_text(facts))


def run_pairs(options: Namespace) -> None:
    """Write genuine and impostor pairs of one's own images as a verification file."""
    facts = write_chosen_pairs(open_source(options.path), options.out, options.pairs, options.seed)
    show(options, facts, facts_text(facts))


def run_faces(options: Namespace) -> None:
    """Write procedural faces: a training set, and pairs of other identities."""
    world = FaceWorld(**{field.name: getattr(options, field.name) for field in fields(FaceWorld)})
    facts = world.write(options.out, quiet=options.json)
    show(options, facts, facts_text(facts))
