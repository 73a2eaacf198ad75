"""How evenly negatives are drawn: the worst ratio of drawn to wanted over blocks and over classes, at rates and sizes.

    python benchmarks/sampling.py [--steps 400]

Ten sample rates and ten class counts around multiples of the sampler's block of 4,096; 256 labels a step, spread evenly
or 90 % of them in the first tenth of the classes. A class is wanted with probability (sample size − P) / (C − P) in a
step whose P positives it is not among. For the classes the table has χ² per class, which is 1 for independent draws of
equal probability, since the worst of a million classes says little. Writes docs/results/sampling.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from documents import write_between
from partialfc.head.sampling import sample_classes, sample_size

BLOCK = 4096
RATES = (1e-5, 1e-4, 1e-3, 0.01, 0.05, 0.1, 0.3, 0.5, 0.9, 0.999)
SIZES = (4095, 4096, 4097, 4100, 8191, 8193, 20_481, 100_000, 409_601, 1_000_000)
LABELS = 256


def labels_of(step: int, num_classes: int, clustered: bool) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    spread = torch.randint(num_classes, (LABELS,), generator=generator)
    near = torch.randint(max(1, num_classes // 10), (LABELS,), generator=generator)
    return torch.where(torch.rand(LABELS, generator=generator) < 0.9, near, spread) if clustered else spread


def evenness(num_classes: int, rate: float, clustered: bool, steps: int) -> tuple[float, float, float] | None:
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


def table(steps: int) -> Iterator[str]:
    yield f"{steps} steps a row, fewer for large samples."
    yield ""
    yield "| classes | rate | spread: blocks, χ² | clustered: blocks, χ² |"
    yield "|---|---|---|---|"
    for num_classes in SIZES:
        for rate in RATES:
            # Large samples need fewer steps for the same precision.
            count = max(20, min(steps, int(4e7 / max(1, rate * num_classes))))
            cells = []
            for clustered in (False, True):
                found = evenness(num_classes, rate, clustered, count)
                cells.append("–" if found is None else "{:.3f} to {:.3f}, {:.2f}".format(*found))
            if cells != ["–", "–"]:
                row = f"| {num_classes:,} | {rate:g} | {cells[0]} | {cells[1]} |"
                print(row, flush=True)
                yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="steps of each row, fewer for large samples")
    options = parser.parse_args()
    torch.set_num_threads(1)
    write_between("results/sampling.md", "benchmarks/sampling.py", ["", *table(options.steps), ""])


if __name__ == "__main__":
    main()
