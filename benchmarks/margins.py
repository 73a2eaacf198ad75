"""The step of a head with each margin beside CosFace's, and with each sampler beside the uniform one.

    python benchmarks/margins.py [--classes 100000 1000000] [--rounds 15] [--device cpu]

Sample rate 0.1, 128 images, 512 dimensions, float32, SGD. All variants of a size take turns, step by step, on one head
(Sub-center ArcFace on its own, of three times the rows); the ratio is the median over the rounds of a variant's step to
that of CosFace in the same round. Margins that leave negatives alone should take at most 1.15 times as long. Writes the
tables of docs/results/margins.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from unittest.mock import patch

from documents import write_between
from partialfc import (
    AdaFace,
    ArcFace,
    CombinedMargin,
    CosFace,
    CurricularFace,
    ElasticFace,
    MagFace,
    Margin,
    PartialFC,
    RowwiseAdamW,
    RowwiseSGD,
)
from partialfc.bench.head_step import HeadCase
from partialfc.bench.machine import available_bytes, describe
from partialfc.config.options import OptimizerConfig
from partialfc.core.device import timed

RATE, BATCH, WIDTH, WARM_UP = 0.1, 128, 512, 2
LIMIT = 1.15  # for margins that leave negatives alone
SGD = OptimizerConfig(lr=0.1, momentum=0.9, weight_decay=5e-4)
MARGINS: dict[str, Margin] = {
    "CosFace": CosFace(),
    "ArcFace": ArcFace(),
    "CombinedMargin": CombinedMargin(),
    "AdaFace": AdaFace(),
    "MagFace": MagFace(),
    "ElasticFace, arc": ElasticFace("arc"),
    "ElasticFace, cos": ElasticFace("cos"),
    "CurricularFace": CurricularFace(),
}
WITHOUT_KERNEL = "CurricularFace in chunked PyTorch"
SUB_CENTERS = "SubCenterArcFace, 3 centers"
SAMPLERS = ("uniform", "sweep", "runs")
Step = Callable[[int], float]


def step_of(
    case: HeadCase,
    head: PartialFC,
    optimizer: RowwiseSGD | RowwiseAdamW,
    margin: Margin | None,
    sampler: str,
    number: int,
) -> float:
    """Seconds of one step; a margin other than the head's own replaces it."""
    if margin is not None:
        head.loss_config = replace(head.loss_config, margin=margin)
        for name, value in margin.initial_state().items():
            if f"margin_{name}" not in dict(head.named_buffers()):
                head.register_buffer(f"margin_{name}", value.to(case.device))
    head.sampler = sampler  # type: ignore[assignment]
    embeddings, labels = case.batch(number)
    seconds: dict[str, float] = {}
    with timed(seconds, "step", case.device):
        head(embeddings, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return seconds["step"]


def without_kernel(step: Step, number: int) -> float:
    """The step as chunked PyTorch computes it, updates too."""
    with patch("partialfc.head.backends.select.numba_kernels", lambda: None):
        return step(number)


def steps_of(case: HeadCase) -> dict[str, Step]:
    """The steps that share one head: all margins, then all samplers with CosFace."""
    head, optimizer = case.build(SGD, margin="cosface")
    steps: dict[str, Step] = {
        name: partial(step_of, case, head, optimizer, margin, "uniform") for name, margin in MARGINS.items()
    }
    if case.device == "cpu":
        steps[WITHOUT_KERNEL] = partial(without_kernel, steps["CurricularFace"])
    for sampler in SAMPLERS[1:]:
        steps[sampler] = partial(step_of, case, head, optimizer, CosFace(), sampler)
    needed = 3 * 2 * 4 * case.num_classes * WIDTH * 1.2
    if needed < available_bytes(case.device):
        several, its_optimizer = case.build(SGD, margin="subcenter")
        steps[SUB_CENTERS] = partial(step_of, case, several, its_optimizer, None, "uniform")
    return steps


def measure(case: HeadCase, rounds: int) -> dict[str, list[float]]:
    """Seconds of each step of each variant, in turns; each round begins with another, since one warms the caches."""
    steps = steps_of(case)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(WARM_UP + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            taken = steps[name](number)
            if number >= WARM_UP:
                seconds[name].append(taken)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str) -> float:
    return statistics.median(one / other for one, other in zip(seconds[name], seconds["CosFace"], strict=True))


def table(results: dict[int, dict[str, list[float]]], names: list[str], first: str) -> Iterator[str]:
    """A line for each name: best step and ratio at each number of classes."""
    heads = [f"{classes:,} classes | beside {first}" for classes in results]
    yield f"| | {' | '.join(heads)} |"
    yield "|---" * (1 + 2 * len(results)) + "|"
    for name in names:
        cells = [
            f"{1000 * min(seconds[name]):,.1f} ms | {ratio(seconds, name):.2f} ×" if name in seconds else "– | –"
            for seconds in results.values()
        ]
        shown = "uniform" if name == "CosFace" and first == "uniform" else name
        yield f"| {shown} | {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=15, help="measured steps of each variant")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-table", action="store_true", help="print the tables and write no document")
    options = parser.parse_args()
    results = {
        classes: measure(HeadCase(classes, WIDTH, BATCH, RATE, options.device), options.rounds)
        for classes in options.classes
    }
    facts = describe(options.device)
    hardware = f"{facts.get('gpu', facts['cpu'])}, {facts['cores']} cores, torch {facts['torch']}; best step and median"
    hardware += f" ratio of {options.rounds} rounds."
    margins = list(table(results, [*MARGINS, WITHOUT_KERNEL, SUB_CENTERS], "CosFace"))
    samplers = list(table(results, ["CosFace", *SAMPLERS[1:]], "uniform"))
    print("\n".join([hardware, "", *margins, "", *samplers]))
    if not options.no_table:
        write_between("results/margins.md", "benchmarks/margins.py margins", [hardware, "", *margins])
        write_between("results/margins.md", "benchmarks/margins.py samplers", [hardware, "", *samplers])
    slow = [
        f"{name} at {classes:,} classes"
        for classes, seconds in results.items()
        for name, margin in MARGINS.items()
        if margin.negatives_bound == 1 and ratio(seconds, name) > LIMIT
    ]
    if slow:
        print(f"more than {LIMIT} times CosFace's step: {', '.join(slow)}", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
