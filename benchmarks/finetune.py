"""Fine-tuning the demo's model on a group it has not seen, with and without a part of the old set.

    python benchmarks/finetune.py DEMO --out DIR [--write]

DEMO is the folder of `partialfc demo`. DIR gets 500 people of a group whose traits lie far from those of the demo's,
and the folders of `partialfc finetune`, run as a user would; what is there already is kept. --write puts the table into
docs/results/finetune.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from documents import paragraph, write_between
from partialfc.bench.machine import describe
from partialfc.faces.parameters import GROUPS
from partialfc.faces.sets import write_training_set
from partialfc.faces.settings import FaceSettings

PEOPLE, SHOTS, SIZE = 500, 10, 64
FIRST = 2_000_003  # all of one group, and neither in the demo's training nor in its test
SETTINGS = FaceSettings(group_shift=2.0)  # usual is 0.55


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder of the demo")
    parser.add_argument("--out", type=Path, required=True, help="folder for people and runs")
    parser.add_argument("--write", action="store_true", help="write docs/results/finetune.md")
    options = parser.parse_args()
    people = options.out / "people"
    if not people.exists():
        options.out.mkdir(parents=True, exist_ok=True)
        who = range(FIRST, FIRST + GROUPS * PEOPLE, GROUPS)
        write_training_set(people, identities=who, shots=SHOTS, size=SIZE, settings=SETTINGS, layout="folder")
    demo, lines = options.demo, []
    for name, old in (
        ("half of the images from the old set", ["--old", demo / "data" / "train"]),
        ("new people alone", []),
    ):
        out = options.out / ("mixed" if old else "alone")
        took = out / "seconds.json"
        if not took.exists():
            command = [demo / "run", people, *old, "--benchmark", f"pairs={demo / 'data' / 'pairs.bin'}", "--out", out]
            started = time.monotonic()
            subprocess.run([sys.executable, "-m", "partialfc", "finetune", *map(str, command)], check=True)
            took.write_text(json.dumps({"seconds": time.monotonic() - started, "hardware": describe("cpu")}))
        measured = json.loads(took.read_text())
        result = json.loads((out / "finetune.json").read_text())
        for benchmark, change in result["changes"].items():
            before, after = (f"{change[side]['value']:.1%}" for side in ("before", "after"))
            low, value, high = (f"{100 * change['change'][end]:+.1f}" for end in ("low", "value", "high"))
            seconds = f"{measured['seconds']:.0f} s"
            lines.append(f"| {name} | {benchmark} | {before} | {after} | {value} ({low} to {high}) | {seconds} |")
    hardware = measured["hardware"]  # not that of a call which only writes the table again
    table = [
        *paragraph(
            f"{hardware['cpu']}, {hardware['threads']} threads, torch {hardware['torch']}; one run each. TAR at an FMR "
            "of 1e-3, its change in points with the 95 % interval, and the time of the whole command."
        ),
        "",
        "| training | tested on | before | after | change | time |",
        "|---|---|---|---|---|---|",
        *lines,
    ]
    print("\n".join(table))
    if options.write:
        write_between("results/finetune.md", "benchmarks/finetune.py", table)


if __name__ == "__main__":
    main()
