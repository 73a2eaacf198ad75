"""Images a second and memory of whole training steps, loader included, beside a loop written the usual way.

    python benchmarks/end_to_end.py --backbone r50 --classes 360000 --batch 128 --steps 60

The usual way: float16 autocast with a gradient scaler, DistributedDataParallel that searches for unused parameters, a
float transform image by image in the loader's workers, and the dense head. Both read the same procedural .rec file and
take turns, each in a fresh process. Prints a line of JSON for each, with the ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from partialfc.backbones import create_backbone
from partialfc.bench.head_step import HeadCase
from partialfc.bench.head_variants import DenseHead
from partialfc.config.options import BackboneConfig, DataConfig, HeadConfig, OutputConfig, ScheduleConfig, TrainConfig
from partialfc.core.device import choose_device
from partialfc.data.sources import open_source
from partialfc.data.sources.base import read_image
from partialfc.faces.sets import FaceWorld
from partialfc.training.loop import train
from partialfc.training.run.log import read_metrics

VARIANTS = ("partialfc", "usual")
WINDOW = 10  # steps between two readings of the clock
EMBEDDING_DIM = 512


def ours(arguments: argparse.Namespace, source: Path) -> dict[str, Any]:
    """The package's own loop, as `partialfc train` runs it."""
    images = len(open_source(source))
    config = TrainConfig(
        data=DataConfig(
            path=str(source),
            global_batch_size=arguments.batch,
            micro_batch_size=arguments.batch,
            workers=arguments.workers,
            num_classes=arguments.classes,
        ),
        backbone=BackboneConfig(arguments.backbone, EMBEDDING_DIM),
        head=HeadConfig(sample_rate=arguments.sample_rate),
        schedule=ScheduleConfig(epochs=arguments.steps * arguments.batch / images),
        output=OutputConfig(log_every=WINDOW, evaluate_every=10**9, checkpoint_every=10**9),
    )
    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder) / "run", quiet=True)
        lines = [line for line in read_metrics(Path(folder) / "run" / "metrics.jsonl") if line["kind"] == "train"]
    return figures([line["images_per_second"] for line in lines])


class TransformedImages(Dataset[tuple[Tensor, int]]):
    """One image at a time: decoded, mirrored by chance, to float and normalised on the host."""

    def __init__(self, source: Path) -> None:
        self.source = open_source(source)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        sample, image = read_image(self.source, index)
        if torch.rand(()) < 0.5:
            image = np.ascontiguousarray(image[:, ::-1])
        tensor = torch.from_numpy(image).permute(2, 0, 1).float().div(255).sub(0.5).div(0.5)
        return tensor, sample.label


def usual(arguments: argparse.Namespace, source: Path) -> dict[str, Any]:
    """The loop as it is usually written."""
    device = choose_device("auto")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    store = torch.distributed.HashStore()
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    backbone: nn.Module = create_backbone(arguments.backbone, embedding_dim=EMBEDDING_DIM, image_size=112).to(device)
    network = DistributedDataParallel(backbone, find_unused_parameters=True)
    case = HeadCase(arguments.classes, EMBEDDING_DIM, arguments.batch, arguments.sample_rate, str(device))
    head = DenseHead(case)
    parameters = [*(p for p in network.parameters() if p.requires_grad), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
    loader = DataLoader(
        TransformedImages(source), arguments.batch, shuffle=True, num_workers=arguments.workers, drop_last=True
    )
    speeds: list[float] = []
    step, started = 0, time.perf_counter()
    while step < arguments.steps:
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
                embeddings = network(images)
            loss = head(embeddings.float(), *head.sample(labels))
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(backbone.parameters(), 5.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            step += 1
            if step % WINDOW == 0:
                loss.item()  # waits for the device
                now = time.perf_counter()
                speeds.append(WINDOW * arguments.batch / (now - started))
                started = now
            if step == arguments.steps:
                break
    torch.distributed.destroy_process_group()
    return figures(speeds)


def figures(speeds: list[float]) -> dict[str, Any]:
    """The first window warms up."""
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    steady = speeds[1:] or speeds
    return {"images_per_second": statistics.median(steady), "best": max(steady), "peak_bytes": peak}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="r50")
    parser.add_argument("--classes", type=int, default=360_000, help="classes of the head")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--sample-rate", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2, help="turns of each variant")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2))
    parser.add_argument("--images", type=int, default=8192, help="procedural images in the .rec file")
    parser.add_argument("--variant", choices=VARIANTS, help="run one, in this process")
    parser.add_argument("--data", type=Path, default=Path("runs/end-to-end-data"), help="made if missing")
    arguments = parser.parse_args()
    world = FaceWorld(identities=max(1, arguments.images // 8), shots=8, pairs=20, pair_identities=8)
    if arguments.variant:
        run = ours if arguments.variant == "partialfc" else usual
        print(json.dumps(run(arguments, arguments.data / "train")))
        return 0
    world.write(arguments.data, resume=True)
    results: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    for _ in range(arguments.rounds):
        for variant in VARIANTS:
            command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.stderr.write(done.stderr)
                return done.returncode
            results[variant].append(json.loads(done.stdout.splitlines()[-1]))
    speeds = {variant: statistics.median(r["images_per_second"] for r in results[variant]) for variant in VARIANTS}
    for variant in VARIANTS:
        line = {"variant": variant, "backbone": arguments.backbone, "images_per_second": speeds[variant]}
        line |= {"peak_bytes": results[variant][-1]["peak_bytes"], "ratio": speeds[variant] / speeds["usual"]}
        print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
