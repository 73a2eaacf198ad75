"""Images a second of the demo's training on a machine that other programs use: alone, beside one and four busy loops.

    python benchmarks/busy.py [--rounds 3] [--steps 24]

A training runs once as `partialfc train` runs it, with a process for each core; once in one process, as torchrun would
start it; and once more so with the waiting that GNU OpenMP does by default. A busy loop is a process that never waits.
Fair is the share of the processors that one thread a core has among all that run, times the best rate alone. Writes the
table of docs/performance.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from documents import write_between
from partialfc.bench.machine import describe
from partialfc.faces.sets import FaceWorld
from partialfc.training.run.log import read_metrics

LOADS = (0, 1, 4)
DEFAULT_SPINS = "300000"  # what GNU OpenMP takes where neither this nor OMP_WAIT_POLICY is set
BATCH = 128
IMAGES = 8000
ONE_PROCESS = {"RANK": "0", "WORLD_SIZE": "1"}
VARIANTS: dict[str, dict[str, str]] = {
    "partialfc": {},
    "one process": ONE_PROCESS,
    "one process, GNU OpenMP's default": ONE_PROCESS | {"GOMP_SPINCOUNT": DEFAULT_SPINS},
}


def rate(data: Path, folder: Path, settings: dict[str, str], steps: int) -> float:
    """The median images a second of a short training; `settings` are environment variables."""
    command = [sys.executable, "-m", "partialfc", "train", "--recipe", "demo", "--data.path", str(data / "train")]
    command += ["--schedule.warmup-epochs", "0", "--schedule.epochs", str(steps * BATCH / IMAGES)]
    command += ["--output.log-every", str(max(1, steps // 8))]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    }
    command += ["--out", str(folder)]
    subprocess.run(command, env=environment | settings, check=True, capture_output=True)
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]
    return statistics.median(line["images_per_second"] for line in lines[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    rates: dict[tuple[int, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "data"
        FaceWorld(identities=IMAGES // 8, pairs=100, pair_identities=50).write(data, quiet=True)
        for number in range(options.rounds):
            for load in LOADS:
                loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(load)]
                try:
                    for name, settings in VARIANTS.items():
                        folder = Path(temporary) / f"{number}-{load}-{name}"
                        found = rates.setdefault((load, name), [])
                        found.append(rate(data, folder, settings, options.steps))
                        print(load, name, [round(one) for one in found], flush=True)
                finally:
                    for loop in loops:
                        loop.kill()
                        loop.wait()
    write_between("performance.md", "benchmarks/busy.py", table(rates, options.rounds))


def table(rates: dict[tuple[int, str], list[float]], rounds: int) -> list[str]:
    hardware, cores, names = describe("cpu"), os.cpu_count() or 1, list(VARIANTS)
    lines = [
        f"{hardware['cpu']}, {cores} cores, torch {hardware['torch']}; images/s, medians of {rounds} runs.",
        "",
        "| busy loops | fair | " + " | ".join(f"{name} | of fair" for name in names) + " |",
        "|---|---" + "|---|---" * len(names) + "|",
    ]
    alone = max(statistics.median(rates[0, name]) for name in names)
    for load in LOADS:
        fair = alone * min(1.0, cores / (cores + load))
        found = [statistics.median(rates[load, name]) for name in names]
        lines.append(
            f"| {load} | {fair:,.0f} | " + " | ".join(f"{one:,.0f} | {one / fair:.2f}" for one in found) + " |"
        )
    return lines


if __name__ == "__main__":
    main()
