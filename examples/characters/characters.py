"""Characters in fonts as a training set: a class is a Unicode character, an image is its drawing in one font.

    python examples/characters/characters.py --out runs/characters

Real images of tens of thousands of classes, with what makes faces hard: most classes have few images, some classes look
alike, and some are the same under two labels (compatibility characters). The fonts on this machine are used; README.md
names packages. No font and no image comes with this project.

Writes `train/` (RecordIO with the names U+XXXX), `test/` (held-out characters: one drawing each in `gallery/`, those in
held-out fonts in `probe/`), `pairs/` (the same characters against impostors of four kinds), `characters.json` (what was
found) and `characters.png` (a sheet to look at).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from fontTools.ttLib import TTCollection, TTFont, TTLibError
from PIL import Image, ImageDraw, ImageFont

from partialfc.core import keyed_random
from partialfc.core.console import Progress, say
from partialfc.core.errors import InputError
from partialfc.core.files import write_file
from partialfc.data.pair_files import write_pairs
from partialfc.data.sources.names import write_classes
from partialfc.data.sources.recordio import RecordWriter

FONT_FOLDERS = (Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), Path.home() / ".local/share/fonts")
# Radicals, the ideographs of the basic plane and its compatibility forms, and all ideographs of planes 2 and 3.
IDEOGRAPHS = ("2E80-2FDF", "3400-4DBF", "4E00-9FFF", "F900-FAFF", "20000-323AF")
_SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
_COLLECTIONS = (".ttc", ".otc")
_TOFU_FROM = 8  # characters with one drawing: the sign for "no glyph", in whatever form
_NO_CHARACTER = "\U0010ffff"
_WORTH_WORKERS = 100_000  # drawings
_FOLDS = 10
logging.getLogger("fontTools").setLevel(logging.ERROR)  # it warns of tables that are not used here


@dataclass
class Font:
    """A font file, and what it draws.

    Attributes:
        file: its path; a collection counts as one font, since the faces in it are forms of one design.
        is_test: whether no training image shows it.
        images: by code point, the distinct drawings as PNG files.
    """

    file: Path
    is_test: bool = False
    images: dict[int, list[bytes]] = field(default_factory=dict, repr=False)


def code_points(ranges: Sequence[str]) -> list[int]:
    """The assigned characters of ranges such as 4E00-9FFF that are neither spaces nor controls."""
    codes: list[int] = []
    for text in ranges:
        try:
            first, last = (int(end, 16) for end in text.split("-"))
        except ValueError:
            raise InputError(f"{text} is no range of code points: write for example --ranges 4E00-9FFF.") from None
        codes += [code for code in range(first, last + 1) if unicodedata.category(chr(code))[0] in "LNPS"]
    return codes


def draw(file: Path, codes: Sequence[int], size: int) -> dict[int, list[bytes]]:
    """The distinct drawings of each character in all faces of a font file, as square gray PNG files.

    A font's table lists more than it draws: a blank is none, nor is the drawing of a character that does not
    exist, or one that eight and more characters share.
    """
    found: defaultdict[int, dict[bytes, None]] = defaultdict(dict)
    for font, covered in _faces(file, size):
        tofu = _drawing(font, _NO_CHARACTER, size)
        able = [code for code in codes if code in covered]
        drawings = {code: drawing for code in able if (drawing := _drawing(font, chr(code), size)) is not None}
        shared = Counter(drawings.values())
        for code, drawing in drawings.items():
            if drawing != tofu and shared[drawing] < _TOFU_FROM:
                found[code].setdefault(drawing)
    return {code: [_png(pixels, size) for pixels in drawings] for code, drawings in found.items()}


def _faces(file: Path, size: int) -> Iterator[tuple[ImageFont.FreeTypeFont, Container[int]]]:
    """The faces of a file, each with the code points of its table.

    They are twice the size of the images; bitmap designs such as Unifont want multiples of 16.
    """
    height = 16 * max(1, round(size * 1.5 / 16))
    collection = file.suffix.lower() in _COLLECTIONS
    try:
        with TTCollection(file, lazy=True) if collection else TTFont(file, lazy=True) as opened:
            for index, table in enumerate(opened.fonts if collection else [opened]):
                if index and "Mono" in (table["name"].getDebugName(1) or ""):
                    continue  # in a collection, its ideographs are those of the other faces
                font = ImageFont.truetype(file, height, index, layout_engine=ImageFont.Layout.BASIC)
                yield font, table.getBestCmap() or ()
    except (OSError, TTLibError):  # no font
        return


def _drawing(font: ImageFont.FreeTypeFont, text: str, size: int) -> bytes | None:
    """The pixels of a character in black on white; None for a blank."""
    canvas = Image.new("L", (2 * size, 2 * size), 255)
    try:
        ImageDraw.Draw(canvas).text((size, size), text, fill=0, font=font, anchor="mm")
    except (OSError, ValueError):  # a glyph that FreeType refuses
        return None
    small = canvas.reduce(2)
    return None if small.getextrema()[0] == 255 else small.tobytes()


def _png(pixels: bytes, size: int) -> bytes:
    buffer = io.BytesIO()
    Image.frombytes("L", (size, size), pixels).save(buffer, "png", compress_level=4)
    return buffer.getvalue()


def draw_all(files: Sequence[Path], codes: Sequence[int], size: int, quiet: bool) -> list[Font]:
    """Draw with all fonts, on all cores; fonts without characters of the range are left out."""
    drawn: dict[Path, dict[int, list[bytes]]] = {}
    with Progress("drawing", len(files), unit="font", quiet=quiet) as progress, contextlib.ExitStack() as stack:
        if len(files) * len(codes) < _WORTH_WORKERS:
            outcomes = ((file, draw(file, codes, size)) for file in files)
        else:
            # Spawned, not forked: a fork of a process with running threads of torch can hang.
            workers = ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn"))
            pool = stack.enter_context(workers)
            tasks = {pool.submit(draw, file, codes, size): file for file in files}
            outcomes = ((tasks[task], task.result()) for task in as_completed(tasks))
        for done, (file, images) in enumerate(outcomes, start=1):
            drawn[file] = images
            progress.update(done)
    return [Font(file, images=drawn[file]) for file in files if drawn[file]]


def hold_out(fonts: Sequence[Font], names: Sequence[str]) -> None:
    """Make some fonts test fonts: those whose file names contain one of `names`, or every fifth without names."""
    for number, font in enumerate(fonts):
        given = any(name.lower() in font.file.name.lower() for name in names)
        font.is_test = given if names else number % 5 == 2
    if all(font.is_test for font in fonts) or not any(font.is_test for font in fonts):
        raise InputError(
            f"{len(fonts)} fonts with these characters were found, but training and test need one each: install more "
            "(README.md names packages), or name test fonts with --test-fonts."
        )


@dataclass
class Characters:
    """The drawings of all characters, each once: `train` and `test` by code point, as (font number, PNG)."""

    train: dict[int, list[tuple[int, bytes]]]
    test: dict[int, list[tuple[int, bytes]]]

    @staticmethod
    def of(fonts: Sequence[Font]) -> Characters:
        """Related fonts share drawings, which are compared pixel by pixel; the first font keeps each."""
        seen: set[tuple[int, bytes]] = set()
        result = Characters(defaultdict(list), defaultdict(list))
        for is_test in (False, True):
            side = result.test if is_test else result.train
            for number, font in enumerate(fonts):
                if font.is_test == is_test:
                    for code, images in font.images.items():
                        for image in images:
                            key = (code, hashlib.blake2b(image, digest_size=12).digest())
                            if key not in seen:
                                seen.add(key)
                                side[code].append((number, image))
        return result


def canonical(code: int) -> str:
    """What Unicode takes a character for: characters with one canonical form are one shape under several labels."""
    return unicodedata.normalize("NFKC", chr(code))


def held_out(characters: Characters, share: float, seed: int) -> list[int]:
    """Characters for the test: a share of those that can be tested and have no equal under another label."""
    labels = Counter(canonical(code) for code in {*characters.train, *characters.test})
    able = sorted(code for code in characters.test if code in characters.train and labels[canonical(code)] == 1)
    draws = keyed_random.uniform(keyed_random.derive_key(seed, "held-out characters"), torch.tensor(able or [0]))
    return [code for code, drawn in zip(able, draws.tolist(), strict=False) if drawn < share]


def write_train(folder: Path, characters: Characters, codes: Sequence[int]) -> None:
    folder.mkdir(parents=True)
    write_classes(folder, len(codes), [name_of(code) for code in codes])
    with RecordWriter(folder / "train.rec", num_classes=len(codes)) as writer:
        for label, code in enumerate(codes):
            for _, image in characters.train[code]:
                writer.write(image, label)


def write_test(folder: Path, characters: Characters, codes: Sequence[int], fonts: Sequence[Font]) -> None:
    for side, drawings in (("gallery", characters.train), ("probe", characters.test)):
        for code in codes:
            place = folder / side / name_of(code)
            place.mkdir(parents=True)
            chosen = drawings[code][:1] if side == "gallery" else drawings[code]
            for number, (font, image) in enumerate(chosen):
                (place / f"{number}-{fonts[font].file.stem}.png").write_bytes(image)


def write_pair_sets(folder: Path, characters: Characters, codes: Sequence[int], drawings: int, seed: int) -> None:
    """Genuine pairs: a training font against a test font. Impostors of four kinds, from any to look-alikes.

    Args:
        drawings: in training fonts, of each character that has as many: each is in one genuine pair and one other.
    """
    folder.mkdir(parents=True)
    gallery = [
        (place, font, image) for place, code in enumerate(codes) for font, image in characters.train[code][:drawings]
    ]
    owner = np.array([place for place, _, _ in gallery])
    probes = [characters.test[code][0][1] for code in codes]
    shift_key = keyed_random.derive_key(seed, "impostors")
    shift = 1 + int(keyed_random.uniform(shift_key, torch.tensor([0])) * (len(codes) // _FOLDS * _FOLDS - 1))
    nearest, in_font = _most_similar(gallery)
    impostors = {
        "random": [probes[place] for place in (owner + shift) % len(codes)],
        "neighbours": [probes[place] for place in (owner + 1) % len(codes)],
        "nearest": [probes[place] for place in owner[nearest]],
        "nearest_same_font": [gallery[row][2] for row in in_font],
    }
    half = len(gallery) // _FOLDS
    for name, others in impostors.items():
        images: list[bytes] = []
        for fold in range(_FOLDS):
            rows = range(fold * half, (fold + 1) * half)
            images += [image for row in rows for image in (gallery[row][2], probes[owner[row]])]
            images += [image for row in rows for image in (gallery[row][2], others[row])]
        is_same = [position % (2 * half) < half for position in range(2 * half * _FOLDS)]
        write_pairs(folder / f"{name}.bin", images, is_same)


def _most_similar(gallery: Sequence[tuple[int, int, bytes]]) -> tuple[np.ndarray, np.ndarray]:
    """For each drawing (of a character, in a font), the row of the most similar one of another character.

    Once among all drawings, and once among those of its font; by the cosine of their pixels.
    """
    owner, font = np.array([entry[0] for entry in gallery]), np.array([entry[1] for entry in gallery])
    pixels = np.stack([255.0 - np.asarray(Image.open(io.BytesIO(entry[2])), np.float32).ravel() for entry in gallery])
    units = pixels / np.linalg.norm(pixels, axis=1, keepdims=True)
    nearest, in_font = [], []
    for rows in np.array_split(np.arange(len(gallery)), 1 + len(gallery) // 1024):
        similar = units[rows] @ units.T
        similar[owner[rows, None] == owner] = -1.0
        nearest.append(similar.argmax(1))
        in_font.append(np.where(font[rows, None] == font, similar, -1.0).argmax(1))
    return np.concatenate(nearest), np.concatenate(in_font)


def write_sheet(path: Path, fonts: Sequence[Font], size: int, columns: int = 24) -> None:
    """A row for each font, with the characters it draws that most others draw too."""
    owners = Counter(code for font in fonts for code in font.images)
    sheet = Image.new("L", (size * columns, size * len(fonts)), 255)
    for row, font in enumerate(fonts):
        for column, code in enumerate(sorted(font.images, key=lambda code: -owners[code])[:columns]):
            sheet.paste(Image.open(io.BytesIO(font.images[code][0])), (column * size, row * size))
    sheet.save(path)


def name_of(code: int) -> str:
    """U+4E00."""
    return f"U+{code:04X}"


def summary(
    fonts: Sequence[Font], characters: Characters, classes: Sequence[int], tested: Sequence[int]
) -> dict[str, object]:
    """What was found, as `characters.json` holds it."""
    groups = Counter(canonical(code) for code in classes)
    sizes = [len(characters.train[code]) for code in classes]
    owners: defaultdict[bytes, set[int]] = defaultdict(set)
    for code in classes:
        for _, image in characters.train[code]:
            owners[image].add(code)
    return {
        "schema_version": 1,
        "classes": len(classes),
        "images": sum(sizes),
        "images_of_a_class": {
            f"{low}-{high}": sum(low <= size <= high for size in sizes)
            for low, high in ((1, 1), (2, 3), (4, 6), (7, 12), (13, max(sizes)))
        },
        "test_characters": len(tested),
        "labels_with_an_equal": sum(count for count in groups.values() if count > 1),
        "groups_of_equals": sum(count > 1 for count in groups.values()),
        "drawings_under_several_labels": sum(len(codes) > 1 for codes in owners.values()),
        "fonts": [{"file": font.file.name, "test": font.is_test, "characters": len(font.images)} for font in fonts],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fonts", type=Path, nargs="+", default=list(FONT_FOLDERS), help="folders with fonts")
    parser.add_argument("--ranges", nargs="+", default=list(IDEOGRAPHS), help="code points; all ideographs by default")
    parser.add_argument("--size", type=int, default=32, help="of an image, in pixels")
    parser.add_argument("--fewest", type=int, default=2, help="drawings that a class has at least")
    parser.add_argument("--test-fonts", nargs="+", default=[], metavar="NAME", help="parts of file names")
    parser.add_argument("--test-share", type=float, default=0.05, help="of the characters that can be tested")
    help_ = "training drawings of each test character that stand in pairs"
    parser.add_argument("--pair-drawings", type=int, default=1, help=help_)
    parser.add_argument("--most", type=int, help="characters to try, chosen at random; all by default")
    help_ = "with --most, choose first those that are the same as another under Unicode's normal form"
    parser.add_argument("--equals-first", action="store_true", help=help_)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true")
    options = parser.parse_args()
    try:
        make(options)
    except InputError as error:
        say(f"error: {error}")
        sys.exit(2)


def make(options: argparse.Namespace) -> None:
    """Draw, choose and write; the folder appears complete or not at all."""
    if options.out.exists():
        raise InputError(f"{options.out} exists already: give another folder with --out.")
    if options.pair_drawings < 1:
        raise InputError(f"--pair-drawings {options.pair_drawings}: give 1 or more.")
    files = sorted({file for folder in options.fonts for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES})
    codes = code_points(options.ranges)
    if options.most is not None and options.most < len(codes):
        draws = keyed_random.uniform(keyed_random.derive_key(options.seed, "characters"), torch.tensor(codes)).numpy()
        labels = Counter(map(canonical, codes))
        comes_first = [options.equals_first and labels[canonical(code)] > 1 for code in codes]
        order = np.lexsort((draws, np.logical_not(comes_first)))
        codes = sorted(np.array(codes)[order[: options.most]].tolist())
    fonts = draw_all(files, codes, options.size, options.quiet)
    hold_out(fonts, options.test_fonts)
    characters = Characters.of(fonts)
    tested = held_out(characters, options.test_share, options.seed)
    if len(tested) < 2 * _FOLDS:
        raise InputError(f"Only {len(tested)} characters are left for the test: raise --test-share or take more fonts.")
    excluded = set(tested)
    classes = [
        code
        for code in sorted(characters.train)
        if code not in excluded and len(characters.train[code]) >= options.fewest
    ]
    work = options.out.with_name(f".{options.out.name}.unfinished")
    shutil.rmtree(work, ignore_errors=True)
    write_train(work / "train", characters, classes)
    write_test(work / "test", characters, tested, fonts)
    write_pair_sets(work / "pairs", characters, tested, options.pair_drawings, options.seed)
    found = summary(fonts, characters, classes, tested)
    write_file(work / "characters.json", json.dumps(found, indent=1) + "\n")
    write_sheet(work / "characters.png", fonts, options.size)
    work.rename(options.out)
    say(f"{found['classes']:,} classes, {found['images']:,} images, {len(tested):,} characters for the test")


if __name__ == "__main__":
    main()
