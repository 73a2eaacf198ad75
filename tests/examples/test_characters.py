"""The example of characters in fonts, with the Cyrillic of whatever fonts this machine has."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fontTools")
import characters as example

from partialfc.core.errors import InputError
from partialfc.data.pair_files import read_pairs
from partialfc.data.sources import open_source
from partialfc.evaluation.benchmarks import open_benchmark

FONTS = [file for folder in example.FONT_FOLDERS for file in folder.rglob("DejaVuSans*.ttf")]
pytestmark = pytest.mark.skipif(not FONTS, reason="no font with Cyrillic is installed: fonts-dejavu has some")


@pytest.fixture(scope="module")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with few fonts, however many the machine has."""
    folder = tmp_path_factory.mktemp("fonts")
    for name in ("DejaVuSans", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSans-Bold"):
        for file in FONTS:
            if file.stem == name:
                (folder / file.name).symlink_to(file)
    return folder


def options(out: Path, fonts: Path, **changes: Any) -> argparse.Namespace:
    values = {
        "out": out,
        "fonts": [fonts],
        "ranges": ["0400-045F"],
        "size": 16,
        "fewest": 2,
        "pair_drawings": 1,
        "most": None,
        "equals_first": False,
        "seed": 0,
    }
    return argparse.Namespace(**values | {"test_fonts": ["Bold"], "test_share": 0.5, "quiet": True} | changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, fonts: Path) -> Path:
    out = tmp_path_factory.mktemp("characters") / "set"
    example.make(options(out, fonts))
    return out


def test_the_training_set_has_names_and_distinct_drawings(made: Path) -> None:
    source = open_source(made / "train")
    labels = source.labels()
    found = json.loads((made / "characters.json").read_text())
    assert (source.num_classes, len(source)) == (found["classes"], found["images"])
    assert source.identities is not None
    assert all(0x400 <= int(name.removeprefix("U+"), 16) < 0x460 for name in source.identities)
    images = [(int(label), source.read(index).encoded) for index, label in enumerate(labels)]
    assert len(set(images)) == len(images)
    assert np.bincount(labels).min() >= 2


def test_the_test_has_other_characters_in_other_fonts(made: Path) -> None:
    trained = set(open_source(made / "train").identities or ())
    tested = {path.name for path in (made / "test" / "probe").iterdir()}
    assert tested == {path.name for path in (made / "test" / "gallery").iterdir()}
    assert not tested & trained
    assert all("Bold" in path.name for path in (made / "test" / "probe").rglob("*.png"))
    assert not any("Bold" in path.name for path in (made / "test" / "gallery").rglob("*.png"))
    assert len(open_benchmark(made / "test", 16).images) > 2 * len(tested) - 1
    for name in ("random", "neighbours", "nearest", "nearest_same_font"):
        pairs = read_pairs(made / "pairs" / f"{name}.bin")
        assert pairs.is_same.mean() == 0.5
        left, right = pairs.images[0::2], pairs.images[1::2]
        assert not any(np.array_equal(*both) for both in zip(left, right, strict=True))


def test_several_drawings_of_a_character_make_more_pairs(made: Path, fonts: Path, tmp_path: Path) -> None:
    example.make(options(tmp_path / "more", fonts, pair_drawings=3))
    for name in ("random", "nearest_same_font"):
        few, many = (read_pairs(folder / "pairs" / f"{name}.bin") for folder in (made, tmp_path / "more"))
        assert 2 * len(few.is_same) < len(many.is_same) <= 3 * len(few.is_same)
        assert many.is_same.mean() == 0.5
        left, right = many.images[0::2], many.images[1::2]
        assert not any(np.array_equal(*both) for both in zip(left, right, strict=True))


def test_a_character_that_no_font_draws_is_not_drawn(fonts: Path) -> None:
    drawings = example.draw(fonts / "DejaVuSans.ttf", [0x416, 0x4E00, 0x20], 16)
    assert list(drawings) == [0x416]  # no ideograph in the font, and a blank


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": Path()}, "exists already"),
        ({"ranges": ["x-y"]}, "x-y is no range of code points"),
        ({"test_fonts": ["no such font"]}, "training and test need one each"),
        ({"pair_drawings": 0}, "give 1 or more"),
        ({"test_share": 0.0}, "Only 0 characters are left"),
    ],
)
def test_wrong_input(changes: dict[str, Any], message: str, tmp_path: Path, fonts: Path) -> None:
    with pytest.raises(InputError, match=message):
        example.make(options(changes.pop("out", tmp_path / "out"), fonts, **changes))
    assert not list(tmp_path.iterdir())
