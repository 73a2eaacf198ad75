"""A larger network, or a longer training, on the demo's procedural faces: how far the demo's score is from the ceiling.

    python benchmarks/long_training.py --minutes 8 --out runs/long

Resumable by itself: it trains for so many minutes, and exits with status 75 if it is not done, 0 when it is. The result
is the last line, as JSON: accuracy on the demo's test pairs at the end, steps, and where it was trained.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from partialfc.demo import WORLD
from partialfc.training.run.log import read_metrics

NOT_DONE = 75


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="time for training in this call")
    parser.add_argument("--out", type=Path, default=Path("runs/long"), help="folder of data and run")
    parser.add_argument("--recipe", default="demo-r18", help="recipe of the training")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="further options of partialfc train")
    arguments = parser.parse_args()
    data, run = arguments.out / "data", arguments.out / "run"
    WORLD.write(data, resume=True)
    command = [sys.executable, "-m", "partialfc", "train", "--recipe", arguments.recipe, "--resume"]
    command += ["--data.path", str(data / "train"), "--benchmark", f"pairs={data / 'pairs.bin'}", "--out", str(run)]
    command += ["--output.checkpoint_every", "250", *arguments.options]
    try:
        status = subprocess.run(command, timeout=60 * arguments.minutes, check=False).returncode
    except subprocess.TimeoutExpired:
        return NOT_DONE
    if status:
        return status
    last = {line["kind"]: line for line in read_metrics(run / "metrics.jsonl")}
    accuracy, trained = last["evaluation"], last["train"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    result = {"recipe": arguments.recipe, "accuracy": accuracy["accuracy"], "accuracy_std": accuracy["accuracy_std"]}
    print(json.dumps(result | {"steps": trained["step"], "epochs": trained["epoch"], "on": device}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
