"""A step of the head on a GPU: its time by tile size and block, with and without a CUDA graph, and where it goes.

python benchmarks/head_kernels.py [--classes 1000000] [--batch 1024] [--sample-rate 1.0] [--dtype float32]

One line of JSON each. Times are between events, the median of several steps after warming up; the embeddings are new
in every step but those of a graph. `roofline_ms` is four products of batch × classes × 512 in bfloat16 at the rate that
this GPU reaches in a plain product, or the bytes of centers and momentum at the rate of a plain copy, whichever takes
longer.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from partialfc.bench.head_step import HeadCase
from partialfc.bench.machine import describe
from partialfc.head.backends import gpu, tile_sizes

WIDTH = 512
TILES = tuple(size << 20 for size in (16, 32, 64, 128, 256))
ROW_ELEMENTS = (1024, 2048, 4096, 8192)
BLOCKS = (
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (256, 128, 64, 8, 3),
    (64, 256, 64, 4, 4),
    (64, 256, 64, 8, 3),
    (128, 128, 64, 4, 4),
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
)


def milliseconds(work: Callable[[], Any], repeats: int = 9, warm: int = 3) -> float:
    """Median time of `work` on the GPU."""
    times = []
    for number in range(repeats + warm):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        if number >= warm:
            times.append(start.elapsed_time(stop))
    return statistics.median(times)


def ceilings() -> dict[str, float]:
    """Operations a second of a large bfloat16 product of random numbers, and bytes a second of a large copy."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return {
        "product_flops": 2 * 8192**3 / (1e-3 * milliseconds(lambda: left @ right)),
        "copy_bytes": 8 * len(source) / (1e-3 * milliseconds(lambda: target.copy_(source))),
    }


class Step:
    """One head and its steps, which read nothing back."""

    def __init__(self, options: argparse.Namespace) -> None:
        case = HeadCase(options.classes, WIDTH, options.batch, options.sample_rate, "cuda")
        self.head, self.optimizer = case.build(update="deferred", operand_dtype="bfloat16", dtype=options.dtype)
        self.batches = [case.batch(step) for step in range(4)]
        self.embeddings, self.labels = case.batch(5)
        self.number = 0

    def whole(self) -> None:
        """New input, forward, backward and update."""
        embeddings, labels = self.batches[self.number % len(self.batches)]
        self.number += 1
        with torch.no_grad():
            self.embeddings.copy_(embeddings)
            self.labels.copy_(labels)
        self.alone()

    def alone(self) -> None:
        """Forward, backward and update."""
        self.embeddings.grad = None
        self.head(self.embeddings, self.labels).backward()
        self.optimizer.step()

    def graph(self) -> Callable[[], None]:
        """The step as a CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.alone()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.alone()
        return graph.replay

    def by_kernel(self) -> dict[str, float]:
        """Milliseconds of each kernel of one step, the ten longest."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.whole()
            torch.cuda.synchronize()
        events = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)
        return {event.key[:80]: event.device_time_total / 1000 for event in events[:10]}


def report(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--sample-rate", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    rates = ceilings()
    step = Step(options)
    step.whole()
    assert step.head.figures is not None
    rows = int(step.head.figures.sampled)
    products = 8 * options.batch * rows * WIDTH / rates["product_flops"]
    moved = 6 * rows * WIDTH * step.head.centers.element_size() / rates["copy_bytes"]
    roofline = {"products_ms": 1000 * products, "bytes_ms": 1000 * moved, "roofline_ms": 1000 * max(products, moved)}
    report({"hardware": describe("cuda"), "options": vars(options), "sampled": rows} | rates | roofline)
    report({"variant": "as it is", "step_ms": milliseconds(step.whole), "kernels_ms": step.by_kernel()})
    report({"variant": "CUDA graph", "step_ms": milliseconds(step.graph())})
    variants: list[tuple[ModuleType, str, Sequence[Any]]] = [
        (tile_sizes, "GPU_TILE_BYTES", TILES),
        (gpu, "PRODUCT_BLOCKS", [(block,) for block in BLOCKS]),
        (gpu, "ROW_ELEMENTS", ROW_ELEMENTS),
    ]
    for module, name, values in variants:
        before = getattr(module, name)
        for value in values:
            setattr(module, name, value)
            # Without the graph it is the host that is measured.
            times = {"step_ms": milliseconds(step.whole), "graph_ms": milliseconds(step.graph())}
            report({"variant": f"{name} = {value}"} | times)
        setattr(module, name, before)
    step.head.check()
    report({"peak_bytes": torch.cuda.max_memory_allocated()})


if __name__ == "__main__":
    main()
