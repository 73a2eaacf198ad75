"""Small trainings with each margin, sampler and a schedule of the sample rate, three seeds each, on procedural faces.

    python benchmarks/methods.py --out /tmp/methods [--minutes 60] [--only adaface magface]

150 steps of 64 faces of 1,000 identities with the small network in float32, tested on pairs of other identities: what
differs from the recipe `demo` is in `METHODS`. The short training with its small margins says that the methods train,
and not which of them is better. Resumable: a run that is done is not repeated, `results.json` has all of them, and the
exit status is 75 if the minutes did not suffice. Writes a table into docs/results/margins.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from documents import write_between
from partialfc.bench.machine import describe
from partialfc.config.options import TrainConfig
from partialfc.core.files import write_file
from partialfc.faces.sets import FaceWorld
from partialfc.training.loop import train
from seeds import BATCH, IDENTITIES, SHOTS, SIZE, SeedRun, small_training

NOT_DONE = 75
SEEDS = (0, 1, 2)
STEPS = 150
# The recipe has scale 16 and CosFace 0.1, since a short training does not bear the published margins.
METHODS: dict[str, dict[str, Any]] = {
    "none": {"margin": "none", "margin_value": None},
    "cosface": {},
    "arcface": {"margin": "arcface"},
    "combined": {"margin": "combined", "margin_value": None, "margin_options": ["m2=0.1", "m3=0.05"]},
    "sphereface": {"margin": "combined", "margin_value": None, "margin_options": ["m1=1.2", "m2=0", "m3=0"]},
    "adaface": {"margin": "adaface"},
    "magface": {
        "margin": "magface",
        "margin_value": None,
        "margin_options": ["l_a=5", "u_a=30", "l_m=0.05", "u_m=0.2", "lambda_g=5"],
    },
    "curricularface": {"margin": "curricularface"},
    "elasticface, arc": {"margin": "elasticface"},
    "elasticface, cos": {"margin": "elasticface", "margin_options": ["form=cos"]},
    "subcenter": {"margin": "subcenter"},
    "cosface, sweep": {"sampler": "sweep"},
    "cosface, runs": {"sampler": "runs"},
    "cosface, rate 0.1, then 1": {"sample_rate": [[0.8, 0.1], [0.2, 1.0]]},
    "cosface, conflicts left out": {"conflict_threshold": 0.4},
}


def configuration(method: str, seed: int, data: Path, steps: int) -> TrainConfig:
    base = small_training(seed, data, steps)
    output = replace(base.output, checkpoint_every=max(1, steps // 3))
    return replace(base, head=replace(base.head, **METHODS[method]), output=output)


def lines_of(results: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each method: loss of the last quarter and accuracy, mean ± deviation over the seeds."""
    lines = ["| method | loss, last quarter | accuracy |", "|---|---|---|"]
    for method in METHODS:
        rows = [results[name] for seed in SEEDS if (name := f"{method}, seed {seed}") in results]
        if len(rows) < len(SEEDS):
            continue
        cells = []
        for figure, form in (("loss", ".3f"), ("accuracy", ".2%")):
            values = [row[figure] for row in rows]
            cells.append(f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for data, runs and results.json")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no run after so many")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--steps", type=int, default=STEPS, help="another number writes no table")
    options = parser.parse_args()
    stop = time.monotonic() + 60 * options.minutes
    world = FaceWorld(identities=IDENTITIES, shots=SHOTS, pairs=2000, pair_identities=500, image_size=SIZE)
    world.write(options.out / "data", resume=True)
    path = options.out / "results.json"
    results: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    for seed in SEEDS:  # all methods of a seed first, so that an interrupted benchmark compares them
        for method in options.only:
            name = f"{method}, seed {seed}"
            if name in results:
                continue
            if time.monotonic() > stop:
                return NOT_DONE
            folder = options.out / name.replace(", ", "-").replace(" ", "-")
            config = configuration(method, seed, options.out / "data" / "train", options.steps)
            train(config, folder, benchmarks={"pairs": options.out / "data" / "pairs.bin"}, resume=True, quiet=True)
            _, loss, accuracy = SeedRun.read(folder).row()
            results[name] = {"method": method, "seed": seed, "steps": options.steps, "loss": loss, "accuracy": accuracy}
            write_file(path, json.dumps(results, indent=1))
            print(json.dumps(results[name]), flush=True)
    facts = describe("cpu")
    lines = [
        f"{facts['cpu']}, torch {facts['torch']}, {options.steps} steps of {BATCH} images.",
        "",
        *lines_of(results),
    ]
    print("\n".join(lines))
    if options.steps == STEPS and options.only == list(METHODS):
        write_between("results/margins.md", "benchmarks/methods.py", lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
