"""The memory of a process that trains a large ViT, replicated (DDP) and sharded (FSDP): 1, 2 and 4 processes.

    python benchmarks/fsdp.py --backbone vit_l

Parameters, gradients and AdamW's averages are counted byte by byte; the peak is that of the process's resident memory
during three steps with recomputed activations, beyond what it held before the network was built. Writes a table into
docs/results/training.md if all three sizes are run. vit_l takes 20 GB with four replicas.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from documents import write_between
from partialfc.backbones import create_backbone
from partialfc.bench.machine import describe
from partialfc.core import keyed_random
from partialfc.core.device import peak_bytes
from partialfc.distributed import collectives
from partialfc.distributed.sharded import local_shard
from partialfc.training.replicas import replicated, shard_over_processes
from processes import run_processes

WORLD_SIZES, STEPS, IMAGES = (1, 2, 4), 3, 4


@dataclass(frozen=True)
class Held:
    """Bytes of one process, and the loss of the last step, the mean over all."""

    parameters: int
    gradients: int
    optimizer: int
    peak: int
    loss: float


def size(tensors: list[Tensor]) -> int:
    return sum(local_shard(tensor).numel() * tensor.element_size() for tensor in tensors)


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("This script reads the memory of its processes from /proc, which Linux has.")


def warm_up() -> None:
    """Let torch import what it imports at the first step of an optimizer, so that it is not counted."""
    layer = nn.Linear(1, 1)
    layer(torch.ones(1, 1)).backward()
    torch.optim.AdamW(layer.parameters()).step()
    local_shard(layer.weight)


def measure(name: str, option: str) -> Held:
    """Three steps of AdamW on images that are a function of rank and step."""
    warm_up()
    before = resident_bytes()
    network = create_backbone(name, embedding_dim=512, image_size=112, checkpointing=True)
    if option == "fsdp" and collectives.world_size_of() > 1:
        shard_over_processes(network, torch.device("cpu"), torch.float32)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak: the whole network was here for a moment
    wrapped: nn.Module = replicated(network, torch.float32)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    loss, gradients = torch.zeros(()), 0
    for step in range(STEPS):
        key = keyed_random.derive_key("fsdp", step, collectives.rank_of())
        images = keyed_random.normal_rows(key, 0, IMAGES, 3 * 112 * 112).view(IMAGES, 3, 112, 112)
        loss = (wrapped(images) - 1).square().mean()
        loss.backward()
        gradients = size([parameter.grad for parameter in network.parameters() if parameter.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
    averages = [value for state in optimizer.state.values() for value in state.values() if value.dim() > 0]
    mean = float(collectives.all_reduce(loss.detach().double())) / collectives.world_size_of()
    parameters = size(list(network.parameters()))
    return Held(parameters, gradients, size(averages), peak_bytes(torch.device("cpu")) - before, mean)


def work(rank: int, name: str, option: str, out: str) -> None:
    ranks = collectives.gather_json(asdict(measure(name, option)))
    if rank == 0:
        Path(out).write_text(json.dumps(ranks))


def measured(name: str, option: str, world_size: int) -> list[Held]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "held.json"
        run_processes(world_size, work, name, option, str(out))
        return [Held(**held) for held in json.loads(out.read_text())]


def row(option: str, world_size: int, ranks: list[Held]) -> str:
    """The rank that holds most: shards differ in size where rows do not divide evenly."""
    most = max(ranks, key=lambda held: held.parameters)
    counted = (most.parameters, most.gradients, most.optimizer, most.parameters + most.gradients + most.optimizer)
    cells = [f"{count / 2**20:,.0f}" for count in (*counted, max(held.peak for held in ranks))]
    return f"| {option} | {world_size} | {' | '.join(cells)} | {most.loss:.6f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_l")
    parser.add_argument("--world-sizes", type=int, nargs="+", default=list(WORLD_SIZES))
    options = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back to the system, so that the peak is real
    lines = ["| backbone | processes | parameters | gradients | optimizer | together | peak | loss, step 3 |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for world_size in options.world_sizes:
        for option in ("ddp", "fsdp") if world_size > 1 else ("ddp",):
            lines.append(row(option, world_size, measured(options.backbone, option, world_size)))
            print(lines[-1], flush=True)
    facts = describe("cpu")
    head = f"{options.backbone}, AdamW, float32, {IMAGES} images of 112 × 112 a process; MiB a process."
    lines = [f"{head} {facts['cpu']}, torch {facts['torch']}, gloo.", "", *lines]
    print("\n".join(lines))
    if tuple(options.world_sizes) == WORLD_SIZES:
        write_between("results/training.md", "benchmarks/fsdp.py", lines)


if __name__ == "__main__":
    main()
