"""The demo's time and accuracy: `partialfc demo` from an empty folder, in a process of its own.

    python benchmarks/demo.py --out runs/demo-measured

Writes the tables of docs/demo.md and the sentence of README.md. Run it on an idle machine; it takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from documents import paragraph, write_between
from partialfc.bench.machine import describe
from partialfc.training.run.log import read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="new folder of the demo")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} is there: give a new folder, so that nothing is taken over from an earlier demo")
    started = time.monotonic()
    command = [sys.executable, "-m", "partialfc", "demo", "--json", "--out", str(options.out)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.monotonic() - started
    summary = json.loads(done.stdout)
    epochs = [line for line in read_metrics(options.out / "run" / "metrics.jsonl") if line["kind"] == "evaluation"]
    write_between("demo.md", "benchmarks/demo.py accuracy", accuracy_table(summary, epochs))
    write_between("demo.md", "benchmarks/demo.py seconds", seconds_table(summary["seconds"], seconds))
    write_between("../README.md", "benchmarks/demo.py", readme_sentence(summary["accuracy"], seconds))


def accuracy_table(summary: dict[str, Any], epochs: list[dict[str, Any]]) -> list[str]:
    """Ten-fold accuracy of the model, epoch by epoch, and of the baselines."""
    model = " / ".join(f"{100 * line['accuracy']:.2f} ± {100 * line['accuracy_std']:.2f}" for line in epochs)
    return [
        "| on the 6,000 pairs | ten-fold accuracy, % |",
        "|---|---|",
        f"| trained model, after {' / '.join(str(number + 1) for number in range(len(epochs)))} epochs | {model} |",
        f"| raw pixels (local contrast, `evaluation/baselines.py`) | {100 * summary['pixel_accuracy']:.2f} |",
        f"| colours (joint histogram) | {100 * summary['color_accuracy']:.2f} |",
    ]


def seconds_table(stages: dict[str, float], seconds: float) -> list[str]:
    """Wall time by stage, and the machine."""
    hardware = describe("cpu")
    lines = [f"{hardware['cpu']}, {hardware['cores']} cores, torch {hardware['torch']}.", "", "| stage | seconds |"]
    lines += ["|---|---|", *(f"| {stage} | {value:.0f} |" for stage, value in stages.items())]
    return [*lines, f"| `partialfc demo` in all, imports included | {seconds:.0f} |"]


def readme_sentence(accuracy: float, seconds: float) -> list[str]:
    """What the README says of the demo."""
    hardware = describe("cpu")
    return paragraph(
        f"On {hardware['cores']} cores of {hardware['cpu']} this takes {seconds / 60:.0f} minutes and tells whether "
        f"two images show the same person for {accuracy:.0%} of the pairs; guessing gives 50%."
    )


if __name__ == "__main__":
    main()
