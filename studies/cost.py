"""What an identity costs: time and memory of a step of the head, for three ways to share it among processes.

python studies/cost.py run
python studies/cost.py page
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import textwrap
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from partialfc import CosFace, PartialFC, RowwiseSGD
from partialfc.bench.machine import describe
from partialfc.core import keyed_random
from partialfc.core.console import say
from partialfc.core.device import peak_bytes
from partialfc.core.files import write_file
from partialfc.pages.axes import decade_format, log_axis

ROOT = Path(__file__).parents[1]
RESULTS, PAGES = ROOT / "studies" / "results" / "cost.json", ROOT / "docs" / "studies"
TITLE = "What an identity costs"
PLAN = """
A step of the head alone (forward, backward, optimizer) on two processes with 64 images each, width
512, from 10,000 identities to 4 million, in three ways: *data parallel*, every process holds all
centers and their gradients are averaged; *model parallel*, every process holds half of the centers
and all are in use; *Partial FC*, the same with a tenth of the centers in each step, and with the
other parts that the study of the [rate](rates.md) trains. "Cost falls" counts as confirmed if from
100,000 identities on a step of Partial FC 0.1 takes at most a third of the time of model parallel
and less memory, and model parallel no more than data parallel.
"""
BATCH, WIDTH, RANKS, STEPS = 64, 512, 2, 4
CLASSES = (10_000, 100_000, 1_000_000, 4_000_000)
RATES = {
    "model parallel": 1.0,
    "Partial FC 0.3": 0.3,
    "Partial FC 0.1": 0.1,
    "Partial FC 0.05": 0.05,
    "positives only": 0.0,
}
WAYS = ("data parallel", *RATES)
CLAIMED = ("data parallel", "model parallel", "Partial FC 0.1")
MOST_BYTES = 20 << 30
# Images/s on 8 V100 GPUs of 32 GB (An et al. 2022); None did not fit.
PUBLISHED_CLASSES = (1_400_000, 5_500_000, 29_000_000)
PUBLISHED = {
    "data parallel": (1672, None, None),
    "model parallel": (3043, 1389, None),
    "Partial FC 0.1": (4738, 3975, 1855),
}
COLORS = {"data parallel": "#c2571a", "model parallel": "#7a5bd6", "Partial FC 0.1": "#3b7dd8"}


def rows_held(way: str) -> float:
    """Rows of the size of the centers that a step holds for each identity, over all processes."""
    if way == "data parallel":
        return 4 * RANKS
    return 3 if way == "model parallel" else 2 + 3 * RATES[way]


class DataParallelHead(torch.nn.Module):
    """CosFace with all centers in every process, as a last layer under DDP is."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.centers = torch.nn.Parameter(torch.empty(classes, WIDTH).normal_(std=0.01))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        # Dividing the products is cheaper than normalising a copy of the centers.
        cosines = (F.normalize(embeddings) @ self.centers.T) / self.centers.norm(dim=1)
        margin = torch.full((len(labels), 1), 0.4)
        return F.cross_entropy(64.0 * cosines.scatter_add(1, labels[:, None], -margin), labels)


def measure(rank: int, store: str, way: str, classes: int, out: Any) -> None:
    """The seconds of each step and the peak memory of one of the processes, into a queue."""
    torch.set_num_threads(max(1, torch.get_num_threads() // RANKS))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    head: torch.nn.Module
    optimizer: torch.optim.Optimizer
    if way == "data parallel":
        head = DataParallelHead(classes)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    else:
        head = PartialFC(classes, WIDTH, sample_rate=RATES[way], margin=CosFace(0.4), scale=64.0)
        optimizer = RowwiseSGD(head.parameters(), lr=0.1, momentum=0.9)
    seconds = []
    for step in range(STEPS):
        key = keyed_random.derive_key("cost", step, rank)
        embeddings = keyed_random.normal_rows(key, 0, BATCH, WIDTH).requires_grad_()
        labels = (keyed_random.uniform(key, torch.arange(BATCH)) * classes).long()
        dist.barrier()
        started = time.perf_counter()
        head(embeddings, labels).backward()
        if way == "data parallel":
            for parameter in head.parameters():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
                parameter.grad /= RANKS
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()
        seconds.append(time.perf_counter() - started)
    out.put((rank, statistics.median(seconds[1:]), peak_bytes(torch.device("cpu"))))
    dist.destroy_process_group()


def run(results: Path, classes: Sequence[int]) -> None:
    """Measure what is missing; a case in fresh processes, whose peak memory is its own."""
    results.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = json.loads(results.read_text())["rows"] if results.exists() else []
    done = {(row["way"], row["classes"]) for row in rows}
    context = multiprocessing.get_context("spawn")
    for count in classes:
        for way in WAYS:
            if (way, count) in done or rows_held(way) * count * WIDTH * 4 > MOST_BYTES:
                continue
            queue = context.Queue()
            with tempfile.TemporaryDirectory() as folder:
                arguments = (f"{folder}/store", way, count, queue)
                processes = [context.Process(target=measure, args=(rank, *arguments)) for rank in range(RANKS)]
                for process in processes:
                    process.start()
                found = [queue.get(timeout=1800) for _ in processes]
                for process in processes:
                    process.join()
            _, seconds, _ = min(found)
            hardware = describe("cpu")
            rows.append(
                {
                    "way": way,
                    "classes": count,
                    "seconds": seconds,
                    "peak_bytes": sum(memory for _, _, memory in found),
                    "machine": f"{hardware['cpu']}, {hardware['threads']} threads, torch {hardware['torch']}",
                }
            )
            write_file(results, json.dumps({"schema_version": 1, "rows": rows}, indent=1) + "\n")
            say(f"{way}, {count:,} identities: {RANKS * BATCH / seconds:,.0f} images/s")


# -- the page ----------------------------------------------------------------------------------------------------------


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Whether cost falls in proportion, by the rule of the plan."""
    by_case = {(row["way"], row["classes"]): row for row in rows}
    holds = []
    for count in CLASSES[1:]:
        data, model, partial = (by_case.get((way, count)) for way in CLAIMED)
        if partial and model:
            holds.append(3 * partial["seconds"] <= model["seconds"] and partial["peak_bytes"] < model["peak_bytes"])
        if model and data:
            holds.append(model["seconds"] <= data["seconds"])
    return "not run in full" if len(holds) < 4 else "confirmed" if all(holds) else "not confirmed"


def cells(way: str, classes: int) -> dict[str, str]:
    """What a step of the head takes, as a cell for the table of another study, by its heading."""
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    found = [row for row in rows if (row["way"], row["classes"]) == (way, classes)]
    words = [f"{row['seconds']:,.1f} s, {row['peak_bytes'] / 2**30:.1f} GiB" for row in found] or ["–"]
    return {f"head at {classes:,} identities": words[0]}


def page(results: Path, folder: Path) -> None:
    """Write the page and its plot from the results."""
    rows = json.loads(results.read_text())["rows"]
    folder.mkdir(parents=True, exist_ok=True)
    machines = "; ".join(sorted({row["machine"] for row in rows}))
    lines = [f"# {TITLE}", "", "Written by `python studies/cost.py page` from the results.", ""]
    lines += ["## Plan", "", PLAN.strip(), "", "## Measured", "", *textwrap.wrap(f"{machines}.", 100), ""]
    lines += ["| identities | way | images/s | a step | memory of both |", "|---|---|---|---|---|"]
    by_case = {(row["way"], row["classes"]): row for row in rows}
    for count in CLASSES:
        for way in WAYS:
            is_too_large = rows_held(way) * count * WIDTH * 4 > MOST_BYTES
            cells = f"– | – | {'does not fit (estimated)' if is_too_large else 'not run'}"
            if (row := by_case.get((way, count))) is not None:
                speed, memory = RANKS * BATCH / row["seconds"], row["peak_bytes"] / 2**30
                cells = f"{speed:,.0f} | {1000 * row['seconds']:,.0f} ms | {memory:.1f} GiB"
            lines.append(f"| {count:,} | {way} | {cells} |")
    lines += ["", f"Cost falls: **{verdict(rows)}**.", ""]
    lines += ["![Images a second against identities](cost.svg)", ""]
    lines += ["Thin lines are those published for eight V100 GPUs; where a line ends, nothing more fits."]
    (folder / "cost.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "cost.svg").write_text(_plot(rows), encoding="utf-8")


def _plot(rows: Sequence[dict[str, Any]]) -> str:
    across, up = log_axis(1e4, 3e7, 60, 620), log_axis(1, 1e4, 260, 20)
    parts = []
    for tick in across.ticks:
        x = across.place(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="20" y2="260"/>')
        parts.append(f'<text x="{x:.1f}" y="278" text-anchor="middle">{decade_format(tick)}</text>')
    for tick in up.ticks:
        y = up.place(tick)
        parts.append(f'<line class="grid" x1="60" x2="620" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="52" y="{y + 4:.1f}" text-anchor="end">{tick:,.0f}</text>')
    for number, (way, color) in enumerate(COLORS.items()):
        own = [(row["classes"], RANKS * BATCH / row["seconds"]) for row in rows if row["way"] == way]
        theirs = [(x, y) for x, y in zip(PUBLISHED_CLASSES, PUBLISHED[way], strict=True) if y is not None]
        for points, width in ((own, 2.5), (theirs, 1)):
            places = [(across.place(x), up.place(y)) for x, y in points]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"/>')
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{1 + width:.1f}" fill="{color}"/>' for x, y in places]
        x = 70 + 180 * number
        parts.append(f'<rect x="{x}" y="318" width="12" height="12" fill="{color}"/>')
        parts.append(f'<text x="{x + 18}" y="329">{escape(way)}</text>')
    parts.append('<text x="340" y="300" text-anchor="middle">identities</text>')
    label = "images a second against identities"
    style = "text{font:12px sans-serif;fill:#808080}.grid{stroke:#80808055}"
    size = f'viewBox="0 0 640 340" width="640" role="img" aria-label="{label}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>{"".join(parts)}</svg>\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=TITLE)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="measure what is missing")
    commands.add_parser("page", help="write docs/studies from the results")
    if parser.parse_args().command == "run":
        run(RESULTS, CLASSES)
    else:
        page(RESULTS, PAGES)


if __name__ == "__main__":
    main()
