"""Every evaluator on the procedural twin of its benchmark: the model of the demo, and one that lacks a group.

    python benchmarks/twins.py DEMO --out DIR [--write]

DEMO is the folder of `partialfc demo`. In DIR stand afterwards the twins in the benchmarks' own files, a model trained
for one epoch without the people of one of the four groups, and results.json of both models; what is there already is
kept. All of it is done by commands as a user would give them. --write puts the tables into docs/results/twins.md, and a
picture of the parts into docs/images.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from documents import DOCS, items, write_between
from partialfc.bench.machine import describe
from partialfc.data.sources import open_source
from partialfc.data.sources.overlay import DROPPED, decide, write_overlay
from partialfc.evaluation.all_pairs import CHILDREN, MASK, evaluate_all_pairs, read_list
from partialfc.evaluation.statistics.figures import Figure
from partialfc.faces import protocols
from partialfc.faces.protocols import PROTOCOLS
from partialfc.faces.render import render_faces
from partialfc.model.features import read_features

LACKING = 3  # the group on which the second model is not trained
EPOCHS = 1  # of the second model, of the demo's three: enough for the groups to differ
GROUPS = [f"group-{number}" for number in range(4)]
PICTURED = [(2_000_001, 2), (2_000_002, 3), (2_000_003, 2), (2_000_006, 0)]  # people and shots
PAIRS = ("accuracy", "tar@far=1e-3")
TEMPLATES = ("tar@far=1e-4", "tar@far=1e-3", "rank-1", "tpir@fpir=0.01")
FIGURES = {
    **dict.fromkeys(("lfw", "cfp_ff", "cfp_fp", "agedb_30"), PAIRS),
    **dict.fromkeys(("ijbb", "ijbc"), TEMPLATES),
    "mfr": ("tar@far=1e-6", "mask/tar@far=1e-4", "children/tar@far=1e-4", "mfr-score"),
    "gallery": ("rank-1", "distractors/rank-1", "tpir@fpir=0.01", "tpir@fpir=0.1"),
}
FAR = 1e-4  # of all parts: one that this many images resolve, and at which the demo's model accepts many pairs
PARTS = {"": "all bare faces", **{group: group for group in GROUPS}, CHILDREN: CHILDREN, MASK: "masked against bare"}
# Higher than, in the first model.
DIRECTIONS = [
    ("frontal pairs above pairs with a profile", ("cfp_ff", "accuracy"), ("cfp_fp", "accuracy")),
    ("faces of one age above faces of two", ("lfw", "accuracy"), ("agedb_30", "accuracy")),
    ("IJB-B above IJB-C, where faces are occluded", ("ijbb", "tar@far=1e-3"), ("ijbc", "tar@far=1e-3")),
    ("rank 1 without distractors above rank 1 among them", ("gallery", "rank-1"), ("gallery", "distractors/rank-1")),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder of the demo")
    parser.add_argument("--out", type=Path, required=True, help="folder for twins, second model and results")
    parser.add_argument("--write", action="store_true", help="write docs/results/twins.md")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    paths = write_twins(options.out, options.demo)
    mfr = {"mfr": paths.pop("mfr")}
    run, lacking = options.demo / "run", options.out / "lacking"
    train_lacking(options.demo / "data" / "train", lacking)
    results = evaluate(run, paths, options.out / "results")
    results |= evaluate(run, mfr, options.out / "results-mfr")
    evaluate(lacking, mfr, options.out / "results-lacking")
    parts = [compare_parts(mfr["mfr"], options.out / folder) for folder in ("results-mfr", "results-lacking")]
    lines = [hardware(), "", *figures_table(results), "", *parts_table(*parts), "", *directions_list(results, *parts)]
    print("\n".join(lines))
    if options.write:
        write_picture(DOCS / "images" / "protocols.jpg")
        write_between("results/twins.md", "benchmarks/twins.py", lines)


def command(*words: object) -> None:
    """Run a command of the package."""
    subprocess.run([sys.executable, "-m", "partialfc", *map(str, words)], check=True)


def write_twins(out: Path, demo: Path) -> dict[str, Path]:
    """Write each twin that is not there, in the size of the demo's images; their paths for `evaluate`."""
    size = json.loads((demo / "data" / "train" / "faces.json").read_text())["size"]
    for name in PROTOCOLS:
        if not (out / name).exists():
            command("data", "faces", "--protocol", name, "--image-size", size, "--out", out / name)
    paths = {name: out / name for name in PROTOCOLS}
    return paths | {"mfr": out / "mfr" / "mfr.csv"} | {name: out / name / f"{name}.bin" for name in list(FIGURES)[:4]}


def train_lacking(data: Path, run: Path) -> None:
    """Train as the demo does, on its set without one group, as an overlay says; or go on with that."""
    source = open_source(data)
    dropped = np.flatnonzero(source.labels() % len(GROUPS) == LACKING)
    overlay = run.with_suffix(".overlay")
    overlay.unlink(missing_ok=True)
    write_overlay(overlay, decide(source, dropped, np.full(len(dropped), DROPPED)))
    pairs = data.parent / "pairs.bin"
    recipe = ["--recipe", "demo", "--epochs", EPOCHS, "--data.overlay", overlay]
    command("train", data, *recipe, "--benchmark", pairs, "--out", run, "--resume")


def evaluate(model: Path, benchmarks: dict[str, Path], out: Path) -> dict[str, Any]:
    """The results of a model by the name of the twin."""
    if not (out / "results.json").exists():
        pairs = [f"{name}={path}" for name, path in benchmarks.items()]
        command("evaluate", model, "--benchmark", *pairs, "--out", out)
    content: dict[str, Any] = json.loads((out / "results.json").read_text())["benchmarks"]
    return content


def hardware() -> str:
    """The machine and the versions."""
    facts = describe("cpu")
    return f"{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}."


def percent(figure: dict[str, Any]) -> str:
    """A figure with its interval."""
    if figure["value"] is None:
        return figure["reason"]
    value, low, high = (100 * figure[key] for key in ("value", "low", "high"))
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def figures_table(results: dict[str, Any]) -> list[str]:
    """The figures of all twins."""
    lines = ["| twin | kind | figure | demo's model, % |", "|---|---|---|---|"]
    for name, figures in FIGURES.items():
        kind = results[name]["kind"]
        lines += [
            f"| {name} | {kind} | `{figure}` | {percent(results[name]['figures'][figure])} |" for figure in figures
        ]
    return lines


def compare_parts(listed: Path, results: Path) -> dict[str, Figure]:
    """TAR of the parts of MFR, all at one FAR, from the features that `evaluate` stored."""
    images = read_list(listed)
    (stored,) = results.glob("features-*.npy")
    units = torch.from_numpy(read_features(stored).units())
    figures = evaluate_all_pairs(units, images.identities, images.groups, images.masked, (FAR,)).figures
    return {part: figures[f"{part}/tar@far=1e-4" if part else "tar@far=1e-4"] for part in PARTS}


def parts_table(whole: dict[str, Figure], lacking: dict[str, Figure]) -> list[str]:
    """The parts of both models."""
    lines = ["| `mfr`, TAR at FAR 1e-4 | demo's model, % | without group-3, % |", "|---|---|---|"]
    cells = (
        (name, *(percent(figures[part].to_dict()) for figures in (whole, lacking))) for part, name in PARTS.items()
    )
    return lines + [f"| {' | '.join(row)} |" for row in cells]


def directions_list(results: dict[str, Any], whole: dict[str, Figure], lacking: dict[str, Figure]) -> list[str]:
    """Whether the figures differ as expected."""
    pairs = [(what, *(results[name]["figures"][figure] for name, figure in sides)) for what, *sides in DIRECTIONS]
    for what, part in (("masked ones", MASK), ("those of children", CHILDREN)):
        pairs.append((f"bare faces above {what}, at one FAR", whole[""].to_dict(), whole[part].to_dict()))
    texts = []
    for what, high, low in pairs:
        if high["value"] <= low["value"]:
            answer = "**no**"
        else:
            answer = "yes, beyond the intervals" if high["low"] > low["high"] else "yes, within the intervals"
        texts.append(f"{what}: {answer}")
    share, trained = relative(lacking), relative(whole)
    answer = "yes" if share < trained else "**no**"
    what = f"{GROUPS[LACKING]} falls against the other groups where it is not trained on"
    texts.append(f"{what}: {answer}, from {trained:.2f} to {share:.2f} of their mean TAR")
    return items(texts)


def relative(figures: dict[str, Figure]) -> float:
    """TAR of the group that one model lacks, over the mean of the others."""
    values = [figures[group].to_dict()["value"] for group in GROUPS]
    return values.pop(LACKING) / np.mean(values)


def write_picture(path: Path) -> None:
    """Four people, a row each, as the parts of the protocols show them."""
    settings = (protocols.BARE, protocols.PROFILE, protocols.YOUNG, protocols.OLD, protocols.CHILD, protocols.MASKED)
    people, shots = torch.tensor(PICTURED).T.contiguous()
    columns = [render_faces(0, people, shots, settings=one).images for one in settings]
    Image.fromarray(torch.cat(columns, dim=2).flatten(0, 1).numpy()).save(path, quality=88)


if __name__ == "__main__":
    main()
