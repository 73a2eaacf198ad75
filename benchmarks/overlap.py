"""How much of the communication of a training step lies under computation: two gloo processes, read from a trace.

    python benchmarks/overlap.py --out /tmp/overlap

Trains r18 (each process with all of it) and vit_t (in both ways) on noise, profiled as `output.profile_steps` does, and
reads the trace of rank 0. Communication is every stretch from the start of a collective to its end, as gloo's threads
report it, the wait for the slower rank included; computation is every operation of PyTorch's on the main thread, and
the head's loops. Writes a table into docs/performance.md and a picture of one step beside it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from documents import DOCS, write_between
from partialfc.bench.machine import describe
from partialfc.config.options import BackboneConfig, ProcessesConfig, TrainConfig
from partialfc.config.recipes import RECIPES
from partialfc.core import keyed_random
from partialfc.data.images import encode_png
from partialfc.training.loop import train
from processes import run_processes
from timeline import Row, Span, standalone_svg, timeline

VARIANTS = (("r18", "ddp"), ("vit_t", "ddp"), ("vit_t", "fsdp"))
PICTURED = "r18-ddp"
FIRST, STOP, BATCH, IDENTITIES, SHOTS, SIZE = 4, 10, 32, 40, 8, 64
PICTURE = "images/overlap.svg"
_WORK = ("aten::", "head: ")  # of these none waits for a collective


@dataclass(frozen=True)
class Step:
    """One optimizer step of rank 0 in milliseconds from its start."""

    length: float
    backward: list[Span]
    computing: list[Span]
    collectives: dict[str, list[Span]]

    @property
    def communicating(self) -> list[Span]:
        return merged([span for spans in self.collectives.values() for span in spans])


def write_noise(folder: Path) -> Path:
    """Identity folders of noise: what the images show does not matter here."""
    for identity in range(IDENTITIES):
        (folder / f"{identity:03d}").mkdir(parents=True)
        for shot in range(SHOTS):
            key = keyed_random.derive_key("noise", identity, shot)
            image = (keyed_random.uniform(key, torch.arange(SIZE * SIZE * 3)) * 255).to(torch.uint8)
            path = folder / f"{identity:03d}" / f"{shot}.png"
            path.write_bytes(encode_png(image.view(SIZE, SIZE, 3).numpy()))
    return folder


def configuration(name: str, backbone: Any, data: Path) -> TrainConfig:
    base = RECIPES["demo"]
    steps = STOP + 1
    return replace(
        base,
        precision="float32",
        device="cpu",
        data=replace(base.data, path=str(data), global_batch_size=BATCH, micro_batch_size=BATCH, num_classes=20_000),
        backbone=BackboneConfig(name, 512),
        head=replace(base.head, update="sparse"),
        processes=ProcessesConfig(backbone=backbone),
        schedule=replace(base.schedule, epochs=steps * BATCH / (IDENTITIES * SHOTS), warmup_epochs=0.0),
        output=replace(
            base.output, log_every=steps, evaluate_every=steps, checkpoint_every=steps, profile_steps=f"{FIRST}:{STOP}"
        ),
    )


def work(rank: int, name: str, backbone: str, out: Path) -> None:
    train(configuration(name, backbone, out / "data"), out / f"{name}-{backbone}", quiet=True)


def merged(spans: list[Span]) -> list[Span]:
    """The same stretches of time without overlap, in order."""
    result: list[Span] = []
    for start, stop in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(stop, result[-1][1]))
        else:
            result.append((start, stop))
    return result


def length(spans: list[Span]) -> float:
    return sum(stop - start for start, stop in spans)


def common(left: list[Span], right: list[Span]) -> list[Span]:
    """The intersection of two lists of spans, each ordered and without overlap."""
    result, at = [], 0
    for start, stop in left:
        while at < len(right) and right[at][1] <= start:
            at += 1
        for other in range(at, len(right)):
            if right[other][0] >= stop:
                break
            result.append((max(start, right[other][0]), min(stop, right[other][1])))
    return result


def read_steps(trace: Path) -> list[Step]:
    """The steps of a trace, each from its own start."""
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("ph") == "X"]
    steps = []
    for step in (event for event in events if event["name"].startswith("step ")):
        begin, end = step["ts"], step["ts"] + step["dur"]

        def span(event: dict[str, Any], begin: float = begin, end: float = end) -> Span:
            start, stop = event["ts"], event["ts"] + event["dur"]
            return (max(start, begin) - begin) / 1000, (min(stop, end) - begin) / 1000

        inside = [event for event in events if event["ts"] < end and event["ts"] + event["dur"] > begin]
        main = [event for event in inside if event["tid"] == step["tid"] and event is not step]
        computing = [event for event in main if event["name"].startswith(_WORK)]
        collectives: dict[str, list[Span]] = {}
        for event in inside:
            if event["name"].startswith("gloo:"):
                collectives.setdefault(event["name"].removeprefix("gloo:"), []).append(span(event))
        backward = [span(event) for event in main if event["name"] == "backward pass"]
        steps.append(Step(step["dur"] / 1000, backward, merged([span(event) for event in computing]), collectives))
    return steps


def row(variant: str, steps: list[Step]) -> str:
    """Means over the steps."""
    count = len(steps)
    cells = [f"{sum(step.length for step in steps) / count:.0f} ms"]
    cells.append(f"{sum(len(spans) for step in steps for spans in step.collectives.values()) / count:.0f}")
    for part in (None, "backward"):
        flying = [step.communicating if part is None else common(step.communicating, step.backward) for step in steps]
        hidden = [common(spans, step.computing) for spans, step in zip(flying, steps, strict=True)]
        total, under = sum(map(length, flying)) / count, sum(map(length, hidden)) / count
        cells += [f"{total:.1f} ms", f"{under:.1f} ms ({under / total:.0%})"]
    return f"| {variant} | {' | '.join(cells)} |"


def picture(step: Step) -> str:
    rows = [Row("backward pass", step.backward), Row("computing", step.computing)]
    rows.append(Row("communicating", step.communicating))
    return standalone_svg(timeline(rows, name="one training step", stop=step.length))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="new folder for data and runs")
    parser.add_argument("--dry", action="store_true", help="print the table, and write nothing into docs/")
    options = parser.parse_args()
    write_noise(options.out / "data")
    names = ("backbone", "step", "collectives", "in flight", "of it hidden", "in the backward pass", "of it hidden")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    pictured = ""
    for name, backbone in VARIANTS:
        run_processes(2, work, name, backbone, options.out)
        steps = read_steps(options.out / f"{name}-{backbone}" / f"trace-{FIRST}-{STOP}.json")
        lines.append(row(f"{name}, {backbone}", steps))
        print(lines[-1], flush=True)
        if f"{name}-{backbone}" == PICTURED:
            pictured = picture(sorted(steps, key=lambda step: step.length)[len(steps) // 2])
    facts = describe("cpu")
    lines = [f"{facts['cpu']}, {facts['cores']} cores, two gloo processes, torch {facts['torch']}.", "", *lines, ""]
    lines.append(f"![One step of r18: what rank 0 computes, and which collectives are in flight]({PICTURE})")
    print("\n".join(lines))
    if not options.dry:
        (DOCS / PICTURE).write_text(pictured)
        write_between("performance.md", "benchmarks/overlap.py", lines)
    else:
        (options.out / "overlap.svg").write_text(pictured)


if __name__ == "__main__":
    main()
