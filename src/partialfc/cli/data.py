"""`partialfc data inspect`, `convert`, `corrupt`, `pairs` and `faces`."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from partialfc.cli.parser import Parser, add_command, add_commands, facts_text, show
from partialfc.core.console import Progress, say
from partialfc.core.errors import InputError
from partialfc.data.convert import TargetName, convert
from partialfc.data.corrupt import FRACTIONS, Kind, corrupt
from partialfc.data.inspect import inspect
from partialfc.data.inspect_page import check_outputs, write_augmented, write_page
from partialfc.data.make_pairs import write_chosen_pairs
from partialfc.data.sources import open_source
from partialfc.data.sources.base import reading_notes
from partialfc.faces.protocols import PROTOCOLS, write_protocol
from partialfc.faces.sets import FaceWorld, Layout
from partialfc.use.pictures import check_new

_WHAT = "Look at data sets, and write new ones."


def add_parser(commands: Any) -> None:
    commands = add_commands(commands.add_parser("data", help=_WHAT, description=_WHAT))

    parser = add_command(commands, "inspect", run_inspect)
    parser.add_argument("path", type=Path, metavar="DATA", help="file or folder of a training set, of any format")
    parser.add_argument("--overlay", type=Path, metavar="FILE", help="decisions about the set, applied before")
    parser.add_argument("--page", type=Path, metavar="FILE", help="also write the result as an HTML page")
    parser.add_argument("--no-pictures", action="store_true", help="leave faces out of the page")
    help_ = "write a picture of what each preset of data.augment makes of some images, .jpg or .png"
    parser.add_argument("--augmented", type=Path, metavar="FILE", help=help_)

    parser = add_command(commands, "convert", run_convert)
    parser.add_argument("path", type=Path, metavar="DATA", help="training set of any format, or .tar.gz files")
    parser.add_argument("--out", type=Path, metavar="FOLDER", required=True, help="new folder for the set")
    parser.add_argument("--to", choices=get_args(TargetName), required=True, help="format to write")

    parser = add_command(commands, "corrupt", run_corrupt)
    parser.add_argument("path", type=Path, metavar="DATA", help="a training set, which stays as it is")
    parser.add_argument("--out", type=Path, metavar="FOLDER", required=True, help="new folder for overlay and truth")
    parser.add_argument("--kind", choices=get_args(Kind), required=True, help="the damage")
    published = ", ".join(f"{kind} {fraction:.3g}" for kind, fraction in FRACTIONS.items())
    help_ = f"of the identities cut or left whole, or of the images flipped or copied; by default {published}"
    parser.add_argument("--fraction", type=float, metavar="X", help=help_)
    parser.add_argument("--parts", type=int, metavar="N", default=3, help="classes that a cut identity becomes")
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="what is damaged is a function of it")

    parser = add_command(commands, "pairs", run_pairs)
    what = "folder of identity folders, or any other training set"
    parser.add_argument("path", type=Path, metavar="DATA", help=what)
    parser.add_argument("--out", type=Path, metavar="FILE", required=True, help=".bin or .csv file to write")
    parser.add_argument("--pairs", type=int, metavar="N", default=6000, help="pairs, half of them genuine")
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="the pairs are a function of it")

    _add_faces(add_command(commands, "faces", run_faces))


def _add_faces(parser: Parser) -> None:
    help_ = "new folder, for train/ and pairs.bin or for the set of the protocol"
    parser.add_argument("--out", type=Path, metavar="FOLDER", required=True, help=help_)
    help_ = "instead, a set in the files of this benchmark, of people on whom nothing is trained"
    parser.add_argument("--protocol", choices=PROTOCOLS, help=help_)
    for name, sentence in {
        "identities": "people of the training set or of the protocol",
        "shots": "images of each in the training set",
        "pairs": "test pairs, half of them genuine, a multiple of 20",
        "pair-identities": "other people, of the pairs alone",
        "image-size": "side of the images in pixels",
        "seed": "the images are a function of it",
        "accessory-sets": "sets of hairstyle, glasses, mask and clothes of each person; 0 draws them for each image",
    }.items():
        default = getattr(FaceWorld, name.replace("-", "_"))
        of_protocol = " or the protocol's" if name in ("identities", "pairs") else ""
        help_ = f"{sentence} (default: {default}{of_protocol})"
        parser.add_argument(f"--{name}", type=int, metavar="N", help=help_)
    help_ = f"format of the training set (default: {FaceWorld.layout})"
    parser.add_argument("--layout", choices=get_args(Layout), help=help_)


def run_inspect(options: Namespace) -> None:
    """Count, check and hash the images of a training set, and find duplicates."""
    check_outputs(options.page, options.augmented)
    with Progress("inspecting", quiet=options.json) as progress:
        facts = inspect(options.path, overlay=options.overlay, progress=progress.update)
    if options.page is not None or options.augmented is not None:
        source = open_source(options.path, overlay=options.overlay)
        if options.page is not None:
            write_page(options.page, facts, source, pictures=not options.no_pictures)
        if options.augmented is not None:
            write_augmented(options.augmented, source)
    show(options, facts, facts_text({name: _in_words(value) for name, value in facts.items()}))


def _in_words(value: Any) -> Any:
    """A fact on one line: figures by name, or the number of groups; sentences as they are."""
    if isinstance(value, dict):
        items = ((name, len(part) if isinstance(part, list) else part) for name, part in value.items())
        return ", ".join(f"{name}: {part}" for name, part in items)
    return " ".join(value) if isinstance(value, list) else value


def run_corrupt(options: Namespace) -> None:
    """Damage a training set by a stated fraction and seed, with the truth beside it, for studies of robustness."""
    facts = corrupt(
        options.path,
        options.out,
        options.kind,
        fraction=options.fraction,
        parts=options.parts,
        seed=options.seed,
        quiet=options.json,
    )
    show(options, facts, facts_text(facts))


def run_convert(options: Namespace) -> None:
    """Write a training set in another format; after an interruption, the same command goes on."""
    facts = convert(options.path, options.out, options.to, quiet=options.json)
    show(options, facts, facts_text({name: _in_words(value) for name, value in facts.items()}))


def run_pairs(options: Namespace) -> None:
    """Write genuine and impostor pairs of one's own images as a verification file."""
    check_new(options.out, "--out")
    source = open_source(options.path)
    for note in reading_notes(source):
        say(note)
    facts = write_chosen_pairs(source, options.out, options.pairs, options.seed)
    show(options, facts, facts_text(facts))


def run_faces(options: Namespace) -> None:
    """Write procedural faces: a training set and pairs of other identities, or a set in the files of a benchmark."""
    given = {field.name: getattr(options, field.name) for field in fields(FaceWorld)}
    given = {name: value for name, value in given.items() if value is not None}
    if options.protocol is None:
        facts = FaceWorld(**given).write(options.out, quiet=options.json)
    else:
        of_protocol = {field.name for field in fields(PROTOCOLS[options.protocol])} & {*vars(options)}
        for name in given:
            if name not in of_protocol:
                takes = ", ".join(f"--{one.replace('_', '-')}" for one in sorted(of_protocol))
                name = name.replace("_", "-")
                raise InputError(f"--{name} does not fit the protocol {options.protocol}, which takes {takes}.")
        facts = write_protocol(options.protocol, options.out, quiet=options.json, **given)
    show(options, facts, facts_text(facts))
