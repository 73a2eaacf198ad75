"""Shared by all rows: tiny data, an uninterrupted run of each kind to compare with, and the classes of a row."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fault_rows.launch import Fault, Run
from fault_rows.patches import PLANNED
from partialfc.checkpoint.read import Checkpoint, folder_name, steps_in
from partialfc.core.errors import InputError
from partialfc.data.pair_files import write_pairs
from partialfc.training.run.log import read_metrics
from tiny_runs import pattern_image, without_timings, write_images

NAMES, SHOTS, PAIRS, BATCH = [f"person {number}" for number in range(8)], 4, 400, 10
STEPS, SAVES, EVALUATIONS = 12, (3, 6, 9, 12), (4, 8, 12)
READERS = ("--data.workers=2",)  # processes that read the data; without the option the training process does


@dataclass(frozen=True)
class Outcome:
    """The end of one injection.

    Attributes:
        lost: optimizer steps that had to be repeated; None if the run was not interrupted.
        problem: the difference from what the row says, None if there is none.
        count: faults injected, where one function injects many.
    """

    lost: int | None = None
    problem: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Injection:
    """One fault: its name within the row, and the function that injects it, given an empty folder."""

    name: str
    inject: Callable[[Path], Outcome]


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        key: its name on the command line.
        fault: a description of the fault.
        outcome: a description of the expected end.
        injections: all of them, or with `short` a few.
    """

    key: str
    fault: str
    outcome: str
    injections: Callable[[Bench, bool], Iterator[Injection]]


class Bench:
    """The data of all runs, and uninterrupted runs to compare with.

    Args:
        root: a folder for both; files that exist are used.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data, self.pairs = root / "images", root / "pairs.bin"
        if not self.pairs.exists():
            shutil.rmtree(self.data, ignore_errors=True)
            write_images(self.data, NAMES, SHOTS)
            is_same = [number % 2 == 0 for number in range(PAIRS)]
            images = []
            for number, same in enumerate(is_same):
                images.append(pattern_image(NAMES[number % len(NAMES)], SHOTS + 2 * number))
                images.append(pattern_image(NAMES[(number + (not same)) % len(NAMES)], SHOTS + 2 * number + 1))
            write_pairs(self.pairs, images, is_same)

    def arguments(self, out: Path, options: Sequence[str] = ()) -> list[str]:
        """The command line of a run of `STEPS` steps of three micro-steps each on one process, two on two."""
        fixed = {
            "data.path": self.data,
            "data.global_batch_size": BATCH,
            "data.micro_batch_size": 4,
            "data.workers": 0,
            "backbone.name": "mini",
            "backbone.embedding_dim": 16,
            "head.sample_rate": 0.5,
            "head.scale": 16.0,
            "optimizer.lr": 0.02,
            "optimizer.lr_scaling": "absolute",
            "schedule.epochs": STEPS * BATCH / (len(NAMES) * SHOTS),
            "schedule.warmup_epochs": 0.5,
            "output.log_every": 1,
            "output.checkpoint_every": SAVES[0],
            "output.evaluate_every": EVALUATIONS[0],
            "output.keep": 2,
            "precision": "float32",
            "device": "cpu",
        }
        words = [f"--{key}={value}" for key, value in fixed.items()]
        return ["train", *words, *options, "--benchmark", f"pairs={self.pairs}", "--out", str(out)]

    def start(
        self,
        out: Path,
        options: Sequence[str] = (),
        *,
        world_size: int = 1,
        fault: Fault | None = None,
        resume: bool = False,
        logs: Path | None = None,
    ) -> Run:
        """Start a run in folder `out`; its output goes to the folder `logs`, by default the parent of `out`."""
        more = ["--resume"] if resume else []
        log = (logs or out.parent) / f"{out.name}-{'resumed' if resume else 'first'}.log"
        return Run(log, [*self.arguments(out, options), *more], world_size, fault)

    def uninterrupted(self, options: Sequence[str] = (), *, world_size: int = 1) -> Path:
        """The folder of the uninterrupted run with these options, which is made on the first call."""
        name = "-".join([f"{world_size}", *(option.lstrip("-").replace("/", "_") for option in options)])
        out = self.root / "uninterrupted" / name
        done = out.with_name(f"{name}.done")
        if not done.exists():
            shutil.rmtree(out, ignore_errors=True)
            run = self.start(out, options, world_size=world_size)
            statuses = run.wait()
            if any(statuses):
                raise RuntimeError(f"the uninterrupted run ended with {statuses}: {run.said()}")
            done.touch()
        return out

    def resume_and_compare(
        self,
        out: Path,
        options: Sequence[str] = (),
        *,
        world_size: int = 1,
        extra: Sequence[str] = (),
        ignored: Sequence[str] = (),
        at: int | None = None,
    ) -> Outcome:
        """Resume the run in `out`, and compare all its files with the uninterrupted run, bit by bit.

        Args:
            out: the run folder.
            options: of both runs.
            world_size: of both.
            extra: options of the command that change nothing in a run, such as --verify.
            ignored: kinds of metrics that the uninterrupted run does not have.
            at: the step that the run must resume from, if that is known.
        """
        done = steps_done(out)
        run = self.start(out, [*options, *extra], world_size=world_size, resume=True)
        statuses = run.wait()
        if any(statuses):
            return Outcome(problem=f"resuming ended with {statuses}: {last_words(run)}")
        resumed = run.resumed_at
        if resumed is None or (at is not None and resumed != at):
            return Outcome(problem=f"went on from step {resumed}, not {at}")
        problem = difference(out, self.uninterrupted(options, world_size=world_size), ignored)
        return Outcome(lost=done - resumed, problem=problem)


def steps_done(out: Path) -> int:
    """The optimizer steps that the run in `out` has logged."""
    metrics = out / "metrics.jsonl"
    lines = read_metrics(metrics) if metrics.is_file() else []
    return max((line["step"] for line in lines if line.get("kind") == "train"), default=0)


def last_words(run: Run) -> str:
    """The end of each rank's output."""
    return " / ".join(" ".join(run.said(rank).split())[-300:] for rank in range(len(run.pids)))


def killed(run: Run) -> str | None:
    """Wait for a run of which one rank kills itself; the others are killed too. The problem if none did."""
    statuses = run.wait(then=signal.SIGKILL)
    if -signal.SIGKILL in statuses and PLANNED in run.said() and "Traceback" not in run.said():
        return None
    return f"no rank was killed: statuses {statuses}, {last_words(run)}"


def difference(out: Path, reference: Path, ignored: Sequence[str] = ()) -> str | None:
    """The first difference between two finished runs, None if they are the same bit for bit.

    The last checkpoints are compared by the digest of their manifests, which covers every byte of model, optimizer
    state, centers and momentum, and all counters; their bytes are verified.
    """
    checkpoints = [run / "checkpoints" for run in (out, reference)]
    leftovers = [path.name for path in checkpoints[0].iterdir() if path.name.startswith(".")]
    if leftovers:
        return f"left over: {leftovers}"
    last = [steps_in(root)[-1] for root in checkpoints]
    if last[0] != last[1]:
        return f"the last checkpoint is of step {last[0]}, not {last[1]}"
    opened = [Checkpoint(root / folder_name(last[0])) for root in checkpoints]
    for checkpoint in opened:
        checkpoint.verify()
    if opened[0].digest != opened[1].digest:
        return f"the checkpoints of step {last[0]} differ"
    for name in ("last", "best"):
        for file in ("model.safetensors", "config.json"):
            if (out / "model" / name / file).read_bytes() != (reference / "model" / name / file).read_bytes():
                return f"model/{name}/{file} differs"
    metrics = [without_timings(read_metrics(run / "metrics.jsonl")) for run in (out, reference)]
    lines = [[line for line in run if line["kind"] not in ignored] for run in metrics]
    if lines[0] != lines[1]:
        return f"metrics differ: {len(lines[0])} lines against {len(lines[1])}"
    return None


def finite_checkpoints(out: Path) -> str | None:
    """The first tensor that is not finite, or file that is not whole, in the checkpoints of a run."""
    for step in steps_in(out / "checkpoints"):
        checkpoint = Checkpoint(out / "checkpoints" / folder_name(step))
        try:
            checkpoint.verify()
        except InputError as error:
            return str(error)
        tensors = {**checkpoint.tensors("backbone"), **checkpoint.tensors("backbone-optimizer")}
        tensors |= {name: checkpoint.rows(name, 0, shape[0]) for name, shape in checkpoint.row_shapes.items()}
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                return f"{name} of step {step} is not finite"
    return None
