"""A full disk: a small tmpfs that is full for some steps, or a limit on file sizes where none may be mounted."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fault_rows import patches
from fault_rows.bench import READERS, Bench, Injection, Outcome, Row, difference, last_words, steps_done
from fault_rows.launch import Fault
from partialfc.checkpoint.read import Checkpoint, folder_name, steps_in
from partialfc.training.run.log import read_metrics

MEBIBYTE = 2**20
FULL_FROM, FULL_UNTIL = 4, 10  # steps: checkpoint 6 and 9 and the evaluation after 8 meet a full disk, 3 and 12 do not
CONTINUE = ("--output.on_checkpoint_error=continue",)
NO_EVALUATION = ("--output.evaluate_every=1000",)  # but the one at the end
ROOMS = {"nothing left": 0, "16 KiB left": 16 * 1024, "half a checkpoint left": 3 * MEBIBYTE}
NO_CHECKPOINTS = ("--output.checkpoint_every=1000", "--output.evaluate_every=1000")
_NO_SPACE = "No space left on device"


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A tmpfs that holds a few checkpoints."""
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={40 * MEBIBYTE}", "tmpfs", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def can_mount(folder: Path) -> bool:
    """Whether this user may mount a tmpfs."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        allowed = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False
    if allowed:
        subprocess.run(["umount", str(folder)], check=True)
    return allowed


def fill(disk: Path, room: int) -> None:
    """Fill the disk, up to `room` bytes."""
    with (disk / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        os.truncate(file.fileno(), max(0, os.fstat(file.fileno()).st_size - room))


def full_for_some_steps(disk: Path, room: int, *, once: bool = False) -> Fault:
    """Rank 0 fills the disk before a step and, unless `once`, makes room before a later one."""

    def fault(rank: int) -> None:
        if rank == 0:
            patches.in_step(FULL_FROM, lambda: fill(disk, room))
            if not once:
                patches.in_step(FULL_UNTIL, lambda: (disk / "ballast").unlink())

    return fault


def stops(bench: Bench, short: bool) -> Iterator[Injection]:
    """A run that stops when a checkpoint cannot be written."""
    for name, world_size, options in _places(short):

        def inject(folder: Path, n: int = world_size, name: str = name, options: tuple[str, ...] = options) -> Outcome:
            with small_disk(folder) as disk:
                return _stop(bench, disk, (*READERS, *options), n, full_for_some_steps(disk, ROOMS[name], once=True))

        yield Injection(f"{name}, {world_size} processes, {options or 'asynchronous'}", inject)


def _places(short: bool) -> list[tuple[str, int, tuple[str, ...]]]:
    if short:
        return [("half a checkpoint left", 1, ())]
    ways = ((), ("--output.checkpoint_async=false",))
    return [(name, world_size, options) for name in ROOMS for world_size in (1, 2) for options in ways]


def _stop(bench: Bench, disk: Path, options: tuple[str, ...], world_size: int, fault: Fault) -> Outcome:
    out = disk / "run"
    run = bench.start(out, options, world_size=world_size, fault=fault, logs=disk.parent)
    statuses = run.wait()
    if statuses != [1] * world_size or _NO_SPACE not in run.said() or "Traceback" in run.said():
        return Outcome(problem=f"statuses {statuses}: {last_words(run)}")
    checkpoints = out / "checkpoints"
    if steps_in(checkpoints) != [3]:
        return Outcome(problem=f"checkpoints of steps {steps_in(checkpoints)}")
    Checkpoint(checkpoints / folder_name(3)).verify()
    (disk / "ballast").unlink()
    return bench.resume_and_compare(out, options, world_size=world_size, at=3)


def goes_on(bench: Bench, short: bool) -> Iterator[Injection]:
    """A run that continues without the checkpoints; there is room again before its end."""
    for name, world_size, options in _places(short):

        def inject(folder: Path, n: int = world_size, name: str = name, options: tuple[str, ...] = options) -> Outcome:
            with small_disk(folder) as disk:
                return _go_on(
                    bench, disk, (*CONTINUE, *NO_EVALUATION, *options), n, full_for_some_steps(disk, ROOMS[name])
                )

        yield Injection(f"{name}, {world_size} processes, {options or 'asynchronous'}", inject)


def _go_on(bench: Bench, disk: Path, options: tuple[str, ...], world_size: int, fault: Fault) -> Outcome:
    out = disk / "run"
    run = bench.start(out, options, world_size=world_size, fault=fault, logs=disk.parent)
    statuses = run.wait()
    if any(statuses):
        return Outcome(problem=f"statuses {statuses}: {last_words(run)}")
    lines = [line for line in read_metrics(out / "metrics.jsonl") if line["kind"] == "checkpoint_error"]
    if not lines or not all(_NO_SPACE in line["message"] for line in lines):
        return Outcome(problem=f"logged: {lines}")
    reference = bench.uninterrupted(options, world_size=world_size)
    return Outcome(problem=difference(out, reference, ignored=("checkpoint_error",)))


def models(bench: Bench, short: bool) -> Iterator[Injection]:
    """The model of the second evaluation of three cannot be written; it may be the best one."""
    for world_size in () if short else (1, 2):

        def inject(folder: Path, n: int = world_size) -> Outcome:
            with small_disk(folder) as disk:
                fault = full_for_some_steps(disk, 0)
                run = bench.start(disk / "run", CONTINUE, world_size=n, fault=fault, logs=folder)
                statuses = run.wait()
                if any(statuses) or "could not write a model" not in run.said(0):
                    return Outcome(problem=f"statuses {statuses}: {last_words(run)}")
                return Outcome(problem=_best_problem(disk / "run"))

        yield Injection(f"{world_size} processes", inject)


def _best_problem(out: Path) -> str | None:
    """The problem unless model/best is the model of the step that the last checkpoint calls the best."""
    best_step = Checkpoint(out / "checkpoints" / folder_name(12)).state["best_step"]
    models = [(out / "model" / name / "model.safetensors").read_bytes() for name in ("last", "best")]
    if best_step == 8 or (models[0] == models[1]) != (best_step == 12):
        return f"the last checkpoint calls step {best_step} the best, and model/best is not of that step"
    leftovers = [path.name for path in (out / "model").iterdir() if path.name.startswith(".")]
    return f"left over: {leftovers}" if leftovers else None


def never_room(bench: Bench, short: bool) -> Iterator[Injection]:
    """There is no room at the end either: the run must not end as if it were complete."""
    for world_size in () if short else (1, 2):

        def inject(folder: Path, n: int = world_size) -> Outcome:
            with small_disk(folder) as disk:
                fault = full_for_some_steps(disk, MEBIBYTE // 4, once=True)
                run = bench.start(disk / "run", CONTINUE, world_size=n, fault=fault, logs=folder)
                statuses = run.wait()
                if statuses != [1] * n or _NO_SPACE not in run.said() or "Traceback" in run.said():
                    return Outcome(problem=f"statuses {statuses}: {last_words(run)}")
                (disk / "ballast").unlink()
                lines = ("checkpoint_error",)
                return bench.resume_and_compare(disk / "run", CONTINUE, world_size=n, at=3, ignored=lines)

        yield Injection(f"full to the end, {world_size} processes", inject)


def metrics(bench: Bench, short: bool) -> Iterator[Injection]:
    """Only lines of metrics are written while the disk is full."""
    for world_size in (1,) if short else (1, 2):

        def inject(folder: Path, n: int = world_size) -> Outcome:
            with small_disk(folder) as disk:
                return _metrics(bench, disk, n)

        yield Injection(f"{world_size} processes", inject)


def _metrics(bench: Bench, disk: Path, world_size: int) -> Outcome:
    out = disk / "run"

    def fault(rank: int) -> None:
        if rank == 0:
            patches.in_step(1, lambda: fill(disk, 0))

    run = bench.start(out, NO_CHECKPOINTS, world_size=world_size, fault=fault, logs=disk.parent)
    statuses, said = run.wait(), run.said()
    if statuses != [1] * world_size or f"metrics.jsonl cannot be written ({_NO_SPACE})" not in said:
        return Outcome(problem=f"statuses {statuses}: {last_words(run)}")
    if steps_done(out) >= 12 or not (out / "metrics.jsonl").read_bytes().endswith(b"\n"):
        return Outcome(problem="a line was cut off, or none was missing")
    (disk / "ballast").unlink()
    return bench.resume_and_compare(out, NO_CHECKPOINTS, world_size=world_size, at=0)


def limited(bench: Bench, short: bool) -> Iterator[Injection]:
    """Without a small disk: files may not be larger than a checkpoint's largest."""

    def fault(rank: int) -> None:
        limit = 64 * 1024
        patches.in_step(FULL_FROM, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))

    for world_size in (1,) if short else (1, 2):

        def inject(folder: Path, n: int = world_size) -> Outcome:
            run = bench.start(folder / "run", world_size=n, fault=fault)
            statuses = run.wait()
            if statuses != [1] * n or "File too large" not in run.said() or "Traceback" in run.said():
                return Outcome(problem=f"statuses {statuses}: {last_words(run)}")
            return bench.resume_and_compare(folder / "run", world_size=n, at=3)

        yield Injection(f"{world_size} processes", inject)


def _unless_mounted(bench: Bench, short: bool) -> Iterator[Injection]:
    return iter(()) if can_mount(bench.root / "mount") else limited(bench, short)


def _if_mounted(
    injections: Callable[[Bench, bool], Iterator[Injection]],
) -> Callable[[Bench, bool], Iterator[Injection]]:
    def chosen(bench: Bench, short: bool) -> Iterator[Injection]:
        return injections(bench, short) if can_mount(bench.root / "mount") else iter(())

    return chosen


ROWS = [
    Row(
        "disk-stop",
        "the disk full in mid-run (a small tmpfs with nothing, 16 KiB or half a checkpoint left)",
        "ends with 1 and `No space left on device`; the last checkpoint is whole; goes on from it once there is room",
        _if_mounted(stops),
    ),
    Row(
        "disk-continue",
        "the same for some steps, with `output.on_checkpoint_error continue`",
        "trains on, says and logs what was not written; metrics and the last checkpoint as without",
        _if_mounted(goes_on),
    ),
    Row(
        "disk-model",
        "the same in an evaluation",
        "trains on, says and logs it; the best model is the best of those written, and called so",
        _if_mounted(models),
    ),
    Row(
        "disk-never",
        "the same to the end of the run",
        "trains to the end, which is not saved: status 1 and the reason; goes on from the last checkpoint",
        _if_mounted(never_room),
    ),
    Row(
        "disk-metrics",
        "the disk full for metrics.jsonl alone",
        "ends with 1 and names the file, no line cut off; starts anew, as nothing was saved",
        _if_mounted(metrics),
    ),
    Row(
        "disk-limit",
        "files limited to 64 KiB in mid-run (here a tmpfs may not be mounted)",
        "ends with 1 and `File too large`; the last checkpoint is whole; goes on from it",
        _unless_mounted,
    ),
]
