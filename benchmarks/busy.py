"""Images a second of the demo's training on a machine that other programs use: alone, beside one and four busy loops.

    python benchmarks/busy.py [--rounds 3] [--steps 60]

Each training is a process of its own, once as `partialfc train` runs it, once with the waiting that GNU OpenMP does by
default. A busy loop is a process that never waits. Fair is the share of the processors that the training's threads have
among all that run, times the rate alone. Writes the table of docs/performance.md.
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


def rate(data: Path, folder: Path, spins: str | None, steps: int) -> float:
    """The median images a second of a short training."""
    command = [sys.executable, "-m", "partialfc", "train", "--recipe", "demo", "--data.path", str(data / "train")]
    command += ["--schedule.epochs", str(steps * BATCH / 8000), "--output.log-every", "5", "--out", str(folder)]
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    if spins is not None:
        environment["GOMP_SPINCOUNT"] = spins
    subprocess.run(command, check=True, env=environment, capture_output=True)
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]
    return statistics.median(line["images_per_second"] for line in lines[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    rates: dict[tuple[int, str | None], list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "data"
        FaceWorld(identities=1000, pairs=100, pair_identities=50).write(data, quiet=True)
        for number in range(options.rounds):
            for load in LOADS:
                loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(load)]
                try:
                    for spins in (None, DEFAULT_SPINS):
                        folder = Path(temporary) / f"{number}-{load}-{spins}"
                        rates.setdefault((load, spins), []).append(rate(data, folder, spins, options.steps))
                        print(load, spins, rates[load, spins], flush=True)
                finally:
                    for loop in loops:
                        loop.kill()
                        loop.wait()
    hardware, cores = describe("cpu"), os.cpu_count() or 1
    lines = [
        f"{hardware['cpu']}, {cores} cores, torch {hardware['torch']}; images/s, medians of {options.rounds} runs.",
        "",
        "| busy loops | fair | partialfc | of fair | GNU OpenMP's default | of fair |",
        "|---|---|---|---|---|---|",
    ]
    alone = max(statistics.median(rates[0, spins]) for spins in (None, DEFAULT_SPINS))
    for load in LOADS:
        fair = alone * min(1.0, cores / (cores + load))
        ours, default = (statistics.median(rates[load, spins]) for spins in (None, DEFAULT_SPINS))
        lines.append(
            f"| {load} | {fair:,.0f} | {ours:,.0f} | {ours / fair:.2f} | {default:,.0f} | {default / fair:.2f} |"
        )
    write_between("performance.md", "benchmarks/busy.py", lines)


if __name__ == "__main__":
    main()
