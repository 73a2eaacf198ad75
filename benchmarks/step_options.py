"""Images a second of a backbone's training step with each option of speed on and off; a table of docs/performance.md.

    python benchmarks/step_options.py [--backbones mini mbf r18] [--size 64] [--batch 32] [--rounds 5] [--device cpu]

The variants take turns, step by step; what is shown is the best step of each. Compiling takes a minute a network,
before anything is timed. On a GPU the figures go to standard output only.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from documents import write_between
from partialfc.backbones import create_backbone
from partialfc.bench.machine import describe

# What differs from the first: memory order, precision, optimizer, compiler, recomputed activations.
VARIANTS: dict[str, dict[str, bool]] = {
    "float32": {},
    "bfloat16": {"bfloat16": True},
    "bfloat16, channels last": {"bfloat16": True, "channels_last": True},
    "bfloat16, channels last, fused": {"bfloat16": True, "channels_last": True, "fused": True},
    "bfloat16, channels last, fused, compiled": {
        "bfloat16": True,
        "channels_last": True,
        "fused": True,
        "compile": True,
    },
    "bfloat16, channels last, recomputed": {"bfloat16": True, "channels_last": True, "checkpointing": True},
}
EMBEDDING_DIM = 128


def step_of(backbone: str, options: dict[str, bool], arguments: argparse.Namespace) -> Callable[[], None]:
    """One step on random images: forward, backward and update of the backbone."""
    device = arguments.device
    recompute = {"checkpointing": True} if options.get("checkpointing") else {}
    network: nn.Module = create_backbone(
        backbone, embedding_dim=EMBEDDING_DIM, image_size=arguments.size, **recompute
    ).to(device)
    order = torch.channels_last if options.get("channels_last") else torch.contiguous_format
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=order)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=options.get("fused") or None)
    images = torch.rand(arguments.batch, 3, arguments.size, arguments.size, device=device) * 2 - 1
    images = images.contiguous(memory_format=order)
    keys = torch.arange(arguments.batch, device=device)
    called = torch.compile(network) if options.get("compile") else network

    def step() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bool(options.get("bfloat16"))):
            embeddings = called(images, keys)
        embeddings.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()

    return step


def measure(backbone: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Images a second of each variant that works for this backbone here."""
    steps = {}
    for name, options in VARIANTS.items():
        try:
            steps[name] = step_of(backbone, options, arguments)
            steps[name]()
        except Exception as error:  # such as a network that cannot recompute, or no compiler on this machine
            steps.pop(name, None)
            print(
                json.dumps({"backbone": backbone, "variant": name, "left_out": str(error).splitlines()[0]}), flush=True
            )
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            best[name] = min(best[name], time.perf_counter() - start)
    speeds = {name: arguments.batch / seconds for name, seconds in best.items()}
    print(json.dumps({"backbone": backbone, "images_per_second": speeds}), flush=True)
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["mini", "mbf", "r18"])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    results = {backbone: measure(backbone, arguments) for backbone in arguments.backbones}
    if arguments.device == "cpu":
        write_table(results, arguments)


def write_table(results: dict[str, dict[str, float]], arguments: argparse.Namespace) -> None:
    hardware: dict[str, Any] = describe(arguments.device)
    lines = [
        f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} threads, torch {hardware['torch']}; "
        f"images a second, {arguments.size} × {arguments.size} pixels, {arguments.batch} images a step.",
        "",
        "| options | " + " | ".join(results) + " |",
        "|---|" + "---|" * len(results),
    ]
    for name in VARIANTS:
        cells = []
        for speeds in results.values():
            shown = name in speeds
            cells.append(f"{speeds[name]:.0f} ({speeds[name] / speeds['float32']:.2f} ×)" if shown else "–")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    write_between("performance.md", "benchmarks/step_options.py", lines)


if __name__ == "__main__":
    main()
