"""Faults that a training process injects into itself, at a named moment: it dies, is stopped or computes NaN."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from partialfc.checkpoint import write as checkpoint
from partialfc.checkpoint.blocks import BLOCK_BYTES
from partialfc.checkpoint.format import MANIFEST, FileRecord
from partialfc.checkpoint.write import Snapshot
from partialfc.data.loader import Batch
from partialfc.training import loop
from partialfc.training import saver as writer
from partialfc.training.saver import CheckpointWriter
from partialfc.training.step import Stepper

Act = Callable[[], object]
PLANNED = "here comes the planned signal"


def die(*_: object) -> NoReturn:
    """SIGKILL: no handler runs, nothing is cleaned up."""
    os.write(2, f"{PLANNED}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)
    while True:
        time.sleep(1.0)


def terminate(*_: object) -> None:
    """SIGTERM to this process."""
    os.write(2, f"{PLANNED}\n".encode())
    os.kill(os.getpid(), signal.SIGTERM)


def wrap(
    owner: object,
    name: str,
    *,
    before: Act | None = None,
    after: Act | None = None,
    when: Callable[..., bool] = lambda *_, **__: True,
) -> None:
    """Make a function or method call `before` or `after` too, if `when` holds for its arguments."""
    plain = getattr(owner, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        matches = when(*arguments, **options)
        if matches and before is not None:
            before()
        result = plain(*arguments, **options)
        if matches and after is not None:
            after()
        return result

    setattr(owner, name, wrapped)


def nth(number: int) -> Callable[..., bool]:
    """A condition that holds for one call, by its number from 1."""
    calls = 0

    def counted(*_: object, **__: object) -> bool:
        nonlocal calls
        calls += 1
        return calls == number

    return counted


def in_step(step: int, act: Act) -> None:
    """Before a step is computed, after its images are read."""
    wrap(Stepper, "step", before=act, when=lambda stepper, batches: stepper.state.done == step)


def in_micro_step(step: int, micro_step: int, act: Act) -> None:
    """Before a micro-step of a step is computed."""

    def chosen(_: Stepper, batch: Batch) -> bool:
        return (batch.step, batch.micro_step) == (step, micro_step)

    wrap(Stepper, "on_micro_batch", before=act, when=chosen)


def between_optimizers(step: int, act: Act) -> None:
    """After the backbone's update of a step, before the head's."""

    def patch(stepper: Stepper, batches: Any) -> bool:
        if stepper.state.done == step:
            wrap(stepper.state.head_optimizer, "step", before=act)
        return False

    wrap(Stepper, "step", when=patch)


def in_evaluation(number: int, act: Act) -> None:
    """In the evaluation of this number, from 1, when its first batch is done."""
    begun = 0

    def begins(*_: Any, **__: Any) -> bool:
        nonlocal begun
        begun += 1
        return False

    wrap(loop, "embed_share", when=begins)
    first = nth(1)
    wrap(loop._Trainer, "_agreed_signal", before=act, when=lambda _: begun == number and first())


def after_evaluation(number: int, act: Act) -> None:
    """When the evaluation of this number, from 1, is done and nothing of it is written."""
    wrap(loop, "evaluate_pairs", after=act, when=nth(number))


def in_model(number: int, act: Act) -> None:
    """Between the writing of the last and of the best model, for the call of this number."""
    wrap(loop, "save_model", after=act, when=nth(number))


def pace(seconds: float) -> None:
    """Make every step longer by `seconds`."""
    wrap(Stepper, "step", before=lambda: time.sleep(seconds))


# -- the stages of saving a checkpoint -------------------------------------------------------------------------------


class _Saving:
    """Whether the checkpoint of one step is being saved in this process."""

    def __init__(self, step: int) -> None:
        self.now = False
        plain = writer.save_checkpoint

        def save(root: Path, snapshot: Snapshot, **options: Any) -> Path:
            self.now = snapshot.step == step
            try:
                return plain(root, snapshot, **options)
            finally:
                self.now = False

        writer.save_checkpoint = save

    def when(self, chosen: Callable[..., bool]) -> Callable[..., bool]:
        return lambda *arguments, **options: self.now and chosen(*arguments, **options)


def _at_copy(step: int, act: Act, tensor: int) -> None:
    def patch(_: CheckpointWriter, snapshot: Any) -> bool:
        if snapshot.step == step:
            wrap(CheckpointWriter, "_copy", before=act, when=nth(tensor))
        return False

    wrap(CheckpointWriter, "_copy_to_host", when=patch)


def _at_file(step: int, act: Act, name: str, where: str) -> None:
    """Before, after or during the writing of a file whose name begins with `name`."""
    saving = _Saving(step)

    def chosen(path: Path, *_: Any) -> bool:
        return path.name.startswith(name)

    if where != "while":
        wrap(checkpoint, "write_hashed", **{where: act}, when=saving.when(chosen))
        return
    plain = checkpoint.write_hashed

    def cut(pieces: Iterable[Any]) -> Iterator[Any]:
        """The same bytes in two halves, with the act between them."""
        content = b"".join(bytes(piece) for piece in pieces)
        yield content[: len(content) // 2]
        act()
        yield content[len(content) // 2 :]

    def write(path: Path, pieces: Iterable[Any], block_bytes: int = BLOCK_BYTES) -> FileRecord:
        return plain(path, cut(pieces) if saving.now and chosen(path) else pieces, block_bytes)

    checkpoint.write_hashed = write


def _at_call(step: int, act: Act, owner: object, name: str, number: int, where: str) -> None:
    wrap(owner, name, **{where: act}, when=_Saving(step).when(nth(number)))


def _at_rename(step: int, act: Act, suffixes: tuple[str, str], where: str) -> None:
    def chosen(source: Path, target: Path) -> bool:
        return (Path(source).suffix, Path(target).suffix) == suffixes

    wrap(os, "rename", **{where: act}, when=_Saving(step).when(chosen))


def _in_deletion(step: int, act: Act) -> None:
    """When half the files of the oldest checkpoint are deleted."""
    saving, plain = _Saving(step), shutil.rmtree

    def remove(path: Any, **options: Any) -> None:
        if saving.now and Path(path).suffix == ".old":
            files = sorted(Path(path).iterdir())
            for file in files[: len(files) // 2]:
                file.unlink()
            act()
        plain(path, **options)

    shutil.rmtree = remove  # type: ignore[assignment]


_LEADERS_FILES = ("backbone.", "backbone-optimizer", "identities", MANIFEST)
_OWN_FILE = "head-"
Stage = Callable[[int, Act], None]


def _file_stages(files: tuple[str, ...]) -> dict[str, Stage]:
    return {
        f"{where} {name.rstrip('.-')} is written": partial(_at_file, name=name, where=where)
        for name in files
        for where in ("before", "while", "after")
    }


def _own_stages() -> dict[str, Stage]:
    """The stages of every rank."""
    calls = {
        f"{where} the ranks exchange {what}": partial(
            _at_call, owner=checkpoint, name="gather_json", number=number, where=where
        )
        for number, what in enumerate(("that they begin", "what they wrote", "that it is in place"), start=1)
        for where in ("before", "after")
    }
    return {
        "before it is prepared": lambda step, act: _at_call(step, act, checkpoint, "_prepare", 1, "before"),
        **_file_stages((_OWN_FILE,)),
        **calls,
    }


def _leader_stages() -> dict[str, Stage]:
    """The stages of rank 0 alone."""
    return {
        **_file_stages(_LEADERS_FILES),
        "before its folder is flushed": lambda s, act: _at_call(s, act, checkpoint, "fsync", 2, "before"),
        "after its folder is flushed": lambda s, act: _at_call(s, act, checkpoint, "fsync", 2, "after"),
        "before it gets its name": lambda s, act: _at_rename(s, act, (".writing", ""), "before"),
        "after it got its name": lambda s, act: _at_rename(s, act, (".writing", ""), "after"),
        "before the names are flushed": lambda s, act: _at_call(s, act, checkpoint, "fsync", 3, "before"),
        "before old ones are deleted": lambda s, act: _at_call(s, act, checkpoint, "_retire", 1, "before"),
        "when an old one has lost its name": lambda s, act: _at_rename(s, act, ("", ".old"), "after"),
        "while an old one is deleted": _in_deletion,
        "after old ones are deleted": lambda s, act: _at_call(s, act, checkpoint, "_retire", 1, "after"),
    }


COPY_STAGES: dict[str, Stage] = {
    "before the copy to the host": lambda step, act: _at_copy(step, act, 1),
    "while it is copied to the host": lambda step, act: _at_copy(step, act, 2),
}
OWN_STAGES, LEADER_STAGES = _own_stages(), _leader_stages()


def between_renames(step: int, act: Act) -> None:
    """When the old checkpoint of the same step has lost its name, and the new one has none yet."""
    _at_rename(step, act, ("", ".old"), "after")


def kill_reader(step: int, number: int) -> None:
    """Before a step, SIGKILL to one of this process's data workers."""

    def kill() -> None:
        os.kill(sorted(child.pid or 0 for child in multiprocessing.active_children())[number], signal.SIGKILL)

    in_step(step, kill)


def poison_images(steps: range) -> None:
    """Make the first image of this rank NaN in each of these steps."""

    def poison(self: Stepper, batch: Batch) -> Batch:
        if batch.step not in steps or batch.micro_step != 0:
            return batch
        images = batch.images.float()
        images[0] = float("nan")
        return replace(batch, images=images)

    Stepper.on_micro_batch = poison  # type: ignore[method-assign]


def poison_loss(steps: range) -> None:
    """Make the gradient of this rank's embeddings NaN in each of these steps."""

    def poison(self: Stepper, batch: Batch) -> Batch:
        if batch.step in steps and batch.micro_step == 0:

            def poisoned(head: torch.nn.Module, inputs: Any, loss: torch.Tensor) -> torch.Tensor:
                handle.remove()
                return loss * float("nan")

            handle = self.state.head.register_forward_hook(poisoned)
        return batch

    Stepper.on_micro_batch = poison  # type: ignore[method-assign]


def poison_weights_gradient(steps: range) -> None:
    """Make the gradient of one weight NaN on this rank in each of these steps, before the ranks exchange gradients."""
    now = False

    def watch(stepper: Stepper, batches: Any) -> bool:
        nonlocal now
        now = stepper.state.done in steps
        weight = next(stepper.state.backbone.parameters())
        if not hasattr(weight, "poisoned"):
            weight.poisoned = weight.register_hook(  # type: ignore[attr-defined]
                lambda gradient: gradient * float("nan") if now else gradient
            )
        return False

    wrap(Stepper, "step", when=watch)


def note_replica(folder: Path, rank: int) -> None:
    """After every step, append the SHA-256 of this rank's weights to a file in the folder."""
    plain = Stepper.step

    def step(self: Stepper, micro_batches: list[Batch]) -> dict[str, torch.Tensor]:
        figures = plain(self, micro_batches)
        digest = hashlib.sha256()
        for parameter in self.state.backbone.parameters():
            digest.update(parameter.detach().contiguous().numpy().tobytes())
        with (folder / f"replica.{rank}").open("a") as file:
            file.write(digest.hexdigest() + "\n")
        return figures

    Stepper.step = step  # type: ignore[method-assign]
