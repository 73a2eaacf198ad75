"""The data sets of the studies: characters in fonts, and procedural faces; a toy of each in seconds."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from partialfc.config.options import TrainConfig
from partialfc.config.recipes import RECIPES
from partialfc.data.corrupt import corrupt
from partialfc.data.sources import open_source
from partialfc.data.sources.base import Source
from partialfc.faces.sets import write_pair_set, write_training_set

sys.path.append(str(Path(__file__).parents[1] / "examples" / "characters"))
import characters as example

FONTS = ["seto", "wqy"]  # of the test, where they are installed
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Prepared:
    """A data set on disk.

    Attributes:
        folder: of the set; damaged variants of it stand beside it.
        config: of every run on it; an arm changes values of it.
        benchmarks: paths by name, as `partialfc evaluate` takes them.
        facts: what the page says about the data.
        length: of a run on it, as a multiple of the epochs of the study.
    """

    folder: Path
    config: TrainConfig
    benchmarks: Mapping[str, Path]
    facts: str
    length: float = 1.0

    @cached_property
    def digest(self) -> str:
        """Of the files of the training set and the benchmarks, by which results on another set are told apart."""
        digest = hashlib.blake2b(digest_size=8)
        for place in (Path(self.config.data.path), *self.benchmarks.values()):
            for path in sorted([place, *place.rglob("*")]):
                if path.is_file() and not path.name.startswith("partialfc-"):  # derived by the first reader
                    digest.update(f"{path.relative_to(self.folder)}\n".encode() + path.read_bytes())
        return digest.hexdigest()

    def damaged(self, damage: Values) -> Path:
        """The folder of the training set after `corrupt` with these arguments, made if it is not there."""
        name = "-".join(str(value) for value in damage.values())
        folder = self.folder.with_name(f"{self.folder.name}-{name}")
        if not folder.exists():
            corrupt(self.config.data.path, folder, **damage)
        return folder

    def source(self, damage: Values | None) -> Source:
        """The training set, damaged or not."""
        return open_source(
            self.config.data.path, overlay=None if damage is None else self.damaged(damage) / "data.overlay"
        )


def small_network(data: Path, **values: Any) -> TrainConfig:
    """The network and the optimizer of the demo; a run keeps its last checkpoint."""
    recipe = RECIPES["demo"]
    config = replace(
        recipe,
        precision="bfloat16",  # half as fast again as float32, where the processor has it
        device="cpu",
        data=replace(recipe.data, path=str(data), workers=0),
        head=replace(recipe.head, scale=24.0, margin_value=0.2),
        output=replace(recipe.output, evaluate_every=0, checkpoint_minutes=5, log_every=20),
    )
    return config.with_values(values)


def characters(folder: Path, small: bool) -> Prepared:
    """Characters with at least six drawings, and 30 % of those that can be tested for the test."""
    return _characters(folder, most=1500 if small else 14_000, fewest=6, test_share=0.3, equals_first=False)


def many_characters(folder: Path, small: bool) -> Prepared:
    """Four times as many characters; a run of the study of the rate shows 37 images of each, and 45 of a face."""
    folder = folder.with_name(f"{folder.name}-many")
    most = 4000 if small else 50_000
    prepared = _characters(folder, most=most, fewest=6, test_share=0.1, equals_first=False, pair_drawings=10)
    return replace(prepared, length=0.6)


def equal_characters(folder: Path, small: bool) -> Prepared:
    """All characters that stand under several labels, and some that do not."""
    folder = folder.with_name(f"{folder.name}-equal")
    return _characters(folder, most=4000 if small else 9000, fewest=2, test_share=0.2, equals_first=True)


def _characters(folder: Path, **choices: Any) -> Prepared:
    data = folder / "set"
    if not data.exists():
        folder.mkdir(parents=True, exist_ok=True)
        fonts = [path for path in example.FONT_FOLDERS if path.is_dir()]
        names = [name for name in FONTS if any(name in file.name.lower() for path in fonts for file in path.rglob("*"))]
        options = {
            "out": data,
            "fonts": fonts,
            "ranges": list(example.IDEOGRAPHS),
            "size": 32,
            "seed": 0,
            "pair_drawings": 1,
        }
        example.make(argparse.Namespace(**(options | choices), test_fonts=names, quiet=False))
    found = json.loads((data / "characters.json").read_text())
    facts = (
        f"{found['classes']:,} characters with {found['images']:,} drawings in {len(found['fonts'])} fonts, "
        f"{found['labels_with_an_equal']:,} of them the same as another under Unicode's normal form; the test has "
        f"{found['test_characters']:,} other characters, each probe in a font that no training image shows."
    )
    config = small_network(data / "train", **{"data.flip": False})
    benchmarks = {"test": data / "test", "pairs": data / "pairs" / "nearest_same_font.bin"}
    return Prepared(data, config, benchmarks, facts)


def faces(folder: Path, small: bool) -> Prepared:
    """Procedural faces with nine images an identity."""
    return _faces(folder, *((200, 40) if small else (3000, 1000)), shots=9, size=32)


def many_faces(folder: Path, small: bool) -> Prepared:
    """For a GPU: 100,000 identities and an IResNet-50."""
    prepared = _faces(folder, *((200, 40) if small else (100_000, 10_000)), shots=5, size=64)
    network = {"backbone.name": "r50", "backbone.embedding_dim": 512, "device": "cuda"}
    loading = {"data.global_batch_size": 1024, "data.micro_batch_size": 1024, "data.workers": 8}
    return replace(prepared, config=prepared.config.with_values(network | loading))


def _faces(folder: Path, identities: int, tested: int, *, shots: int, size: int) -> Prepared:
    data = folder / "set"
    if not data.exists():
        work = folder / "unfinished"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        write_training_set(work / "train", identities=range(identities), shots=shots, size=size, quiet=False)
        others = range(identities, identities + tested)
        write_training_set(work / "people", identities=others, shots=4, size=size, layout="folder", quiet=False)
        for person in sorted(path for path in (work / "people").iterdir() if path.is_dir()):
            for number, image in enumerate(sorted(person.iterdir())):
                place = work / "test" / ("probe" if number else "gallery") / person.name
                place.mkdir(parents=True, exist_ok=True)
                image.rename(place / image.name)
        pairs = 30 * tested // 20 * 20
        write_pair_set(work / "pairs.bin", identities=others, pairs=pairs, size=size, quiet=False)
        work.rename(data)
    facts = (
        f"{identities:,} procedural identities with {shots} images of {size} pixels each; the test has {tested:,} "
        "other identities, one image of each in the gallery and three probes."
    )
    benchmarks = {"test": data / "test", "pairs": data / "pairs.bin"}
    return Prepared(data, small_network(data / "train"), benchmarks, facts)


ON_A_GPU = "faces-100k"
DATA: Mapping[str, Callable[[Path, bool], Prepared]] = {
    "characters": characters,
    "faces": faces,
    ON_A_GPU: many_faces,
}
ON_A_CPU = [name for name in DATA if name != ON_A_GPU]
