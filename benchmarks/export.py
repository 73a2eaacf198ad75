"""Every architecture as ONNX, in float32 and with float16 weights: agreement with PyTorch, size and latency.

    python benchmarks/export.py [--backbones r50 mbf] [--largest-batch 64]

The weights are random, with the statistics of batch normalisation taken from procedural faces. An architecture runs in
a process of its own, and its line is kept in a file beside the results of those before it. Writes its table into
docs/export.md. All architectures take 16 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from documents import paragraph, write_between
from partialfc import create_backbone
from partialfc.bench.machine import describe
from partialfc.core.console import counted
from partialfc.data.augment import normalise
from partialfc.faces.render import render_faces
from partialfc.model.config import ModelConfig
from partialfc.model.files import Model
from partialfc.model.onnx_file import OnnxNetwork
from partialfc.use.graph import LEAST_COSINE, GraphNetwork, WeightType, time_one_image, write_graph

BACKBONES = ["mini", "mbf", "mbf_large", "r18", "r34", "r50", "r100", "r200"]
BACKBONES += ["vit_t", "vit_s", "vit_b", "vit_l", "vit_h"]
WEIGHTS: tuple[WeightType, ...] = ("float32", "float16")
SIZE, WIDTH = 112, 512
_LARGEST_LOAD = 1.5  # programs a core, at which a time still tells something


def with_statistics(backbone: nn.Module, faces: torch.Tensor) -> nn.Module:
    """The network in evaluation mode, its batch statistics those of some faces."""
    for layer in backbone.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = None  # the statistics of all batches so far
            layer.reset_running_stats()
    with torch.no_grad():
        backbone.train()(faces)
    return backbone.eval()


@torch.inference_mode()
def measure(name: str, largest_batch: int) -> dict[str, Any]:
    """Agreement and latency of one architecture."""
    numbers = torch.arange(largest_batch)
    faces = normalise(render_faces(0, numbers, torch.zeros_like(numbers), size=SIZE).images)
    with torch.inference_mode(False):
        backbone = with_statistics(create_backbone(name, embedding_dim=WIDTH, image_size=SIZE), faces[:8].clone())
    model = Model(backbone, ModelConfig(name, WIDTH, SIZE))
    network = GraphNetwork(model, mirror=False)
    expected = torch.cat([network(part) for part in faces.split(16)])
    row: dict[str, Any] = {"name": name, "parameters": sum(one.numel() for one in backbone.parameters())}
    row["largest_batch"] = largest_batch
    row["load"] = os.getloadavg()[0] / (os.cpu_count() or 1)  # of this process and others
    row["torch_ms"] = time_one_image(network, faces[:1])
    for weights in WEIGHTS:
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "model.onnx"
            started = time.monotonic()
            try:
                with torch.inference_mode(False):
                    write_graph(path, model, network, weights)
            except ValueError as error:  # what the format cannot hold
                row[weights] = {"refused": str(error)}
                continue
            seconds = time.monotonic() - started
            export = OnnxNetwork(path)
            cosines = [
                float(F.cosine_similarity(export(faces[:batch]).double(), expected[:batch].double()).min())
                for batch in (1, 3, largest_batch)
            ]
            latency = time_one_image(export, faces[:1])
            size = path.stat().st_size
            row[weights] = {"cosine": min(cosines), "bytes": size, "ms": latency, "seconds": seconds}
            del export
    return row


def line_of(row: dict[str, Any]) -> str:
    """A line of the table, without times that were measured beside too much else."""
    is_idle = row.get("load", math.inf) <= _LARGEST_LOAD
    cells = [row["name"], f"{row['parameters'] / 1e6:.1f} M", str(row["largest_batch"])]
    cells += [f"{row['torch_ms']:.0f}" if is_idle else "busy"]
    for weights in WEIGHTS:
        found = row[weights]
        if "refused" in found:
            cells += ["over 2 GiB", "", ""]
            continue
        if found["cosine"] < LEAST_COSINE[weights]:
            raise SystemExit(f"{row['name']} in {weights} agrees to {found['cosine']} only")
        milliseconds = f"{found['ms']:.0f}" if is_idle else "busy"
        cells += [f"{1 - found['cosine']:.0e}", f"{found['bytes'] / 1e6:.0f}", milliseconds]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=BACKBONES, metavar="NAME")
    parser.add_argument("--largest-batch", type=int, default=64, metavar="N")
    parser.add_argument("--rows", type=Path, default=Path(tempfile.gettempdir()) / "export-rows.jsonl", metavar="FILE")
    parser.add_argument("--measure", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.largest_batch)))
        return
    rows = {}
    if options.rows.exists():
        rows = {row["name"]: row for row in map(json.loads, options.rows.read_text().splitlines())}
    for name in options.backbones:
        if name not in rows:
            words = [sys.executable, __file__, "--measure", name, "--largest-batch", str(options.largest_batch)]
            rows[name] = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
            options.rows.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
            print(line_of(rows[name]), flush=True)
    facts = describe("cpu")
    machine = f"{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}"
    threads = counted(int(facts["threads"]), "thread")
    what = (
        f"Random weights, {SIZE} × {SIZE}, embeddings of {WIDTH}, procedural faces in batches of 1, 3 and the "
        f"largest. 1 − cosine is the worst face's, against PyTorch. The times are medians for one "
        f"image on {machine}; PyTorch with {threads}, onnxruntime with one a core; busy is a machine that had "
        "other work in that minute."
    )
    heads = ["network", "parameters", "largest batch", "PyTorch, ms"]
    heads += [f"{weights}: 1 − cosine | MB | ms" for weights in WEIGHTS]
    table = [
        f"| {' | '.join(heads)} |",
        "|---" * 10 + "|",
        *(line_of(rows[name]) for name in BACKBONES if name in rows),
    ]
    write_between("export.md", "benchmarks/export.py", [*paragraph(what), "", *table])


if __name__ == "__main__":
    main()
