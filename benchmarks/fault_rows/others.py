"""A killed data worker, numbers that are not finite, and two runs in one folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fault_rows import patches
from fault_rows.bench import READERS, STEPS, Bench, Injection, Outcome, Row, difference, finite_checkpoints, last_words
from fault_rows.killed import on_rank
from fault_rows.launch import Run
from partialfc.training.run.log import read_metrics

POISONS: dict[str, tuple[Callable[[range], None], str]] = {
    "images": (patches.poison_images, "embeddings"),
    "gradient of the embeddings": (patches.poison_loss, "gradient of the embeddings"),
    "gradient of a weight": (patches.poison_weights_gradient, "gradient"),
}


def killed_readers(bench: Bench, short: bool) -> Iterator[Injection]:
    """SIGKILL to a data worker of either rank."""
    places = [(world_size, rank, step) for world_size, rank in ((1, 0), (2, 0), (2, 1)) for step in (1, 4, 7)]
    for world_size, rank, step in places[:1] if short else places:

        def inject(folder: Path, n: int = world_size, rank: int = rank, step: int = step) -> Outcome:
            fault = on_rank(rank, lambda: patches.kill_reader(step, step % 2))
            run = bench.start(folder / "run", READERS, world_size=n, fault=fault)
            statuses, said = run.wait(), run.said()
            named = f"A process that reads the data died (worker {step % 2}, pid "
            if statuses != [1] * n or named not in run.said(rank) or "Traceback" in said:
                return Outcome(problem=f"statuses {statuses}: {last_words(run)}")
            return bench.resume_and_compare(folder / "run", READERS, world_size=n)

        yield Injection(f"in step {step}, of rank {rank} of {world_size}", inject)


def poisoned_once(bench: Bench, short: bool) -> Iterator[Injection]:
    """NaN on one rank in one step."""
    for name in list(POISONS)[:1] if short else POISONS:
        for world_size, rank in ((2, 1),) if short else ((1, 0), (2, 0), (2, 1)):

            def inject(folder: Path, name: str = name, n: int = world_size, rank: int = rank) -> Outcome:
                return _poison_once(bench, folder, name, n, rank)

            yield Injection(f"in the {name}, rank {rank} of {world_size}", inject)


def _poison_once(bench: Bench, folder: Path, name: str, world_size: int, rank: int) -> Outcome:
    poison, where = POISONS[name]

    def fault(own: int) -> None:
        patches.note_replica(folder, own)
        if own == rank:
            poison(range(5, 6))

    out = folder / "run"
    run = bench.start(out, world_size=world_size, fault=fault)
    statuses = run.wait()
    if any(statuses):
        return Outcome(problem=f"statuses {statuses}: {last_words(run)}")
    return Outcome(problem=_skip_problem(out, where, world_size, rank) or _replicas_problem(folder, world_size))


def _skip_problem(out: Path, where: str, world_size: int, rank: int) -> str | None:
    """The problem with the report of the one skipped step, None if it is right."""
    lines = read_metrics(out / "metrics.jsonl")
    skips = [line for line in lines if line["kind"] == "skipped_step"]
    counts = [line["skipped_steps"] for line in lines if line["kind"] == "train"]
    if counts != [0] * 5 + [1] * (STEPS - 5) or [line["step"] for line in skips] != [6]:
        return f"skipped {counts}, logged {skips}"
    [skip] = skips
    ranks = [] if where == "gradient" else [rank]
    places = range(50, 60)  # ten images a step; some of them for each rank
    if skip["where"] != where or skip["ranks"] != ranks or not set(skip["positions"]) <= set(places):
        return f"logged {skip}"
    named = len(skip["samples"]) == len(skip["positions"]) > 0 and all("person" in each for each in skip["samples"])
    return finite_checkpoints(out) if named else f"logged {skip}"


def _replicas_problem(folder: Path, world_size: int) -> str | None:
    """The problem unless all ranks had the same weights after every step, unchanged by the skipped one."""
    replicas = [(folder / f"replica.{rank}").read_text().splitlines() for rank in range(world_size)]
    if any(each != replicas[0] for each in replicas) or len(replicas[0]) != STEPS:
        return "the ranks' weights differ"
    changed = [one != other for one, other in zip(replicas[0], replicas[0][1:], strict=False)]
    return None if changed == [number != 4 for number in range(STEPS - 1)] else f"the weights changed: {changed}"


def poisoned_for_good(bench: Bench, short: bool) -> Iterator[Injection]:
    """NaN on one rank in every step from some step on."""
    for world_size, rank in ((1, 0),) if short else ((1, 0), (2, 0), (2, 1)):

        def inject(folder: Path, n: int = world_size, rank: int = rank) -> Outcome:
            out = folder / "run"
            fault = on_rank(rank, lambda: patches.poison_images(range(2, STEPS)))
            run = bench.start(out, world_size=n, fault=fault)
            statuses, said = run.wait(), run.said()
            if statuses != [1] * n or "10 steps in a row, up to step 12, " not in said or "Traceback" in said:
                return Outcome(problem=f"statuses {statuses}: {last_words(run)}")
            kinds = [line["kind"] for line in read_metrics(out / "metrics.jsonl")]
            problem = finite_checkpoints(out)
            if problem is not None or kinds.count("skipped_step") != 10:
                return Outcome(problem=problem or f"metrics hold {kinds}")
            again = bench.start(out, world_size=n, resume=True)
            ended = again.wait()
            if any(ended):
                return Outcome(problem=f"resuming ended with {ended}: {last_words(again)}")
            return Outcome(lost=STEPS - (again.resumed_at or 0), problem=finite_checkpoints(out))

        yield Injection(f"rank {rank} of {world_size}", inject)


def two_runs(bench: Bench, short: bool) -> Iterator[Injection]:
    """A second run in the folder of a running one."""
    for first, second in ((1, 1),) if short else ((1, 1), (2, 1), (1, 2), (2, 2)):
        for resume in (True,) if short else (True, False):

            def inject(folder: Path, first: int = first, second: int = second, resume: bool = resume) -> Outcome:
                return _second_run(bench, folder, first, second, resume)

            how = "with --resume" if resume else "as a new run"
            yield Injection(f"{second} processes beside {first}, {how}", inject)


def _second_run(bench: Bench, folder: Path, first: int, second: int, resume: bool) -> Outcome:
    out = folder / "run"
    run = bench.start(out, world_size=first, fault=lambda rank: patches.pace(1.0))
    metrics = out / "metrics.jsonl"
    while not run.poll() and not (metrics.exists() and metrics.read_bytes().count(b"\n") > 0):
        time.sleep(0.05)
    other: Run = bench.start(out, world_size=second, resume=resume, logs=folder / "other")
    refused = other.wait()
    words = "is in use by another run (process " if resume else "holds another run"
    if refused != [2] * second or words not in other.said(0) or "Traceback" in other.said():
        run.kill()
        return Outcome(problem=f"the second ended with {refused}: {last_words(other)}")
    if run.poll():
        return Outcome(problem="the first was done before the second was refused")
    statuses = run.wait()
    if any(statuses):
        return Outcome(problem=f"the first ended with {statuses}: {last_words(run)}")
    return Outcome(problem=difference(out, bench.uninterrupted(world_size=first)))


ROWS = [
    Row(
        "killed-reader",
        "SIGKILL to a process that reads the data, of one rank of 1 or 2",
        "ends with 1 and a sentence that names it; goes on from the last checkpoint, the end is the same bit for bit",
        killed_readers,
    ),
    Row(
        "nan-once",
        "NaN in one step on one rank of 1 or 2: in an image, the gradient of the embeddings or of a weight",
        "all ranks skip the step alike; counted, and logged with the images of the rank (for a weight: of all ranks)",
        poisoned_once,
    ),
    Row(
        "nan-for-good",
        "NaN in every step from some step on, on one rank of 1 or 2",
        "ends with 1 after ten skipped steps; every checkpoint is whole and finite; goes on without the fault",
        poisoned_for_good,
    ),
    Row(
        "two-runs",
        "a second run in the folder of one at work, resumed or new",
        "refused with 2; the first is not disturbed",
        two_runs,
    ),
]
