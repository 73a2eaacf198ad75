"""Images a second of the demo's training on a machine that other programs use: alone, beside one and four busy loops.

    python benchmarks/busy.py [--rounds 3] [--steps 24]

A training of one process runs once as `partialfc train` runs it, once with the waiting that GNU OpenMP does by default;
a third one has a process of one thread for each core. A busy loop is a process that never waits. Fair is the share of
the processors that the training's threads have among all that run, times the rate alone. Writes the table of
docs/performance.md.
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


def rate(data: Path, folder: Path, settings: dict[str, str], processes: int, steps: int) -> float:
    """The median images a second of a short training; `settings` are environment variables."""
    command = [sys.executable, "-m", "partialfc", "train", "--recipe", "demo", "--data.path", str(data / "train")]
    command += ["--schedule.warmup-epochs", "0", "--schedule.epochs", str(steps * BATCH / IMAGES)]
    command += ["--output.log-every", str(max(1, steps // 8))]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    }
    environment |= settings
    if processes > 1:  # what torchrun sets; its own sessions would count as other programs to Linux
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "OMP_NUM_THREADS": "1"}
        environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    ranks = [
        subprocess.Popen(
            [*command, "--out", str(folder)],
            env=environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(processes)
    ]
    statuses = [process.wait() for process in ranks]
    if any(statuses):
        raise SystemExit(f"a training failed: {' '.join(command)}")
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]
    return statistics.median(line["images_per_second"] for line in lines[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    variants: dict[str, tuple[dict[str, str], int]] = {
        "partialfc": ({}, 1),
        "GNU OpenMP's default": ({"GOMP_SPINCOUNT": DEFAULT_SPINS}, 1),
        f"{cores} processes": ({}, cores),
    }
    rates: dict[tuple[int, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "data"
        FaceWorld(identities=IMAGES // 8, pairs=100, pair_identities=50).write(data, quiet=True)
        for number in range(options.rounds):
            for load in LOADS:
                loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(load)]
                try:
                    for name, (settings, processes) in variants.items():
                        folder = Path(temporary) / f"{number}-{load}-{name}"
                        found = rates.setdefault((load, name), [])
                        found.append(rate(data, folder, settings, processes, options.steps))
                        print(load, name, [round(one) for one in found], flush=True)
                finally:
                    for loop in loops:
                        loop.kill()
                        loop.wait()
    write_between("performance.md", "benchmarks/busy.py", table(rates, list(variants), cores, options.rounds))


def table(rates: dict[tuple[int, str], list[float]], names: list[str], cores: int, rounds: int) -> list[str]:
    hardware = describe("cpu")
    lines = [
        f"{hardware['cpu']}, {cores} cores, torch {hardware['torch']}; images/s, medians of {rounds} runs.",
        "",
        "| busy loops | fair | " + " | ".join(f"{name} | of fair" for name in names) + " |",
        "|---|---" + "|---|---" * len(names) + "|",
    ]
    alone = statistics.median(rates[0, names[0]])
    for load in LOADS:
        fair = alone * min(1.0, cores / (cores + load))
        found = [statistics.median(rates[load, name]) for name in names]
        lines.append(
            f"| {load} | {fair:,.0f} | " + " | ".join(f"{one:,.0f} | {one / fair:.2f}" for one in found) + " |"
        )
    return lines


if __name__ == "__main__":
    main()
