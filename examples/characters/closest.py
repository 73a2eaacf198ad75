"""The closest pairs of centers of a trained run, as a picture: what the network cannot tell apart, or should not.

    python examples/characters/closest.py runs/characters-model runs/characters/train --out closest.png

Each cell shows two classes, three drawings of each one below the other; a frame marks those that Unicode takes for one
character under two labels. The pairs are printed too, with the cosine of their centers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from characters import canonical
from PIL import Image, ImageDraw

from partialfc.checkpoint.read import steps_in
from partialfc.core.console import say
from partialfc.core.errors import InputError
from partialfc.data.images import decode_image
from partialfc.data.sources import open_source
from partialfc.head.files import load_head

_SHOWN, _COLUMNS, _EDGE, _ROWS = 3, 12, 4, 1024


def closest_pairs(centers: torch.Tensor, count: int) -> list[tuple[float, int, int]]:
    """The `count` pairs of rows (C, D) with the largest cosines, which come first: (cosine, row, row)."""
    units = torch.nn.functional.normalize(centers.float(), dim=1)
    found: list[tuple[float, int, int]] = []
    for start in range(0, len(units), _ROWS):
        cosines = units[start : start + _ROWS] @ units.T
        cosines[torch.ones_like(cosines, dtype=torch.bool).tril(start)] = -2.0  # each pair once
        values, places = cosines.flatten().topk(min(count, cosines.numel()))
        rows, columns = places // len(units) + start, places % len(units)
        found += zip(values.tolist(), rows.tolist(), columns.tolist(), strict=True)
        found = sorted((pair for pair in found if pair[0] > -2.0), reverse=True)[:count]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("data", type=Path, help="its training set")
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument("--out", type=Path, required=True, help="picture to write, such as closest.png")
    options = parser.parse_args()
    try:
        draw(options.run, options.data, options.pairs, options.out)
    except InputError as error:
        say(f"error: {error}")
        sys.exit(2)


def draw(run: Path, data: Path, count: int, out: Path) -> None:
    """Print the pairs and write the picture."""
    source, steps = open_source(data), steps_in(run / "checkpoints")
    if not steps:
        raise InputError(f"{run} has no checkpoint: give the folder of a run.")
    centers = load_head(run / "checkpoints" / f"step-{steps[-1]:08d}").centers.detach()
    names = source.identities
    if names is None or len(names) != len(centers):
        raise InputError(f"{data} has not the {len(centers):,} named classes of {run}: give its training set.")
    labels, pairs = source.labels(), closest_pairs(centers, count)
    size = len(decode_image(source.read(0).encoded))
    width, height = size * 2 + _EDGE, size * _SHOWN + _EDGE
    sheet = Image.new("RGB", (width * _COLUMNS, height * -(-len(pairs) // _COLUMNS)), "white")
    equal = 0
    for number, (cosine, *both) in enumerate(pairs):
        x, y = number % _COLUMNS * width, number // _COLUMNS * height
        for column, label in enumerate(both):
            for row, index in enumerate(np.flatnonzero(labels == label)[:_SHOWN].tolist()):
                image = Image.fromarray(decode_image(source.read(index).encoded))
                sheet.paste(image, (x + 2 + size * column, y + 2 + size * row))
        codes = [int(names[label].removeprefix("U+"), 16) for label in both]
        is_equal = canonical(codes[0]) == canonical(codes[1])
        equal += is_equal
        if is_equal:
            ImageDraw.Draw(sheet).rectangle((x, y, x + width - 2, y + height - 2), outline="#c2571a", width=2)
        print(f"{cosine:.3f}  {names[both[0]]}  {names[both[1]]}{'  one character' * is_equal}")
    sheet.save(out)
    say(f"{equal} of the {len(pairs)} closest pairs are one character under two labels; {out} shows them")


if __name__ == "__main__":
    main()
