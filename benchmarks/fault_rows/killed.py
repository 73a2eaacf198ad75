"""Processes killed (SIGKILL): anywhere in the training, and at every stage of saving a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fault_rows import patches
from fault_rows.bench import Bench, Injection, Outcome, Row, killed
from fault_rows.launch import Fault
from fault_rows.patches import COPY_STAGES, LEADER_STAGES, OWN_STAGES, Stage, die
from partialfc.checkpoint.read import folder_name

SYNCHRONOUS: tuple[str, ...] = ("--output.checkpoint_async=false",)
ASYNCHRONOUS: tuple[str, ...] = ()

# Twelve images a step: two micro-steps, of which each of three processes has two images.
THREE = ("--data.global_batch_size=12", "--data.micro_batch_size=6", "--data.micro_steps=2", "--schedule.epochs=4.5")

Moment = Callable[[], None]
MOMENTS: dict[str, Moment] = {
    "in the first step": lambda: patches.in_micro_step(0, 0, die),
    "between the micro-steps of step 1": lambda: patches.in_micro_step(1, 1, die),
    "before the images of step 4 are used": lambda: patches.in_step(4, die),
    "between the micro-steps of step 5": lambda: patches.in_micro_step(5, 1, die),
    "between the two optimizers of step 7": lambda: patches.between_optimizers(7, die),
    "between the micro-steps of step 10": lambda: patches.in_micro_step(10, 1, die),
    "in the last step": lambda: patches.in_micro_step(11, 0, die),
    "in the first evaluation": lambda: patches.in_evaluation(1, die),
    "in the second evaluation": lambda: patches.in_evaluation(2, die),
    "after the second evaluation": lambda: patches.after_evaluation(2, die),
    "between the two models of an evaluation": lambda: patches.in_model(3, die),
    "in the last evaluation": lambda: patches.in_evaluation(3, die),
    "right after the first checkpoint": lambda: patches.wrap(
        patches.writer, "save_checkpoint", after=die, when=patches.nth(1)
    ),
    "right after the third checkpoint": lambda: patches.wrap(
        patches.writer, "save_checkpoint", after=die, when=patches.nth(3)
    ),
}
ON_RANK_0 = ("between the two models of an evaluation",)


def on_rank(rank: int, install: Moment) -> Fault:
    """The fault in one rank alone."""
    return lambda own: install() if own == rank else None


def kill_and_resume(
    bench: Bench, folder: Path, options: tuple[str, ...], world_size: int, fault: Fault, at: int | None = None
) -> Outcome:
    """Run until a rank kills itself, resume, compare."""
    out = folder / "run"
    problem = killed(bench.start(out, options, world_size=world_size, fault=fault))
    if problem is not None:
        return Outcome(problem=problem)
    return bench.resume_and_compare(out, options, world_size=world_size, at=at)


def interruptions(world_size: int) -> Callable[[Bench, bool], Iterator[Injection]]:
    """Killed anywhere in the training, on each rank in turn."""

    def injections(bench: Bench, short: bool) -> Iterator[Injection]:
        names = list(MOMENTS)
        for number, name in enumerate(names[3 * world_size :][: int(world_size < 3)] if short else names):
            rank = 0 if name in ON_RANK_0 else number % world_size
            options = (ASYNCHRONOUS, SYNCHRONOUS)[number // world_size % 2] + (THREE if world_size == 3 else ())

            def inject(folder: Path, name: str = name, rank: int = rank, options: tuple[str, ...] = options) -> Outcome:
                return kill_and_resume(bench, folder, options, world_size, on_rank(rank, MOMENTS[name]))

            yield Injection(f"{name}, rank {rank}", inject)

    return injections


def saves(bench: Bench, short: bool) -> Iterator[Injection]:
    """Killed at every stage of the third save, on every rank."""
    for world_size in (2,) if short else (1, 2, 3):
        for rank in range(world_size):
            for options in (ASYNCHRONOUS, SYNCHRONOUS):
                stages = _stages(rank, world_size, options == ASYNCHRONOUS)
                chosen = list(stages)[:: 25 if options else 40] if short else list(stages)
                for name in chosen:
                    yield _save_injection(bench, world_size, rank, options, name, stages[name])


def _stages(rank: int, world_size: int, asynchronous: bool) -> dict[str, Stage]:
    """The stages of rank 0 alone are tried with one and two processes, the exchanges with two and three."""
    leader = LEADER_STAGES if rank == 0 and world_size < 3 else {}
    exchanges = OWN_STAGES if world_size > 1 else {}
    return {**(COPY_STAGES if asynchronous else {}), **leader, **exchanges}


def _save_injection(
    bench: Bench, world_size: int, rank: int, options: tuple[str, ...], name: str, stage: Stage
) -> Injection:
    def inject(folder: Path) -> Outcome:
        return kill_and_resume(bench, folder, options, world_size, on_rank(rank, lambda: stage(9, die)))

    how = "beside the training" if options == ASYNCHRONOUS else "in a step"
    return Injection(f"{name}, rank {rank} of {world_size}, {how}", inject)


def replacements(bench: Bench, short: bool) -> Iterator[Injection]:
    """Killed between the two renames that replace the checkpoint of the same step."""
    for world_size in (1,) if short else (1, 2):
        for options in (SYNCHRONOUS,) if short else (ASYNCHRONOUS, SYNCHRONOUS):
            for damaged in (False,) if short else (True, False):

                def inject(
                    folder: Path, n: int = world_size, options: tuple[str, ...] = options, damaged: bool = damaged
                ) -> Outcome:
                    return _replace(bench, folder, options, n, damaged)

                was = "damaged" if damaged else "whole"
                how = "beside the training" if options == ASYNCHRONOUS else "in a step"
                yield Injection(f"the old one {was}, {world_size} processes, {how}", inject)


def _replace(bench: Bench, folder: Path, options: tuple[str, ...], world_size: int, damaged: bool) -> Outcome:
    """Stop after step 9 is saved; resume from step 6 and be killed while 9 is replaced; resume again."""
    out, checkpoints = folder / "run", folder / "run" / "checkpoints"

    def die_half_a_second_later() -> None:
        time.sleep(0.5)
        die()

    at_ten = on_rank(0, lambda: patches.in_step(10, die_half_a_second_later))
    problem = killed(bench.start(out, options, world_size=world_size, fault=at_ten))
    if problem is not None:
        return Outcome(problem=problem)
    newest = checkpoints / folder_name(9)
    backbone = newest / "backbone.safetensors"
    whole = backbone.read_bytes()
    backbone.write_bytes(whole[:-1])  # so that the run goes on from step 6
    again = on_rank(0, lambda: patches.between_renames(9, die))
    problem = killed(bench.start(out, options, world_size=world_size, fault=again, resume=True))
    if problem is not None:
        return Outcome(problem=problem)
    if not damaged:
        [old] = checkpoints.glob(f".{folder_name(9)}.*.old")
        (old / "backbone.safetensors").write_bytes(whole)
    return bench.resume_and_compare(out, options, world_size=world_size, at=6 if damaged else 9)


ROWS = [
    Row(
        "interrupted-1",
        "the process killed in a step, between its micro-steps, between the two optimizers, in an evaluation, right "
        "after a save (1 process)",
        "goes on from the last checkpoint; model, optimizer state, centers, momentum and metrics are the same in the "
        "end, bit for bit",
        interruptions(1),
    ),
    Row("interrupted-2", "the same with 2 processes, one of them killed", "the same", interruptions(2)),
    Row("interrupted-3", "the same with 3 processes, one of them killed", "the same", interruptions(3)),
    Row(
        "killed-saving",
        "a process killed at any stage of a save: copy, each file, exchanges, manifest, flush, rename, deletion "
        "(each rank of 1, 2 and 3)",
        "goes on from a whole checkpoint, never from a mixture; the end is the same bit for bit",
        saves,
    ),
    Row(
        "killed-replacing",
        "a process killed between the two renames of a step that is saved again",
        "goes on from the old checkpoint of that step if that is whole, else from the step before; the end is the same",
        replacements,
    ),
]
