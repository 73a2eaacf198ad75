"""A step of the head with more identities than usual: time, memory and bytes moved, as one line of JSON.

python benchmarks/identities.py --classes 29000000 --sample-rate 1.0 [--dtype bfloat16] [--state-on-host]
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from partialfc.bench.head_step import HeadCase, wait_for
from partialfc.bench.machine import describe
from partialfc.core.device import peak_bytes

WIDTH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, required=True)
    parser.add_argument("--sample-rate", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--state-on-host", action="store_true")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    case = HeadCase(options.classes, WIDTH, options.batch, options.sample_rate, options.device)
    head, optimizer = case.build(
        update="deferred", operand_dtype="bfloat16", dtype=options.dtype, state_on_host=options.state_on_host
    )
    seconds, losses = [], []
    for step in range(options.steps + 2):
        embeddings, labels = case.batch(step)
        wait_for(device)
        start = time.perf_counter()
        loss = head(embeddings, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))  # waits for the device
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    rows = int(head.figures.sampled) if head.figures else 0
    row_bytes = WIDTH * head.centers.element_size()
    line = {
        "classes": options.classes,
        "sampled": rows,
        "step_ms_min": 1000 * min(seconds[2:]),
        "losses": losses,
        "center_bytes_moved": 3 * rows * row_bytes,  # read in both passes, written in the second
        "state_bytes_moved": 2 * rows * row_bytes,
        "device_peak_bytes": peak_bytes(device) if device.type == "cuda" else None,
        "process_peak_bytes": peak_bytes(torch.device("cpu")),
        "options": vars(options),
        "hardware": describe(options.device),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
