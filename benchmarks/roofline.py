"""What this machine's CPU does of the head's operations, and what a step of the head would take at those rates.

    python benchmarks/roofline.py

Measures matrix products of the head's tiles, one product a thread as the head runs them, and the bandwidth of reading
and of updating rows; writes them into docs/performance.md with the step that they allow (1,000,000 classes, rate 1.0,
128 images, D = 512, bfloat16 operands).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from documents import write_between
from partialfc.bench.machine import describe
from partialfc.core.threads import run_parallel
from partialfc.head.backends import cpu_kernels

CLASSES, SAMPLES, WIDTH, TILE = 1_000_000, 128, 512, 768
_REPEATS = 5


def best_seconds(work: Callable[[int], object], items: int) -> float:
    """The shortest of some runs of `work` on range(items), in threads."""
    seconds = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        run_parallel(work, range(items))
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def product_rate(dtype: torch.dtype) -> float:
    """Operations a second of (TILE, WIDTH) by (WIDTH, SAMPLES)."""
    count = 200
    left, right = torch.randn(TILE, WIDTH).to(dtype), torch.randn(WIDTH, SAMPLES).to(dtype)
    seconds = best_seconds(lambda _: torch.mm(left, right), count)
    return 2 * TILE * WIDTH * SAMPLES * count / seconds


def row_rates() -> tuple[float, float]:
    """Bytes a second of gathering rows, and of updating them (two tables, read and written)."""
    rows = 200_000
    centers, momentum = torch.ones(rows, WIDTH), torch.zeros(rows, WIDTH)
    tiles = torch.arange(rows).split(TILE)
    unit, gradient = torch.empty(TILE, WIDTH), torch.zeros(TILE, WIDTH)
    numbers = np.float32(0.1), np.float32(0.9), np.float32(0.0)

    def gather(tile: int) -> None:
        cpu_kernels.gather_unit_rows(centers.numpy(), tiles[tile].numpy(), unit.numpy(), None)

    def update(tile: int) -> None:
        arrays = centers.numpy(), momentum.numpy(), tiles[tile].numpy(), gradient.numpy()
        cpu_kernels.sgd_rows(*arrays, *numbers)

    size = centers.numel() * 4
    return size / best_seconds(gather, len(tiles)), 4 * size / best_seconds(update, len(tiles))


def main() -> None:
    exact, rounded = product_rate(torch.float32), product_rate(torch.bfloat16)
    gathered, updated = row_rates()
    product, table = 2 * SAMPLES * WIDTH * CLASSES, 4 * WIDTH * CLASSES
    parts = [
        ("cosines, float32 product", f"{product / 1e9:.0f} GFLOP", f"{exact / 1e9:.0f} GFLOP/s", product / exact),
        (
            "two gradients, bfloat16 products",
            f"{2 * product / 1e9:.0f} GFLOP",
            f"{rounded / 1e9:.0f} GFLOP/s",
            2 * product / rounded,
        ),
        ("gathering centers twice", f"{2 * table / 1e9:.1f} GB", f"{gathered / 1e9:.0f} GB/s", 2 * table / gathered),
        (
            "updating centers and momentum",
            f"{4 * table / 1e9:.1f} GB",
            f"{updated / 1e9:.0f} GB/s",
            4 * table / updated,
        ),
    ]
    hardware = describe("cpu")
    lines = [
        f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} threads, torch {hardware['torch']}.",
        "",
        "| part of a step | work | measured rate | time |",
        "|---|---|---|---|",
        *(f"| {name} | {work} | {rate} | {1000 * seconds:,.0f} ms |" for name, work, rate, seconds in parts),
        f"| together | | | {1000 * sum(part[3] for part in parts):,.0f} ms |",
    ]
    print("\n".join(lines))
    write_between("performance.md", "benchmarks/roofline.py", lines)


if __name__ == "__main__":
    main()
