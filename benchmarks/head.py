"""Measure our head beside the dense one and write the tables of docs/performance.md and the figures of README.md.

    python benchmarks/head.py [--steps 5] [--device cpu] [--only step|growth|sampling|unsampled] [--configuration 0]

The variants of a configuration alternate in one run. JSON lines go to standard output, and each table is written as
soon as it is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from typing import Any

import torch

from documents import paragraph, write_between
from partialfc.bench.head import bench_head
from partialfc.bench.head_step import HeadCase
from partialfc.bench.head_variants import Phases, our_steps
from partialfc.bench.machine import describe
from partialfc.head.optim import Unsampled
from partialfc.head.sampling import sample_classes

IN_README = 1
# With the dense head beside it, the last one does not fit a small machine's memory.
STEPS: list[dict[str, Any]] = [
    {"num_classes": 100_000, "sample_rate": 0.1, "batch_size": 128, "baseline": True},
    {"num_classes": 1_000_000, "sample_rate": 0.1, "batch_size": 128, "baseline": True},
    {"num_classes": 1_000_000, "sample_rate": 1.0, "batch_size": 128, "baseline": True, "update": "deferred"},
    {"num_classes": 360_000, "sample_rate": 0.1, "batch_size": 512, "baseline": True},
    {
        "num_classes": 2_000_000,
        "sample_rate": 1.0,
        "batch_size": 128,
        "update": "deferred",
        "operand_dtype": "bfloat16",
    },
]
GROWTH = (100_000, 400_000, 1_000_000, 4_000_000)
GROWTH_SAMPLED = 10_000
UNSAMPLED = (100_000, 1_000_000)
SAMPLING = ((1_000_000, 0.1), (10_000_000, 0.1), (100_000_000, 0.01))
_MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=("step", "growth", "sampling", "unsampled"))
    parser.add_argument("--configuration", type=int, help="measure only this one of the steps, and write no table")
    options = parser.parse_args()
    if options.configuration is not None:
        measure_step(STEPS[options.configuration], options)
        return
    parts = {
        "step": step_table,
        "growth": growth_table,
        "sampling": sampling_table,
        "unsampled": unsampled_table,
    }
    for name, part in parts.items():
        if options.only in (None, name):
            lines = [hardware_line(options.device), "", *part(options)]
            write_between("performance.md", f"benchmarks/head.py {name}", lines)


def measure_step(configuration: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    results = []
    for result in bench_head(**configuration, steps=options.steps, device=options.device):
        print(json.dumps(result), flush=True)
        results.append(result)
    return results


def step_table(options: argparse.Namespace) -> Iterator[str]:
    """A line for each variant: time and memory, relative to the dense head of the same run."""
    phases = "sampling, forward, backward, optimizer"
    yield f"| classes | rate | batch | head | best step | median | {phases} | peak memory |"
    yield "|---|---|---|---|---|---|---|---|"
    for number, configuration in enumerate(STEPS):
        results = measure_step(configuration, options)
        dense = results[-1] if configuration.get("baseline") else None
        if number == IN_README:
            sentence = readme_sentence(configuration, results, options.device)
            write_between("../README.md", "benchmarks/head.py step", sentence)
        for result in results:
            faster = f" ({dense['step_ms_min'] / result['step_ms_min']:.1f} ×)" if dense else ""
            leaner = f" ({result['peak_bytes'] / dense['peak_bytes']:.2f} ×)" if dense else ""
            phases = " / ".join(f"{value:,.0f}" for value in result["phases_ms"].values())
            yield (
                f"| {configuration['num_classes']:,} | {configuration['sample_rate']} | "
                f"{configuration['batch_size']} | {result['variant']} | "
                f"{result['step_ms_min']:,.0f} ms{faster} | {result['step_ms_median']:,.0f} ms | "
                f"{phases} ms | {result['peak_bytes'] / _MIB:,.0f} MiB{leaner} |"
            )


def readme_sentence(configuration: dict[str, Any], results: list[dict[str, Any]], device: str) -> list[str]:
    """The default and the fastest of our variants beside the dense head, as the README states them."""
    by_name = {result["variant"]: result["step_ms_min"] for result in results}
    default, fastest, dense = (
        by_name[name] for name in ("partialfc sparse", "partialfc deferred bfloat16", "dense baseline")
    )
    hardware = describe(device)
    return paragraph(
        f"A training step of a head with {configuration['num_classes']:,} identities, sample rate "
        f"{configuration['sample_rate']} and {configuration['batch_size']} images takes {default:,.0f} ms, and "
        f'{fastest:,.0f} ms with `update="deferred"` and bfloat16 operands: {dense / default:.1f} and '
        f"{dense / fastest:.1f} times as fast as the usual dense head on the same machine ({hardware['cores']} cores "
        f"of {hardware.get('gpu', hardware['cpu'])}; [docs/performance.md](docs/performance.md))."
    )


def growth_table(options: argparse.Namespace) -> Iterator[str]:
    """A fixed number of sampled classes out of a growing number of classes."""
    yield f"| classes | sampled | best step | relative to {GROWTH[0]:,} classes |"
    yield "|---|---|---|---|"
    first = None
    for classes in GROWTH:
        configuration = {"num_classes": classes, "sample_rate": GROWTH_SAMPLED / classes, "batch_size": 128}
        (result,) = measure_step(configuration | {"update": "deferred", "operand_dtype": "bfloat16"}, options)
        first = first or result["step_ms_min"]
        best = result["step_ms_min"]
        yield f"| {classes:,} | {GROWTH_SAMPLED:,} | {best:.1f} ms | {best / first:.2f} × |"


def sampling_table(options: argparse.Namespace) -> Iterator[str]:
    """Sampling the classes of a step on one process, best of the steps."""
    yield "| classes | sampled | drawing them | rand, topk and sort |"
    yield "|---|---|---|---|"
    for classes, rate in SAMPLING:
        positives = torch.arange(0, classes, classes // 128, device=options.device)
        ours, usual = [], []
        for step in range(options.steps + 1):
            start = time.perf_counter()
            drawn = sample_classes(
                positives, num_classes=classes, sample_rate=rate, seed=0, step=step, start=0, stop=classes
            )
            middle = time.perf_counter()
            scores = torch.rand(classes, device=options.device)
            scores[positives] = 2.0
            torch.topk(scores, len(drawn)).indices.sort()
            ours.append(middle - start)
            usual.append(time.perf_counter() - middle)
        line = {
            "classes": classes,
            "sampled": len(drawn),
            "ms": 1000 * min(ours[1:]),
            "usual_ms": 1000 * min(usual[1:]),
        }
        print(json.dumps(line), flush=True)
        yield f"| {classes:,} | {len(drawn):,} | {line['ms']:.1f} ms | {line['usual_ms']:.0f} ms |"


def unsampled_table(options: argparse.Namespace) -> Iterator[str]:
    """Alternating steps that leave unsampled rows unchanged, and that move them as dense SGD would."""
    yield "| classes | rate | batch | `freeze` | `lazy_dense` | factor |"
    yield "|---|---|---|---|---|---|"
    for classes in UNSAMPLED:
        case = HeadCase(classes, 512, 128, 0.1, options.device)
        ways: tuple[Unsampled, ...] = ("freeze", "lazy_dense")
        heads = {way: our_steps(case, unsampled=way)["deferred"] for way in ways}
        seconds: dict[str, list[float]] = {way: [] for way in heads}
        # A row is sampled every tenth step on average, so that rows have soon missed as many steps as in a long run.
        for step in range(30 + options.steps):
            for way, take in heads.items():
                phases = Phases(options.device)
                take(*case.batch(step), phases)
                seconds[way].append(sum(phases.seconds.values()))
        frozen, dense = (1000 * min(seconds[way][30:]) for way in ways)
        print(json.dumps({"classes": classes, "freeze_ms": frozen, "lazy_dense_ms": dense}), flush=True)
        yield f"| {classes:,} | 0.1 | 128 | {frozen:.0f} ms | {dense:.0f} ms | {dense / frozen:.2f} × |"


def hardware_line(device: str) -> str:
    hardware = describe(device)
    return (
        f"{hardware.get('gpu', hardware['cpu'])}, {hardware['cores']} cores, {hardware['threads']} threads, "
        f"torch {hardware['torch']}, load average {os.getloadavg()[0]:.1f}; D = 512."
    )


if __name__ == "__main__":
    main()
