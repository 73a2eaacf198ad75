"""Measurements that need a GPU and wait for a machine that has one.

    python benchmarks/gpu_backlog.py            run what is pending, one after another
    python benchmarks/gpu_backlog.py NAME ...   run these, if they are pending
    python benchmarks/gpu_backlog.py --again    run even what is done
    python benchmarks/gpu_backlog.py --list     say what is done and what is pending
    python benchmarks/gpu_backlog.py --tables   write what is pending into README.md and docs/performance.md

Each measurement is a process of its own that ends within nine minutes; its result is docs/gpu/NAME.json, with the
hardware, the versions, the date, the command and the figures. A result that is there is not measured again, so an
interrupted run is continued by the same command. To add a measurement, add an `Item` to `ITEMS`: its command prints
figures as JSON objects, one a line, and exits with 0, or with 75 if it saved its work and wants to be run again.

Exit status: 0 all done, 1 something failed or has to be continued, 2 wrong input or no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from documents import write_between
from partialfc.core.files import write_file

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "gpu"
CONTINUE = 75  # EX_TEMPFAIL of sysexits.h
LINES_KEPT = 20
# What the items are about, by the first word of their names.
SUBJECTS = {
    "gpu": "the tests that need a CUDA device",
    "head": "step time, memory and kernels of the head",
    "identities": "29 and 100 million identities on one GPU",
    "end": "images a second of whole trainings",
    "step": "options of the backbone's step",
    "plan": "predictions of `partialfc plan`",
    "all": "all pairs of MFR-ALL's size",
    "long": "a longer training on the procedural faces",
}


@dataclass(frozen=True)
class Item:
    """One measurement.

    Attributes:
        name: of the item and of its result file.
        question: what the figures answer.
        arguments: what the Python interpreter is started with, in the root of the checkout.
        issue: which issue of the project asked for it.
        timeout_seconds: after which it is ended as failed.
    """

    name: str
    question: str
    arguments: tuple[str, ...]
    issue: str
    timeout_seconds: float = 540.0


def head_item(classes: int, sample_rate: float, batch_size: int, *, baseline: bool = True) -> Item:
    """The step of the head, beside the dense baseline where that fits, at one size."""
    words = f"--classes {classes} --embedding-dim 512 --batch-size {batch_size} --sample-rate {sample_rate} --steps 20"
    return Item(
        f"head-{classes // 1000}k-rate{sample_rate}-batch{batch_size}",
        f"Time and peak memory of a step of the head at {classes:,} classes, rate {sample_rate}, batch {batch_size}"
        + (", beside a dense head written the usual way." if baseline else "."),
        ("-m", "partialfc", "bench", "head", *words.split(), *["--baseline"] * baseline),
        "A",
    )


def kernels_item(name: str, words: str, question: str) -> Item:
    """The head's kernels at one size: tile sizes and blocks, a CUDA graph, and where the time goes."""
    return Item(name, question, ("benchmarks/head_kernels.py", *words.split()), "C")


def end_to_end_item(backbone: str, batch_size: int) -> Item:
    """Whole training steps beside a loop written the usual way, for one backbone."""
    words = f"--backbone {backbone} --classes 360000 --batch {batch_size} --steps 60 --rounds 2"
    return Item(
        f"end-to-end-{backbone}",
        f"Images a second and memory of training {backbone} end to end, loader included, beside a loop written the "
        "usual way; at least 1.5 times on one H200.",
        ("benchmarks/end_to_end.py", *words.split()),
        "B",
    )


def identities_item(name: str, words: str, question: str) -> Item:
    """A head of very many identities on one GPU."""
    return Item(name, question, ("benchmarks/identities.py", *words.split()), "C")


ITEMS = [
    Item(
        "gpu-tests",
        "Do the tests that need a CUDA device pass?",
        ("-m", "pytest", "-m", "gpu", "-q", "-n", "4", "-p", "no:benchmark", "-p", "no:cacheprovider"),
        "A",
    ),
    head_item(100_000, 0.1, 128),
    head_item(360_000, 0.1, 512),
    head_item(1_000_000, 0.1, 1024),
    head_item(1_000_000, 1.0, 1024),
    head_item(10_000_000, 0.1, 1024, baseline=False),  # with it, an H200's memory is too small by 2 GiB
    kernels_item(
        "head-kernels-1m",
        "--classes 1000000 --sample-rate 1.0 --batch 1024",
        "One million classes, all of them, batch 1024: within 2 × the roofline of four bfloat16 products? Which tile "
        "size and which block of the product are best, and what does a CUDA graph save?",
    ),
    kernels_item(
        "head-kernels-1m-rate0.1-bfloat16",
        "--classes 1000000 --sample-rate 0.1 --batch 1024 --dtype bfloat16",
        "The same with a tenth of the classes and centers in bfloat16, where small kernels weigh more.",
    ),
    identities_item(
        "identities-29m",
        "--classes 29000000 --sample-rate 1.0 --batch 1024",
        "29 million identities on one GPU, all sampled, centers and momentum in bfloat16: within 75 GB and 320 ms?",
    ),
    identities_item(
        "identities-29m-rate0.1",
        "--classes 29000000 --sample-rate 0.1 --batch 1024",
        "29 million identities on one GPU at rate 0.1: at most 45 ms a step?",
    ),
    identities_item(
        "identities-100m",
        "--classes 100000000 --sample-rate 0.01 --batch 1024 --state-on-host",
        "100 million identities on one GPU, momentum in host memory: does it train, in what time, moving how much?",
    ),
    Item(
        "long-training-r18",
        "How far does an IResNet-18 get on the procedural faces of the demo when it is trained longer?",
        ("benchmarks/long_training.py", "--minutes", "8", "--out", "runs/long-training-r18"),
        "A",
    ),
    Item(
        "step-options",
        "What do precision, memory order, fused updates, compiling and recomputation do to images a second?",
        (
            "benchmarks/step_options.py",
            "--device",
            "cuda",
            "--size",
            "112",
            "--batch",
            "128",
            "--backbones",
            "r50",
            "r100",
        ),
        "B",
    ),
    Item(
        "plan",
        "How far is `partialfc plan` from measured memory and time of heads and of whole steps on this GPU?",
        ("benchmarks/plan.py", "--device", "cuda"),
        "D",
    ),
    Item(
        "all-pairs-mfr",
        "TAR at FAR 1e-6 over all pairs of 1,624,305 × 512 features, the size of MFR-ALL: at most 60 s on one H200?",
        ("benchmarks/all_pairs.py", "--images", "1624305", "--identities", "242143", "--device", "cuda"),
        "F1",
    ),
    end_to_end_item("r50", 256),
    end_to_end_item("r100", 256),
    end_to_end_item("vit_b", 256),
]


def hardware() -> dict[str, Any] | None:
    """What the measurements run on; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    return {
        "gpu": torch.cuda.get_device_name(0),
        "gpus": torch.cuda.device_count(),
        "gpu_bytes": torch.cuda.get_device_properties(0).total_memory,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def run_item(item: Item, results: Path, machine: dict[str, Any]) -> str:
    """Run one measurement and keep its result if it is done: "done", or what went wrong in a few words."""
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *item.arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=item.timeout_seconds)
    except subprocess.TimeoutExpired:
        return f"failed: not finished after {item.timeout_seconds:.0f} seconds"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # it leads its own group, its workers included
            process.communicate()
    if process.returncode == CONTINUE:
        return "to be continued: run this again"
    if process.returncode != 0:
        sys.stderr.write(output)
        return f"failed: exit status {process.returncode}"
    figures, words = parse_output(output)
    result = {
        "name": item.name,
        "question": item.question,
        "issue": item.issue,
        "command": shlex.join(["python", *item.arguments]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 1),
        "machine": machine,
        "figures": figures,
        "output": words[-LINES_KEPT:],
    }
    results.mkdir(parents=True, exist_ok=True)
    write_file(results / f"{item.name}.json", json.dumps(result, indent=1) + "\n")
    return "done"


def parse_output(output: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines that are JSON objects, and the others."""
    figures, words = [], []
    for line in output.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            figures.append(value)
        elif line.strip():
            words.append(line)
    return figures, words


def main(argv: Sequence[str] | None = None, items: Sequence[Item] = tuple(ITEMS), results: Path = RESULTS) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Run the measurements that wait for a GPU.", allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which measurements; all if none is named")
    parser.add_argument("--list", action="store_true", help="say what is done and what is pending")
    parser.add_argument("--again", action="store_true", help="measure again what is done")
    parser.add_argument("--tables", action="store_true", help="write what is pending into README.md and the docs")
    options = parser.parse_args(argv)
    unknown = set(options.names) - {item.name for item in items}
    if unknown:
        parser.error(f"no measurement is called {', '.join(sorted(unknown))}; --list shows their names")
    if options.tables:
        write_between("../README.md", "benchmarks/gpu_backlog.py", short_table(items, results))
        write_between("performance.md", "benchmarks/gpu_backlog.py", table(items, results))
        write_between("performance.md", "benchmarks/gpu_backlog.py heads", head_table(items, results))
        return 0
    chosen = [item for item in items if not options.names or item.name in options.names]
    if options.list:
        for item in chosen:
            state = "done   " if is_done(item, results) else "pending"
            print(f"{state}  {item.issue}  {item.name}: {item.question}")
        return 0
    pending = [item for item in chosen if options.again or not is_done(item, results)]
    if not pending:
        print("Nothing is pending.")
        return 0
    machine = hardware()
    if machine is None:
        print(f"This machine has no CUDA device, which {len(pending)} pending measurements need.", file=sys.stderr)
        return 2
    return run_all(pending, results, machine)


def is_done(item: Item, results: Path) -> bool:
    """Whether the item's result is there."""
    return (results / f"{item.name}.json").exists()


def short_table(items: Sequence[Item], results: Path) -> list[str]:
    """A line a subject with pending items, for the README."""
    lines = ["| not yet run on a GPU | measurements |", "|---|---|"]
    for subject, words in SUBJECTS.items():
        pending = [is_done(item, results) for item in items if item.name.split("-")[0] == subject].count(False)
        if pending:
            lines.append(f"| {words} | {pending} |")
    return lines if len(lines) > 2 else ["Everything in the list of measurements has been run on a GPU."]


def table(items: Sequence[Item], results: Path) -> list[str]:
    """A line a pending item."""
    lines = ["| measurement | question |", "|---|---|"]
    lines += [f"| {item.name} | {item.question} |" for item in items if not is_done(item, results)]
    return lines if len(lines) > 2 else ["Everything in the list has been run on a GPU."]


def head_table(items: Sequence[Item], results: Path) -> list[str]:
    """A line a measured item that has a head beside the dense one."""
    lines = [
        "| classes | rate | images | float32, ms | bfloat16, ms | dense, ms | bfloat16 to dense "
        "| memory, GB | dense, GB | on |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for item in items:
        if not is_done(item, results) or "--baseline" not in item.arguments:
            continue
        result = json.loads((results / f"{item.name}.json").read_text())
        of = {figures["variant"]: figures for figures in result["figures"]}
        ours, rounded, dense = (
            of[name] for name in ("partialfc deferred", "partialfc deferred bfloat16", "dense baseline")
        )
        case = ours["configuration"]
        times = [one["step_ms_median"] for one in (ours, rounded, dense)]
        cells = [f"{case['num_classes']:,}", case["sample_rate"], case["batch_size"], *(f"{ms:.1f}" for ms in times)]
        cells += [
            f"{times[2] / times[1]:.1f} × as fast",
            *(f"{one['peak_bytes'] / 1e9:.1f}" for one in (rounded, dense)),
        ]
        cells.append(f"{result['machine']['gpu']}, {result['date'][:10]}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def run_all(items: Sequence[Item], results: Path, machine: dict[str, Any]) -> int:
    """Run all, whatever fails; the exit status."""
    outcomes = []
    for number, item in enumerate(items, start=1):
        minutes = item.timeout_seconds / 60
        print(f"[{number}/{len(items)}] {item.name} (at most {minutes:.0f} minutes)", flush=True)
        outcomes.append(run_item(item, results, machine))
        print(f"[{number}/{len(items)}] {item.name}: {outcomes[-1]}", flush=True)
    return 0 if all(outcome == "done" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
