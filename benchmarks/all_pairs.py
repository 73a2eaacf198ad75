"""TAR at FAR over all pairs beside the bare float32 products of these pairs.

    python benchmarks/all_pairs.py                     100,000 × 512 on this CPU; writes docs/results/benchmarks.md
    python benchmarks/all_pairs.py --images 1624305 --identities 242143 --device cuda

The features are identities' unit centers plus noise of a spread level, so that some impostors are close, as of real
faces. The products are those of the upper triangle, block by block in threads, whose results are dropped: what any
scan of float32 features has to do at least. They and the protocol run in one process, one right after the other, the
products in the faster of two blocks. On another device or size the figures are printed as a line of JSON only.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from documents import paragraph, write_between
from partialfc.bench.machine import describe
from partialfc.core.console import Progress
from partialfc.core.device import peak_bytes
from partialfc.core.threads import run_parallel
from partialfc.evaluation.all_pairs import evaluate_all_pairs

IMAGES, IDENTITIES, WIDTH = 100_000, 15_000, 512
MFR_IMAGES = 1_624_305
BLOCKS = {"cpu": ((512, 1024), (2048, 2048)), "cuda": ((4096, 8192), (16384, 16384))}


def features(images: int, identities: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Unit rows around the centers of identities, in no certain order, and the labels."""
    generator = torch.Generator(device).manual_seed(0)
    labels = torch.randint(identities, (images,), generator=generator, device=device)
    centers = normalize(torch.randn(identities, WIDTH, generator=generator, device=device))
    units = torch.empty(images, WIDTH, device=device)
    for part in torch.arange(images, device=device).split(65_536):
        level = 0.6 + 1.4 * torch.rand(len(part), 1, generator=generator, device=device)  # quality differs
        noise = torch.randn(len(part), WIDTH, generator=generator, device=device) / WIDTH**0.5
        units[part] = normalize(centers[labels[part]] + level * noise)
    return units, labels


def products_seconds(units: Tensor, rows: int, columns: int) -> float:
    """The time of the float32 products of all blocks that touch the upper triangle."""
    count = len(units)
    blocks = [(i, j) for j in range(0, count, columns) for i in range(0, min(count, j + columns), rows)]

    def work(part: list[tuple[int, int]]) -> None:
        out = torch.empty(rows, columns, device=units.device)
        for i, j in part:
            left, right = units[i : i + rows], units[j : j + columns]
            torch.mm(left, right.T, out=out[: len(left), : len(right)])

    start = time.perf_counter()
    parts = 1 if units.is_cuda else 16 * torch.get_num_threads()
    run_parallel(work, [blocks[part::parts] for part in range(parts)])
    if units.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(images: int, identities: int, device: torch.device) -> dict[str, Any]:
    """The times, in seconds, of the products and of the protocol, and what the protocol found."""
    units, labels = features(images, identities, device)
    trial = units[:20_000]
    block = min(BLOCKS[device.type], key=lambda block: min(products_seconds(trial, *block) for _ in range(3)))
    cpu = time.process_time()
    products = products_seconds(units, *block)
    products_cpu = time.process_time() - cpu
    with Progress("scanning", unit="block") as progress:
        start, cpu = time.perf_counter(), time.process_time()
        result = evaluate_all_pairs(units, labels.cpu().numpy(), progress=progress.update)
        seconds, protocol_cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "images": images,
        "width": WIDTH,
        "products_seconds": round(products, 2),
        "products_block": block,
        "seconds": round(seconds, 2),
        "ratio": round(seconds / products, 3),
        "ratio_of_cpu_time": round(protocol_cpu / products_cpu, 3),  # on a machine that is busy otherwise
        "peak_bytes": peak_bytes(device),
        **result.to_dict(),
    }


def table(found: dict[str, Any]) -> list[str]:
    hardware = describe("cpu")
    figure = found["figures"]["tar@far=1e-6"]
    pairs = found["genuine_pairs"] + found["impostor_pairs"]
    mfr = MFR_IMAGES * (MFR_IMAGES - 1) // 2
    hours = mfr / pairs * found["seconds"] / 3600
    caption = (
        f"{hardware['cpu']}, {hardware['threads']} threads, torch {hardware['torch']}; D = {WIDTH}. Time from features "
        "in memory to TAR at FAR 1e-6 with its interval, beside the float32 products of the upper triangle alone."
    )
    plan = (
        f"MFR-ALL has {MFR_IMAGES:,} images and {mfr:,} pairs, {mfr / pairs:.0f} times as many: {hours:.1f} hours on "
        f"this CPU, {MFR_IMAGES * WIDTH * 5 / 2**30:.1f} GiB of features and codes in every process, and half of the "
        "time with twice the cores, on one host or several, since ranks share the blocks."
    )
    return [
        *paragraph(caption),
        "",
        "| images | genuine pairs | impostor pairs | products | protocol | ratio | peak memory | TAR at FAR 1e-6 |",
        "|---|---|---|---|---|---|---|---|",
        f"| {found['images']:,} | {found['genuine_pairs']:,} | {found['impostor_pairs']:,} "
        f"| {found['products_seconds']:.1f} s | {found['seconds']:.1f} s | {found['ratio']:.2f} "
        f"| {found['peak_bytes'] / 2**30:.2f} GiB "
        f"| {figure['value']:.2%} [{100 * figure['low']:.2f}, {100 * figure['high']:.2f}] |",
        "",
        *paragraph(plan),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--identities", type=int, default=IDENTITIES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
    arguments = parser.parse_args()
    found = measure(arguments.images, arguments.identities, torch.device(arguments.device))
    print(json.dumps(found))
    if arguments.device == "cpu" and arguments.images == IMAGES:
        write_between("results/benchmarks.md", "benchmarks/all_pairs.py", table(found))


if __name__ == "__main__":
    main()
