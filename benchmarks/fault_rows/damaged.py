"""Checkpoints that storage has damaged: flipped bits and files of another length."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fault_rows import patches
from fault_rows.bench import Bench, Injection, Outcome, Row
from partialfc.checkpoint.format import MANIFEST, read_manifest
from partialfc.checkpoint.read import Checkpoint, folder_name, load_latest
from partialfc.checkpoint.write import Snapshot
from partialfc.config.options import TrainConfig
from partialfc.training import saver as writer
from partialfc.training.build import build_state, open_loader
from partialfc.training.state import TrainState

BLOCK = 32 * 1024  # bytes, so that small files have many blocks
STRIDE_OF_MANIFEST = 64  # bytes; it is one block
BEFORE, NEWEST = 6, 9
SYNCHRONOUS = ("--output.checkpoint_async=false",)
LENGTHS: dict[str, Callable[[bytes], bytes | None]] = {
    "a byte less": lambda content: content[:-1],
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "a byte more": lambda content: content + b"\0",
    "gone": lambda content: None,
}


def small_blocks_then_die(rank: int) -> None:
    """Checkpoints in small blocks, and the end after the one of step `NEWEST`."""
    plain = writer.save_checkpoint

    def save(root: Path, snapshot: Snapshot, **options: Any) -> Path:
        path = plain(root, snapshot, **options, block_bytes=BLOCK)
        if snapshot.step == NEWEST:
            patches.die()
        return path

    writer.save_checkpoint = save


class Victim:
    """A killed run of two processes with two whole checkpoints, and the state of one process that can load them."""

    def __init__(self, bench: Bench, out: Path) -> None:
        self.bench, self.out = bench, out
        bench.start(out, SYNCHRONOUS, world_size=2, fault=small_blocks_then_die).wait(then=signal.SIGKILL)
        self.root = out / "checkpoints"
        self.newest = self.root / folder_name(NEWEST)
        self.manifest = read_manifest(self.newest)
        self.names = [*sorted(self.manifest.files), MANIFEST]
        self.state = _fresh_state(self.newest)

    def refusal(self, *, verify: bool) -> str | None:
        """Load as a resuming process does: the warning that refused the newest step, None if it was used."""
        said: list[str] = []

        def read(checkpoint: Checkpoint) -> int:
            if verify:
                checkpoint.verify()
            self.state.restore(checkpoint)
            return checkpoint.step

        used = load_latest(self.root, read, warn=said.append)
        if used == NEWEST:
            return None
        return said[0] if used == BEFORE and len(said) == 1 else f"went on from step {used}"

    def resume(self, extra: tuple[str, ...], wanted: str) -> Outcome:
        """Resume in real processes from the step before; their output must contain `wanted`."""
        outcome = self.bench.resume_and_compare(self.out, SYNCHRONOUS, world_size=2, extra=extra, at=BEFORE)
        said = self.out.with_name(f"{self.out.name}-resumed.log.0").read_text()
        if outcome.problem is None and wanted not in said:
            return Outcome(problem=f"{wanted!r} was not said: {said}")
        return outcome


def _fresh_state(folder: Path) -> TrainState:
    defaults = TrainConfig()
    stored = Checkpoint(folder).state["config"]
    values = {
        key: type(getattr(defaults, key))(**value) if isinstance(value, dict) else value
        for key, value in stored.items()
    }
    config = TrainConfig(**values)
    return build_state(config, open_loader(config), torch.device("cpu"))


def flips(*, verify: bool) -> Callable[[Bench, bool], Iterator[Injection]]:
    """Flip a bit in each block of each file, in this process, and in some files of the newest step of real runs."""

    def injections(bench: Bench, short: bool) -> Iterator[Injection]:
        yield Injection("every block of every file", lambda folder: _flip_all(bench, folder, verify, short))
        for place, prefix in enumerate([] if short else _prefixes(verify)):
            inject = partial(_flip_one, bench, prefix=prefix, number=place, verify=verify)
            yield Injection(f"real processes, {prefix}", inject)

    return injections


def _prefixes(verify: bool) -> tuple[str, ...]:
    """The files whose blocks a resuming process reads, or all files; the names of identities are not read."""
    read = ("head-00001", "backbone.", "backbone-optimizer", "head-00000")
    return ("identities", *read) if verify else read


def _flip_all(bench: Bench, folder: Path, verify: bool, short: bool) -> Outcome:
    """The first and last bit of each block, and one in between; in the short form, of every sixteenth block."""
    victim = Victim(bench, folder / "run")
    draw = random.Random(0)
    count = 0
    for name in victim.names:
        if not verify and name.startswith("identities"):
            continue
        path = victim.newest / name
        whole = path.read_bytes()
        stride = STRIDE_OF_MANIFEST if name == MANIFEST else BLOCK
        for start in range(0, len(whole), stride * (16 if short else 1)):
            stop = min(start + stride, len(whole))
            for position, bit in ((start, 0), (draw.randrange(start, stop), draw.randrange(8)), (stop - 1, 7)):
                damaged = bytearray(whole)
                damaged[position] ^= 1 << bit
                path.write_bytes(damaged)
                problem = _not_found(victim, name, start // BLOCK, verify=verify)
                if problem is not None:
                    return Outcome(problem=f"{name}, byte {position}, bit {bit}: {problem}")
                count += 1
        path.write_bytes(whole)
    if victim.refusal(verify=True) is not None:
        return Outcome(problem="the checkpoint put right is refused")
    return Outcome(count=count)


def _not_found(victim: Victim, name: str, block: int, *, verify: bool) -> str | None:
    """The problem with the reaction to the damage, None if it was found and named."""
    words = victim.refusal(verify=verify)
    if words is None:
        path = victim.newest / name
        # A bit of the manifest can leave its meaning as it is: 1e-05 and 1E-05.
        same = name == MANIFEST and _parsed(path) is not None and read_manifest(victim.newest) == victim.manifest
        return None if same else "it was not found"
    if name not in words or (name != MANIFEST and f"block {block} " not in words):
        return f"it was not named: {words}"
    return None


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def _flip_one(bench: Bench, folder: Path, prefix: str, number: int, verify: bool) -> Outcome:
    victim = Victim(bench, folder / "run")
    [name] = [name for name in victim.names if name.startswith(prefix)]
    path = victim.newest / name
    content = bytearray(path.read_bytes())
    position = (0, len(content) - 1, len(content) // 2)[number % 3]
    content[position] ^= 1 << number
    path.write_bytes(content)
    extra = ("--verify",) if verify else ()
    outcome = victim.resume(extra, f"{name} differs from what was written in block {position // BLOCK} ")
    if verify and outcome.problem is None:
        said = victim.out.with_name("run-resumed.log.0").read_text()
        if f"{folder_name(BEFORE)} is whole: all " not in said:
            return Outcome(problem=f"--verify did not say what it found: {said}")
    return outcome


def truncations(bench: Bench, short: bool) -> Iterator[Injection]:
    """Change the length of every file, in this process, and once in the newest step of real runs."""
    yield Injection("every file at every length", lambda folder: _truncate_all(bench, folder))
    lengths = list(LENGTHS)
    prefixes = ("backbone.", "backbone-optimizer", "head-00000", "head-00001", "identities", "manifest")
    for number, prefix in enumerate([] if short else prefixes):
        change = lengths[number % len(lengths)]
        inject = partial(_truncate_one, bench, prefix=prefix, change=change)
        yield Injection(f"real processes, {prefix} {change}", inject)


def _truncate(path: Path, change: str) -> bytes:
    whole = path.read_bytes()
    left = LENGTHS[change](whole)
    path.unlink()
    if left is not None:
        path.write_bytes(left)
    return whole


def _truncate_all(bench: Bench, folder: Path) -> Outcome:
    victim = Victim(bench, folder / "run")
    for name in victim.names:
        for change in LENGTHS:
            whole = _truncate(victim.newest / name, change)
            words = victim.refusal(verify=False)
            if words is None or name not in words:
                return Outcome(problem=f"{name}, {change}: {words or 'it was not found'}")
            (victim.newest / name).write_bytes(whole)
    return Outcome(count=len(victim.names) * len(LENGTHS))


def _truncate_one(bench: Bench, folder: Path, prefix: str, change: str) -> Outcome:
    victim = Victim(bench, folder / "run")
    [name] = [name for name in victim.names if name.startswith(prefix)]
    _truncate(victim.newest / name, change)
    return victim.resume((), name)


ROWS = [
    Row(
        "flipped",
        "a bit flipped in a block that is read: first, last and another bit of every block of every file",
        "found, file and block named, the step before used",
        flips(verify=False),
    ),
    Row(
        "flipped-verify",
        "the same in blocks that a resuming run does not read too, with `--verify`",
        "the same",
        flips(verify=True),
    ),
    Row(
        "truncated",
        "a file of a checkpoint a byte shorter or longer, halved, empty or gone (every file)",
        "found, the file named, the step before used",
        truncations,
    ),
]
