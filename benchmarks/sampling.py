"""How evenly negatives are drawn: the worst ratio of drawn to wanted over blocks and over classes, at rates and sizes.

    python benchmarks/sampling.py [--steps 400] [--before COMMIT]

Ten sample rates and ten class counts around multiples of the sampler's block of 4,096; 256 labels a step, spread evenly
or 90 % of them in the first tenth of the classes. A class is wanted with probability (sample size − P) / (C − P) in a
step whose P positives it is not among. For the classes the table has χ² per class, which is 1 for independent draws of
equal probability, since the worst of a million classes says little. Writes docs/results/sampling.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import torch
from torch import Tensor

from documents import write_between
from partialfc.head.sampling import sample_classes, sample_size

BLOCK = 4096
RATES = (1e-5, 1e-4, 1e-3, 0.01, 0.05, 0.1, 0.3, 0.5, 0.9, 0.999)
SIZES = (4095, 4096, 4097, 4100, 8191, 8193, 20_481, 100_000, 409_601, 1_000_000)
LABELS = 256
Evenness = tuple[float, float, float]


def labels_of(step: int, num_classes: int, clustered: bool) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    spread = torch.randint(num_classes, (LABELS,), generator=generator)
    near = torch.randint(max(1, num_classes // 10), (LABELS,), generator=generator)
    return torch.where(torch.rand(LABELS, generator=generator) < 0.9, near, spread) if clustered else spread


def evenness(num_classes: int, rate: float, clustered: bool, steps: int) -> Evenness | None:
    """Smallest and largest ratio of a block, and χ² per class; None if no step wants a negative."""
    drawn, wanted = torch.zeros(num_classes, dtype=torch.float64), torch.zeros(num_classes, dtype=torch.float64)
    variance = torch.zeros(num_classes, dtype=torch.float64)
    for step in range(steps):
        labels = labels_of(step, num_classes, clustered)
        positives = labels.unique()
        share = max(0, sample_size(num_classes, rate) - len(positives)) / (num_classes - len(positives))
        sampled = sample_classes(
            labels, num_classes=num_classes, sample_rate=rate, seed=0, step=step, start=0, stop=num_classes
        )
        drawn[sampled] += 1
        drawn[positives] -= 1
        wanted += share
        wanted[positives] -= share
        variance += share * (1 - share)
        variance[positives] -= share * (1 - share)
    if float(wanted.sum()) < 1:
        return None
    ratios = torch.stack([part.sum() for part in drawn.split(BLOCK)]) / torch.stack(
        [part.sum() for part in wanted.split(BLOCK)]
    )
    chi_square = ((drawn - wanted) ** 2 / variance.clamp_min(1e-12)).mean()
    return float(ratios.min()), float(ratios.max()), float(chi_square)


def measure(steps: int) -> list[tuple[int, float, list[Evenness | None]]]:
    """Classes, rate, and what spread and clustered labels give, of every row that draws negatives."""
    rows = []
    for num_classes in SIZES:
        for rate in RATES:
            # Large samples need fewer steps for the same precision.
            count = max(20, min(steps, int(4e7 / max(1, rate * num_classes))))
            found = [evenness(num_classes, rate, clustered, count) for clustered in (False, True)]
            if found != [None, None]:
                print(num_classes, rate, found, file=sys.stderr, flush=True)
                rows.append((num_classes, rate, found))
    return rows


def measure_at(commit: str, steps: int) -> list[tuple[int, float, list[Evenness | None]]]:
    """The same with the sampler of an earlier commit, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", commit, "src"], check=True, capture_output=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        command = [sys.executable, __file__, "--steps", str(steps), "--json"]
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": f"{folder}/src"}
        )
    rows: list[tuple[int, float, list[Evenness | None]]] = json.loads(done.stdout)
    return rows


def table(commit: str, steps: int) -> Iterator[str]:
    yield f"{steps} steps a row, fewer for large samples; before is commit {commit}."
    yield ""
    yield "| classes | rate | spread: before | now | χ² | clustered: before | now | χ² |"
    yield "|---|---|---|---|---|---|---|---|"
    before = {(num_classes, rate): found for num_classes, rate, found in measure_at(commit, steps)}
    for num_classes, rate, found in measure(steps):
        cells = []
        for old, new in zip(before.get((num_classes, rate), [None, None]), found, strict=True):
            cells += ["–" if one is None else f"{one[0]:.3f} to {one[1]:.3f}" for one in (old, new)]
            cells.append("–" if new is None else f"{new[2]:.2f}")
        yield f"| {num_classes:,} | {rate:g} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="steps of each row, fewer for large samples")
    parser.add_argument("--before", default="dfde35e", metavar="COMMIT", help="whose sampler stands beside ours")
    parser.add_argument("--json", action="store_true", help="print the rows of this commit's sampler and nothing else")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.json:
        print(json.dumps(measure(options.steps)))
    else:
        lines = list(table(options.before, options.steps))
        write_between("results/sampling.md", "benchmarks/sampling.py", ["", *lines, ""])


if __name__ == "__main__":
    main()
