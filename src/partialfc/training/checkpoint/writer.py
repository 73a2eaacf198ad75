"""The checkpoints of a run: when they are written, beside the training, and what happens if that fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from partialfc.config.options import TrainConfig
from partialfc.core.errors import JobError
from partialfc.distributed.activity import activity
from partialfc.distributed.collectives import Group, gather_json, rank_of
from partialfc.distributed.sharded import full_tensor
from partialfc.training.checkpoint.write import CheckpointNotWritten, RowTensors, Snapshot, save_checkpoint
from partialfc.training.run.read import RunFolder
from partialfc.training.state import TrainState


class HostCopies:
    """Copies of tensors in host memory that is reused from one copy to the next; pinned for tensors on a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def of(self, snapshot: Snapshot) -> Snapshot:
        """The same snapshot on the host: its tensors may change afterwards, the copies not before the next call.

        Tensors that all ranks share are copied on rank 0 alone, which writes them. A collective for each that is
        sharded.
        """
        tensors = _full_tensors(snapshot, lambda name, tensor, full: self._copy(name, full))
        rows = {name: self._copy(f"rows/{name}", tensor) for name, tensor in snapshot.rows.tensors.items()}
        if torch.cuda.is_initialized():  # a run on the CPU of a machine with GPUs must not start CUDA
            torch.cuda.current_stream().synchronize()
        return replace(snapshot, tensors=tensors, rows=RowTensors(snapshot.rows.shard, rows))

    def preallocate(self, rows: Mapping[str, Tensor]) -> None:
        """Allocate the memory for copies of these row tensors: fresh pages cost more than the copy into them."""
        for name, tensor in rows.items():
            self._buffer(f"rows/{name}", tensor).zero_()

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        return self._buffer(name, tensor).copy_(tensor.detach(), non_blocking=True)

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or (buffer.dtype, buffer.shape) != (tensor.dtype, tensor.shape):
            buffer = torch.empty_like(tensor.detach(), device="cpu", pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer
        return buffer


def _full_tensors(snapshot: Snapshot, keep: Callable[[str, Tensor, Tensor], Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors that rank 0 writes, as `keep(name, tensor, full tensor)` returns them; empty groups on other ranks.

    They are gathered and kept one at a time, since a GPU may have no room for all of them. A collective for each
    sharded tensor.
    """
    is_leader = snapshot.rows.shard.rank == 0
    result: dict[str, dict[str, Tensor]] = {group: {} for group in snapshot.tensors}
    for group, tensors in snapshot.tensors.items():
        for name, tensor in tensors.items():
            full = full_tensor(tensor)
            if is_leader:
                result[group][name] = keep(f"{group}/{name}", tensor, full)
    return result


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time; every rank calls the same methods in the same order.

    Asynchronous, `save` returns after the copy to the host. A thread then runs `save_checkpoint`, with its collectives
    in a group of its own, so that they never mix with those of the training. An error there is the same on all ranks,
    and `finish` raises it.

    Args:
        root: the folder of checkpoints.
        keep: how many whole ones stay.
        asynchronous: False writes inside `save`, which needs no second copy in memory.
        group: all ranks, and used by nothing else.
    """

    def __init__(self, root: Path, keep: int, *, asynchronous: bool = True, group: Group | None = None) -> None:
        self.root, self.keep, self.asynchronous, self.group = root, keep, asynchronous, group
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._preallocation: threading.Thread | None = None
        self._error: BaseException | None = None
        self.step: int | None = None

    def preallocate(self, rows: Mapping[str, Tensor]) -> None:
        """Allocate the memory for the copies in a thread, so that the first `save` takes no longer than the others.

        Args:
            rows: tensors of the shapes and dtypes that will be saved.
        """
        if self.asynchronous:
            self._preallocation = threading.Thread(target=self._copies.preallocate, args=(rows,), daemon=True)
            self._preallocation.start()

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint, or start to; the one before must be finished.

        If asynchronous, the only collectives are those that gather sharded tensors.

        Raises:
            CheckpointNotWritten: not asynchronous, and it could not be written.
        """
        if self.pending:
            raise ValueError("finish the checkpoint before first")
        rows = replace(snapshot.rows, shard=replace(snapshot.rows.shard, group=self.group))
        snapshot = replace(snapshot, rows=rows)
        if not self.asynchronous:
            tensors = _full_tensors(snapshot, lambda _, tensor, full: full if full is tensor else full.cpu())
            save_checkpoint(self.root, replace(snapshot, tensors=tensors), keep=self.keep)
            return
        self.step = snapshot.step
        if self._preallocation is not None:
            self._preallocation.join()
            self._preallocation = None
        copies = self._copies.of(snapshot)
        self._thread = threading.Thread(target=self._write, args=(copies,), name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> bool:
        """Whether a checkpoint was started and not finished: the same on all ranks."""
        return self._thread is not None

    @property
    def busy(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> None:
        """Wait until the checkpoint that was started is in place.

        Raises:
            CheckpointNotWritten: on all ranks alike, if any could not write.
        """
        if self._thread is not None:
            with activity(f"waiting for its checkpoint of step {self.step}", waits=True):
                self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def abandon(self, seconds: float) -> None:
        """Wait at most `seconds` for the checkpoint that was started; for a run that ends with another error."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _write(self, snapshot: Snapshot) -> None:
        try:
            save_checkpoint(self.root, snapshot, keep=self.keep)
        except BaseException as error:  # `finish` raises it in the thread of the training
            self._error = error


class Saver:
    """Saves the state and the models of a run; every rank calls the same methods after the same steps.

    Args:
        config: of the run; it is stored with each checkpoint.
        group: all ranks, and used by nothing else.
        report: called on every rank with a sentence about a checkpoint or model that could not be written, if the run
            continues without it.
    """

    def __init__(
        self, config: TrainConfig, folder: RunFolder, group: Group | None, report: Callable[[str], None]
    ) -> None:
        self.config, self.output, self.report = config.to_dict(), config.output, report
        self.writer = CheckpointWriter(
            folder.checkpoints, config.output.keep, asynchronous=config.output.checkpoint_async, group=group
        )
        self._last_saved = time.monotonic()

    @property
    def minutes_passed(self) -> bool:
        """Whether it is time for a checkpoint by rank 0's clock; False on the other ranks, which ask rank 0."""
        due = self._last_saved + 60 * self.output.checkpoint_minutes
        return self.output.checkpoint_minutes > 0 and rank_of() == 0 and time.monotonic() >= due

    def save(self, state: TrainState) -> None:
        """Save, after waiting for the checkpoint before if that is still being written.

        Raises:
            CheckpointNotWritten: on all ranks alike, unless the run continues without it.
        """
        self.finish()
        self._last_saved = time.monotonic()
        self._tolerantly(lambda: self.writer.save(state.snapshot(self.config)))

    def finish(self) -> None:
        """Wait for what is being written. Raises as `save` does."""
        self._tolerantly(self.writer.finish)

    def save_and_wait(self, state: TrainState) -> None:
        """Save before the process ends: here an error is always raised, since no later checkpoint repairs it."""
        self.finish()
        try:
            self.writer.save(state.snapshot(self.config))
            self.writer.finish()
        except CheckpointNotWritten as error:
            raise _with_remedy(error) from error

    def write_models(self, write: Callable[[], None], group: Group | None) -> bool:
        """Let rank 0 write models, and return whether it could. Two collectives.

        Raises:
            JobError: on all ranks alike, if it could not, unless the run continues without them.
        """
        message = None
        if rank_of() == 0:
            try:
                write()
            except OSError as error:
                message = f"could not write a model ({error})"
        message = gather_json(message, group=group)[0]
        if message is not None and self.output.on_checkpoint_error == "stop":
            raise JobError(f"{message}: make room, and go on with --resume.")
        if message is not None:
            self.report(message)
        return message is None

    def _tolerantly(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except CheckpointNotWritten as error:
            if self.output.on_checkpoint_error == "stop":
                raise _with_remedy(error) from error
            self.report(str(error))


def _with_remedy(error: CheckpointNotWritten) -> CheckpointNotWritten:
    return CheckpointNotWritten(f"{error}: put that right, and go on from the checkpoint before with --resume.")
