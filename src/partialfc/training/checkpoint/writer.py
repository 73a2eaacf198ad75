"""Checkpoints written beside the training: a step waits for a copy to the host, a thread does the rest."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from partialfc.distributed.activity import activity
from partialfc.distributed.collectives import Group
from partialfc.distributed.sharded import full_tensor, is_sharded
from partialfc.training.checkpoint.write import RowTensors, save_checkpoint


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds; see `save_checkpoint`."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    rows: RowTensors
    state: Mapping[str, Any]
    documents: Mapping[str, Any]


class HostCopies:
    """Copies of tensors in host memory that is kept from one copy to the next; pinned where they come from a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def of(self, snapshot: Snapshot) -> Snapshot:
        """The same snapshot on the host: its tensors may change afterwards, the copies not before the next call.

        Tensors that all ranks share are copied on rank 0 alone, which writes them. Those in parts over the ranks are
        put together first, one at a time: a collective for each.
        """
        tensors = {
            group: {name: self._copy(f"{group}/{name}", tensor) for name, tensor in each}
            for group, each in shared_tensors(snapshot)
        }
        rows = {name: self._copy(f"rows/{name}", tensor) for name, tensor in snapshot.rows.tensors.items()}
        if torch.cuda.is_initialized():  # a run on the CPU of a machine with GPUs leaves them alone
            torch.cuda.current_stream().synchronize()
        return replace(snapshot, tensors=tensors, rows=RowTensors(snapshot.rows.shard, rows))

    def make_room(self, rows: Mapping[str, Tensor]) -> None:
        """Take the memory for copies of these row tensors: fresh pages cost more than what is copied into them."""
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


def shared_tensors(snapshot: Snapshot) -> Iterator[tuple[str, Iterator[tuple[str, Tensor]]]]:
    """Groups with the names and whole tensors that rank 0 writes; the other ranks give their parts and get nothing."""
    leads = snapshot.rows.shard.rank == 0

    def pairs(named: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in named.items():
            together = full_tensor(tensor)
            if leads:
                yield name, together

    for group, named in snapshot.tensors.items():
        yield group, pairs(named)


def _put_together(snapshot: Snapshot) -> Snapshot:
    """The same snapshot with its tensors in parts as whole ones, on the host: a GPU may have no room for them all."""
    tensors = {
        group: {name: each.cpu() if is_sharded(snapshot.tensors[group][name]) else each for name, each in pairs}
        for group, pairs in shared_tensors(snapshot)
    }
    return replace(snapshot, tensors=tensors)


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time; every rank calls the same methods in the same order.

    Asynchronous, `save` returns after the copy to the host. The thread then does all that `save_checkpoint` does, with
    its collectives in a group of its own, so that they never mix with those of the training. What fails there fails on
    all ranks alike, and comes out of `finish`.

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
        self._making_room: threading.Thread | None = None
        self._error: BaseException | None = None
        self.step: int | None = None

    def make_room(self, rows: Mapping[str, Tensor]) -> None:
        """Before the first `save`, which would take longer without: take the memory for its copy, beside the training.

        Args:
            rows: tensors as those of the snapshots to come.
        """
        if self.asynchronous:
            self._making_room = threading.Thread(target=self._copies.make_room, args=(rows,), daemon=True)
            self._making_room.start()

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint, or start to; the one before must be finished.

        If asynchronous, no collective but those that put tensors in parts together.

        Raises:
            CheckpointNotWritten: not asynchronous, and it could not be written.
        """
        if self.pending:
            raise ValueError("finish the checkpoint before first")
        rows = replace(snapshot.rows, shard=replace(snapshot.rows.shard, group=self.group))
        snapshot = replace(snapshot, rows=rows)
        if not self.asynchronous:
            self._write(_put_together(snapshot))
            return
        self.step = snapshot.step
        if self._making_room is not None:
            self._making_room.join()
            self._making_room = None
        copied = self._copies.of(snapshot)
        self._thread = threading.Thread(target=self._write_beside, args=(copied,), name="checkpoint", daemon=True)
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
        """Give a checkpoint that was started some time to get done; for a run that ends with another error."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _write(self, snapshot: Snapshot) -> None:
        save_checkpoint(
            self.root,
            snapshot.step,
            tensors=snapshot.tensors,
            rows=snapshot.rows,
            state=snapshot.state,
            documents=snapshot.documents,
            keep=self.keep,
        )

    def _write_beside(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot)
        except BaseException as error:  # `finish` raises it where it can be dealt with
            self._error = error
