"""The whole job on procedural faces: render them, train with a tenth of the classes, test on people never seen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from partialfc.data.face_sets import write_contact_sheet, write_pair_set, write_training_set
from partialfc.data.verification import PairSet, read_pairs
from partialfc.errors import InputError
from partialfc.evaluation.baselines import color_embeddings, pixel_embeddings
from partialfc.evaluation.pairs import evaluate_pairs
from partialfc.training.loop import TrainResult, train
from partialfc.training.progress import track
from partialfc.training.recipes import RECIPES


@dataclass(frozen=True)
class DemoSize:
    """How large the demo is; the default is what `make demo` runs, in about 7 minutes on 2 cores."""

    identities: int = 10_000
    shots: int = 8
    image_size: int = 64
    pairs: int = 6_000
    pair_identities: int = 2_000

    def held_out(self) -> range:
        """Identities of the test pairs, far from those trained on."""
        return range(1_000_000, 1_000_000 + self.pair_identities)


@dataclass(frozen=True)
class DemoSummary:
    """What the demo found.

    Attributes:
        accuracy, accuracy_std: ten-fold verification accuracy of the model on identities that it has never seen.
        pixel_accuracy, color_accuracy: the same of raw pixels and of colours.
        seconds: wall time by stage.
    """

    folder: Path
    size: DemoSize
    accuracy: float
    accuracy_std: float
    pixel_accuracy: float
    color_accuracy: float
    training: TrainResult
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {**asdict(self), "folder": str(self.folder), "training": self.training.to_dict()}

    def text(self) -> str:
        """One screen: what happened, what to look at, what to do next."""
        size, run = self.size, self.folder / "run"
        timing = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in self.seconds.items())
        return f"""
Partial FC demo: {self.training.images:,} images seen of {size.identities:,} procedural identities, a tenth of the
centers in each step. {timing}; {self.training.images_per_second or 0:,.0f} images/s.

  same person or not? {size.pairs:,} pairs of {size.pair_identities:,} identities never seen; the impostors of a pair
  come from one group. Ten-fold accuracy, 50 % is guessing:

      trained model   {_bar(self.accuracy)}  {self.accuracy:.2%} ± {self.accuracy_std:.2%}
      raw pixels      {_bar(self.pixel_accuracy)}  {self.pixel_accuracy:.2%}
      colours         {_bar(self.color_accuracy)}  {self.color_accuracy:.2%}

Look at
  {self.folder / "faces.png"}   the faces: one identity a row
  {run / "metrics.jsonl"}   loss, learning rate, cosines, speed, line by line
  {run / "model" / "best"}   the model: config.json and model.safetensors

Next, with your own data
  partialfc data inspect FOLDER          FOLDER: a .rec file, or one folder of images for each identity
  partialfc train --data.path FOLDER --backbone.name r50 --eval lfw=lfw.bin --out runs/mine
  partialfc evaluate runs/mine --benchmark lfw=lfw.bin
  partialfc train --help                 every option; the README says more
"""


def _bar(accuracy: float, width: int = 24) -> str:
    """A bar from guessing (50 %) to always right."""
    filled = round(max(0.0, accuracy - 0.5) * 2 * width)
    return "█" * filled + "·" * (width - filled)


def demo(out: Path, *, seed: int = 0, size: DemoSize | None = None, quiet: bool = False) -> DemoSummary:
    """Run the demo in `out`; what an interrupted one has finished there is taken over.

    Raises:
        InputError: `out` holds something else.
    """
    size = size or DemoSize()
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: give a folder with --out.")
    stages = _Stages()
    data = out / "data"
    with stages.stage("faces"):
        _render(out, data, seed, size, quiet)
    with stages.stage("baselines"):
        pairs = read_pairs(data / "pairs.bin")
        pixels, colors = _baseline(pairs, pixel_embeddings), _baseline(pairs, color_embeddings)
    with stages.stage("training"):
        config = RECIPES["demo"]()
        config = replace(config, seed=seed, data=replace(config.data, path=str(data / "train")))
        result = train(config, out / "run", benchmarks={"pairs": data / "pairs.bin"}, resume=True, quiet=quiet)
    scores = result.benchmarks["pairs"]
    return DemoSummary(
        folder=out,
        size=size,
        accuracy=scores["accuracy"],
        accuracy_std=scores["accuracy_std"],
        pixel_accuracy=pixels,
        color_accuracy=colors,
        training=result,
        seconds=stages.seconds,
    )


def _render(out: Path, data: Path, seed: int, size: DemoSize, quiet: bool) -> None:
    """The training set, the pairs and a contact sheet, each unless it is there."""
    out.mkdir(parents=True, exist_ok=True)
    common = {"size": size.image_size, "seed": seed}
    if not (out / "faces.png").exists():
        write_contact_sheet(out / "faces.png", identities=range(10), shots=8, size=112, seed=seed)
    if not (data / "train").exists():
        with track("rendering training faces", quiet=quiet) as progress:
            identities = range(size.identities)
            write_training_set(data / "train", identities=identities, shots=size.shots, progress=progress, **common)
    if not (data / "pairs.bin").exists():
        with track("rendering test pairs", quiet=quiet) as progress:
            write_pair_set(
                data / "pairs.bin", identities=size.held_out(), pairs=size.pairs, progress=progress, **common
            )


def _baseline(pairs: PairSet, embed: Callable[..., Any]) -> float:
    return evaluate_pairs(embed(pairs.images), pairs.is_same).accuracy


class _Stages:
    """How long each stage took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started
