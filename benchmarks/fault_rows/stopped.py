"""SIGTERM: at random moments, at named ones, and while Python still imports."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from fault_rows import patches
from fault_rows.bench import STEPS, Bench, Injection, Outcome, Row, last_words
from fault_rows.killed import on_rank
from fault_rows.launch import Fault, Run
from fault_rows.patches import terminate
from partialfc.config import build
from partialfc.training import loop, step

STOPPED = 128 + signal.SIGTERM
RANDOM_MOMENTS = 24

MOMENTS: dict[str, Callable[[], None]] = {
    "before the processes have met": terminate,
    "while the data is opened": lambda: patches.wrap(loop, "open_loader", after=terminate),
    "while the networks are built": lambda: patches.wrap(build, "PartialFC", before=terminate),
    "while the run folder is opened": lambda: patches.wrap(loop, "open_run_folder", before=terminate),
    "before the first step": lambda: patches.wrap(step.Stepper, "describe", before=terminate),
    "in the first step": lambda: patches.in_step(0, terminate),
    "between the micro-steps of a step": lambda: patches.in_micro_step(4, 1, terminate),
    "in the step before an evaluation": lambda: patches.in_step(3, terminate),
    "in an evaluation": lambda: patches.in_evaluation(1, terminate),
    "in the last evaluation": lambda: patches.in_evaluation(3, terminate),
    "while a checkpoint is written": lambda: patches.OWN_STAGES["while head is written"](6, terminate),
    "while the last checkpoint is written": lambda: patches.OWN_STAGES["while head is written"](12, terminate),
    "while a model is written": lambda: patches.in_model(2, terminate),
    "in the last step": lambda: patches.in_step(STEPS - 1, terminate),
}
DONE_BY_THEN = ("while the last checkpoint is written",)
ON_RANK_0 = ("while a model is written",)


def finish(bench: Bench, out: Path, run: Run, world_size: int, allowed: tuple[int, ...] = (0, STOPPED)) -> Outcome:
    """Check that a run to which SIGTERM was sent ended as it should, resume it and compare."""
    statuses = run.wait(then=signal.SIGTERM)
    stopped, said = STOPPED in statuses, run.said()
    if not set(statuses) <= set(allowed) or "Traceback" in said or (stopped and "stopped by SIGTERM" not in said):
        return Outcome(problem=f"statuses {statuses}: {last_words(run)}")
    outcome = bench.resume_and_compare(out, world_size=world_size)
    if outcome.problem is None and outcome.lost != 0:
        return Outcome(outcome.lost, f"{outcome.lost} steps were not saved; statuses {statuses}, {last_words(run)}")
    return outcome


def random_moments(bench: Bench, short: bool) -> Iterator[Injection]:
    """At a moment drawn uniformly from the length of a run, start-up included, on rank 0 or the last."""
    draw = random.Random(0)
    for number in range(1 if short else RANDOM_MOMENTS):
        world_size, rank, part = 1 + number % 2, number // 2 % 2 * (number % 2), draw.random()

        def inject(folder: Path, world_size: int = world_size, rank: int = rank, part: float = part) -> Outcome:
            slowly = lambda own: patches.pace(0.05)  # noqa: E731
            length = _length(bench, folder, world_size, slowly)
            run = bench.start(folder / "run", world_size=world_size, fault=slowly)
            time.sleep(part * length)
            run.poll()
            run.send(signal.SIGTERM, rank)
            return finish(bench, folder / "run", run, world_size)

        yield Injection(f"{number}: at {part:.0%} of a run, rank {rank} of {world_size}", inject)


_lengths: dict[int, float] = {}


def _length(bench: Bench, folder: Path, world_size: int, fault: Fault) -> float:
    """Seconds of a run on this machine, measured once."""
    if world_size not in _lengths:
        bench.uninterrupted(world_size=world_size)
        run = bench.start(folder / "timed", world_size=world_size, fault=fault)
        run.wait()
        _lengths[world_size] = time.monotonic() - run.started
    return _lengths[world_size]


def named_moments(bench: Bench, short: bool) -> Iterator[Injection]:
    """At each named moment, on one process and on either of two."""
    names = list(MOMENTS)
    places = [(name, rank, world_size) for name in names for world_size, rank in ((1, 0), (2, 0), (2, 1))]
    places = [place for place in places if place[0] not in ON_RANK_0 or place[1] == 0]
    if short:
        places = [("before the first step", 0, 1), ("in an evaluation", 1, 2)]
    for name, rank, world_size in places:

        def inject(folder: Path, name: str = name, rank: int = rank, world_size: int = world_size) -> Outcome:
            fault = on_rank(rank, MOMENTS[name])
            run = bench.start(folder / "run", world_size=world_size, fault=fault)
            outcome = finish(bench, folder / "run", run, world_size, (0 if name in DONE_BY_THEN else STOPPED,))
            return outcome if patches.PLANNED in run.said(rank) else Outcome(problem="the signal was never sent")

        yield Injection(f"{name}, rank {rank} of {world_size}", inject)


def while_importing(bench: Bench, short: bool) -> Iterator[Injection]:
    """To a command that has just started and is still importing."""
    for seconds in (0.6,) if short else (0.3, 0.6, 1.0, 1.5, 2.5):
        yield Injection(f"{seconds} s after the start", partial(_stop_command, bench, seconds=seconds))


def _stop_command(bench: Bench, folder: Path, seconds: float) -> Outcome:
    out = folder / "run"
    command = [sys.executable, "-m", "partialfc", *bench.arguments(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    if process.returncode != STOPPED or "partialfc: stopped by SIGTERM" not in said or "Traceback" in said:
        return Outcome(problem=f"status {process.returncode}: {said[-300:]}")
    return bench.resume_and_compare(out, at=None)


ROWS = [
    Row(
        "sigterm-random",
        "SIGTERM at a random moment of a run, start-up included, to one process of 1 or 2",
        "all save and end with 143; goes on without a lost step, the end is the same bit for bit",
        random_moments,
    ),
    Row(
        "sigterm-named",
        "SIGTERM in start-up, in a step, in an evaluation, while a checkpoint or a model is written, at the very end",
        "the same (before the first step: 143 and a sentence; while the last checkpoint is written: done, 0)",
        named_moments,
    ),
    Row(
        "sigterm-importing",
        "SIGTERM to a command that still imports",
        "ends at once with 143 and a sentence",
        while_importing,
    ),
]
