"""How long it takes to move a published checkpoint over, and how much memory.

    python benchmarks/migrate.py

Writes checkpoints of r50 with 100,000 classes and momentum, of 1, 3 and 8 ranks, and migrates each in a process of its
own. Writes its table into docs/migrate.md. Needs 6 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from documents import paragraph, write_between
from partialfc import create_backbone
from partialfc.bench.machine import describe
from tiny_runs import write_images

CLASSES, WIDTH = 100_000, 512
CONFIG = """\
from easydict import EasyDict as edict
config = edict()
config.margin_list = (1.0, 0.0, 0.4)
config.network = "r50"
config.num_classes = 100000
config.num_epoch = 20
config.sample_rate = 0.1
"""


def write_checkpoint(folder: Path, ranks: int) -> int:
    """Write the files of all ranks; their bytes."""
    backbone = create_backbone("r50", embedding_dim=WIDTH)
    names = [name for name, _ in backbone.named_parameters()]
    moments = {
        number: {"momentum_buffer": torch.randn_like(parameter)}
        for number, parameter in enumerate(backbone.parameters())
        if parameter.requires_grad
    }
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "initial_lr": 0.1}
    groups = [{**options, "params": list(range(len(names)))}, {**options, "params": [len(names)]}]
    for rank in range(ranks):
        rows = CLASSES // ranks + (rank < CLASSES % ranks)
        weight = torch.randn(rows, WIDTH)
        state = {**moments, len(names): {"momentum_buffer": torch.randn(rows, WIDTH)}}
        content = {
            "epoch": 1,
            "global_step": 500,
            "state_dict_backbone": backbone.state_dict(),
            "state_dict_softmax_fc": {"weight": weight},
            "state_optimizer": {"state": state, "param_groups": groups},
            "state_lr_scheduler": {"total_iters": 10_000, "warmup_iters": 0, "power": 2, "base_lrs": [0.1, 0.1]},
        }
        torch.save(content, folder / f"checkpoint_gpu_{rank}.pt")
    (folder / "config.py").write_text(CONFIG)
    return sum(path.stat().st_size for path in folder.glob("*.pt"))


def measure(folder: Path, data: Path, ranks: int) -> tuple[int, float, int]:
    """Bytes of the files, seconds and peak bytes of the command."""
    folder.mkdir()
    size = write_checkpoint(folder, ranks)
    words = [
        "migrate",
        folder,
        "--config-file",
        folder / "config.py",
        "--data",
        data,
        "--out",
        folder / "run",
        "--json",
    ]
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "partialfc", *map(str, words)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"migrate ended with status {process.returncode}")
    assert json.loads(output)["classes"] == CLASSES
    return size, time.monotonic() - started, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 3, 8])
    options = parser.parse_args()
    lines = ["| ranks | files, GB | seconds | peak memory, GB | of the files |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as temporary:
        data = write_images(Path(temporary) / "data", ["a", "b", "c"], 4, 112)
        for ranks in options.ranks:
            size, seconds, peak = measure(Path(temporary) / str(ranks), data, ranks)
            lines.append(f"| {ranks} | {size / 1e9:.2f} | {seconds:.0f} | {peak / 1e9:.2f} | {peak / size:.2f} |")
    print("\n".join(lines))
    facts = describe("cpu")
    machine = f"{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}"
    what = f"r50 with {CLASSES:,} classes of {WIDTH} values and all momentum, on {machine}:"
    write_between("migrate.md", "benchmarks/migrate.py", [*paragraph(what), "", *lines])


if __name__ == "__main__":
    main()
