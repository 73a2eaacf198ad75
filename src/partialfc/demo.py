"""The whole job on procedural faces: render, train with a tenth of the centers, test on identities never seen."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from partialfc.config.options import TrainConfig
from partialfc.config.recipes import RECIPES
from partialfc.core.device import timed
from partialfc.core.errors import InputError
from partialfc.data.pair_files import read_pairs
from partialfc.evaluation.baselines import color_embeddings, pixel_embeddings
from partialfc.evaluation.pairs import evaluate_pairs
from partialfc.evaluation.run import embed_benchmarks, evaluate_features, open_benchmarks
from partialfc.evaluation.statistics.figures import Result
from partialfc.evaluation.statistics.metrics import Scores
from partialfc.evaluation.verification import with_groups
from partialfc.faces.parameters import GROUPS, group_of
from partialfc.faces.sets import FIRST_HELD_OUT, FaceWorld, draw_pairs, write_contact_sheet
from partialfc.model.embed import Images
from partialfc.model.files import load_model
from partialfc.report.page import write_report
from partialfc.report.subjects import read_subjects
from partialfc.training.cores import train_on_cores
from partialfc.training.timing import TrainResult

WORLD = FaceWorld(identities=10_000, shots=8, pairs=6_000, pair_identities=2_000, image_size=64)


@dataclass(frozen=True)
class DemoSummary:
    """The result of the demo.

    Attributes:
        folder: of data, run and report.
        world: what was rendered.
        accuracy, accuracy_std: ten-fold verification accuracy of the model on identities that it has never seen.
        pixel_accuracy, color_accuracy: the same of raw pixels and of colours.
        training: what the training did.
        seconds: wall time by stage.
    """

    folder: Path
    world: FaceWorld
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
        """One screen: the result, what to look at, what to do next."""
        world, run = self.world, self.folder / "run"
        timing = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in self.seconds.items())
        return f"""
Partial FC demo: {self.training.images:,} images seen of {world.identities:,} procedural identities, a tenth of the
centers in each step. Time: {timing}.

Same person or not? {world.pairs:,} pairs of {world.pair_identities:,} identities never seen, impostors from the same
group. Ten-fold accuracy; 50 % is guessing:

    trained model   {_bar(self.accuracy)}  {self.accuracy:.2%} ± {self.accuracy_std:.2%}
    raw pixels      {_bar(self.pixel_accuracy)}  {self.pixel_accuracy:.2%}
    colours         {_bar(self.color_accuracy)}  {self.color_accuracy:.2%}

Look at
    {self.folder / "report.html"}   curves, scores, the hardest pairs
    {self.folder / "faces.png"}   the faces, one identity a row
    {run / "metrics.jsonl"}   loss, learning rate, cosines and speed, line by line
    {run / "model" / "best"}   the model: config.json and model.safetensors

Next, with your own data (a .rec file, or one folder of aligned images for each identity)
    partialfc data inspect FOLDER
    partialfc train FOLDER --benchmark lfw.bin --out runs/mine
    partialfc evaluate runs/mine --benchmark lfw.bin
"""


def _bar(accuracy: float, width: int = 24) -> str:
    """A bar from 50 %, which is guessing, to 100 %."""
    filled = round(max(0.0, accuracy - 0.5) * 2 * width)
    return "█" * filled + "·" * (width - filled)


def demo(
    out: Path, *, seed: int = 0, world: FaceWorld = WORLD, recipe: TrainConfig | None = None, quiet: bool = False
) -> DemoSummary:
    """Run the demo in `out`, or resume one that was interrupted there.

    Args:
        out: new folder, or that of an interrupted demo.
        seed: of faces and training.
        world, recipe: another size, for tests; by default `WORLD` and the recipe "demo".
        quiet: show no progress.

    Raises:
        InputError: `out` holds something else.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: give a folder with --out.")
    if out.is_dir() and any(out.iterdir()) and not (out / "data").is_dir():
        raise InputError(f"{out} is not empty and holds no demo: give another folder with --out.")
    data = out / "data"
    seconds: dict[str, float] = {}
    with timed(seconds, "faces"):
        replace(world, seed=seed).write(data, resume=True, quiet=quiet)
        write_contact_sheet(out / "faces.png", identities=range(10), shots=8, seed=seed)
    config = (recipe or RECIPES["demo"]).with_values({"seed": seed, "data.path": str(data / "train")})
    with timed(seconds, "baselines"):
        pairs = read_pairs(data / "pairs.bin")
        pixels = evaluate_pairs(pixel_embeddings(pairs.images, flip=config.data.flip), pairs.is_same).accuracy
        colors = evaluate_pairs(color_embeddings(pairs.images), pairs.is_same).accuracy
    with timed(seconds, "training"):
        result = train_on_cores(config, out / "run", benchmarks={"pairs": data / "pairs.bin"}, resume=True, quiet=quiet)
    with timed(seconds, "report"):
        best, images = _evaluate(out, replace(world, seed=seed))
        accuracy, std = best.figures["accuracy"].value, float(best.facts["accuracy_std"])
        assert accuracy is not None
        [subject] = read_subjects([out / "run"])
        write_report(
            [subject.with_results({"pairs": best}, {})],
            out=out / "report.html",
            pictures={"pairs": images},
            baselines={"raw pixels": pixels, "colours": colors},
            title="Partial FC demo",
            notes=[
                "The faces are procedural: no photograph of a person was used.",
                "The pairs show identities that training has never seen; impostors are of the same group.",
            ],
        )
    return DemoSummary(
        folder=out,
        world=world,
        accuracy=accuracy,
        accuracy_std=std,
        pixel_accuracy=pixels,
        color_accuracy=colors,
        training=result,
        seconds=seconds,
    )


def _evaluate(out: Path, world: FaceWorld) -> tuple[Result, Images]:
    """The best model on the pairs, with the figures of the four groups, and the images."""
    benchmarks = open_benchmarks({"pairs": out / "data" / "pairs.bin"}, world.image_size)
    with tempfile.TemporaryDirectory() as folder:
        features = embed_benchmarks(
            load_model(out / "run"), benchmarks, Path(folder) / "features.npy", workers=0, quiet=True
        )
        result = evaluate_features("pairs", benchmarks["pairs"], features["pairs"])
    identities, is_same = draw_pairs(
        world.seed, range(FIRST_HELD_OUT, FIRST_HELD_OUT + world.pair_identities), world.pairs
    )
    of_pair, same, scores = group_of(identities[:, 0]).numpy(), is_same.numpy(), result.scores[""]
    groups = {}
    for group in range(GROUPS):
        genuine = scores.genuine[of_pair[same] == group]
        impostor = scores.impostor[of_pair[~same] == group]
        groups[f"group {group + 1}"] = Scores(genuine, impostor, len(impostor))
    return with_groups(result, groups), benchmarks["pairs"].images
