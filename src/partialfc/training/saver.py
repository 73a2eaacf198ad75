"""The checkpoints of a run: how they are written beside the training, and what happens if that fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from partialfc.checkpoint.write import CheckpointNotWritten, Snapshot, save_checkpoint
from partialfc.distributed.activity import activity
from partialfc.distributed.collectives import Group
from partialfc.distributed.sharded import full_tensor


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time; every rank calls the same methods after the same steps.

    Asynchronous, `save` returns after the copy to the host. A thread then runs `save_checkpoint`, with its collectives
    in a group of its own, so that they never mix with those of the training. An error there is the same on all ranks,
    and the next `finish` raises or reports it.

    Args:
        root: the folder of checkpoints.
        keep: how many whole ones stay.
        asynchronous: False writes inside `save`, which needs no second copy in memory.
        group: all ranks, and used by nothing else.
        report: called on every rank with a sentence about a checkpoint that could not be written, if the run continues
            without it; None raises an error instead.

    Attributes:
        saved_at: when `save` was last called, by time.monotonic().
    """

    def __init__(
        self,
        root: Path,
        keep: int,
        *,
        asynchronous: bool = True,
        group: Group | None = None,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.root, self.keep, self.asynchronous, self.group, self.report = root, keep, asynchronous, group, report
        self.saved_at = time.monotonic()
        self._buffers: dict[str, Tensor] = {}
        self._preallocation: threading.Thread | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def preallocate(self, rows: Mapping[str, Tensor]) -> None:
        """Allocate the memory for the copies in a thread, so that the first `save` takes no longer than the others.

        Fresh pages cost more than the copy into them.

        Args:
            rows: tensors of the shapes and dtypes that will be saved.
        """

        def allocate() -> None:
            for name, tensor in rows.items():
                self._buffer(f"rows/{name}", tensor).zero_()

        if self.asynchronous:
            self._preallocation = threading.Thread(target=allocate, daemon=True)
            self._preallocation.start()

    def save(self, snapshot: Snapshot, *, last: bool = False) -> None:
        """Write a checkpoint, or start to, after waiting for the one before if that is still being written.

        If asynchronous, the only collectives are those that gather sharded tensors.

        Args:
            snapshot: its tensors may change afterwards.
            last: wait until it is in place, and always raise an error, since no later checkpoint repairs it.

        Raises:
            CheckpointNotWritten: on all ranks alike, if the one before, or this one, could not be written.
        """
        self.finish()
        self.saved_at = time.monotonic()
        content = self._copy_to_host(snapshot)
        if self.asynchronous:
            name = f"checkpoint of step {snapshot.step}"
            self._thread = threading.Thread(target=self._write, args=(content,), name=name, daemon=True)
            self._thread.start()
        else:
            self._write(content)
        if last or not self.asynchronous:
            self.finish(always_raise=last)

    @property
    def busy(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self, *, always_raise: bool = False) -> None:
        """Wait until the checkpoint that was started is in place.

        Args:
            always_raise: raise an error even if the run could continue without the checkpoint.

        Raises:
            CheckpointNotWritten: on all ranks alike, if any could not write.
        """
        if self._thread is not None:
            with activity(f"waiting for its {self._thread.name}", waits=True):
                self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is None:
            return
        if not isinstance(error, CheckpointNotWritten):
            raise error
        if self.report is None or always_raise:
            remedy = "put that right, and go on from the checkpoint before with --resume."
            raise CheckpointNotWritten(f"{error}: {remedy}") from error
        self.report(str(error))

    def abandon(self, seconds: float) -> None:
        """Wait at most `seconds` for the checkpoint that was started; for a run that ends with another error."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _write(self, snapshot: Snapshot) -> None:
        try:
            save_checkpoint(self.root, snapshot, keep=self.keep)
        except BaseException as error:  # `finish` raises it in the thread of the training
            self._error = error

    # -- copies in host memory, which is reused from one checkpoint to the next ----------------------------------------

    def _copy_to_host(self, snapshot: Snapshot) -> Snapshot:
        """What `save_checkpoint` writes: a copy if asynchronous, and full tensors in any case.

        Tensors that all ranks share stay on rank 0 alone, which writes them. They are gathered and copied one at a
        time, since a GPU may have no room for all of them. A collective for each that is sharded.
        """
        if self._preallocation is not None:
            self._preallocation.join()
            self._preallocation = None
        tensors: dict[str, dict[str, Tensor]] = {group: {} for group in snapshot.tensors}
        for group, members in snapshot.tensors.items():
            for name, tensor in members.items():
                full = full_tensor(tensor)
                if snapshot.shard.rank == 0 and self.asynchronous:
                    tensors[group][name] = self._copy(f"{group}/{name}", full)
                elif snapshot.shard.rank == 0:
                    tensors[group][name] = full if full is tensor else full.cpu()
        rows = snapshot.rows
        if self.asynchronous:
            rows = {name: self._copy(f"rows/{name}", tensor) for name, tensor in rows.items()}
            if torch.cuda.is_initialized():  # a run on the CPU of a machine with GPUs must not start CUDA
                torch.cuda.current_stream().synchronize()
        return replace(snapshot, tensors=tensors, rows=rows, shard=replace(snapshot.shard, group=self.group))

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        return self._buffer(name, tensor).copy_(tensor.detach(), non_blocking=True)

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        """Host memory for a copy of the tensor, pinned if the tensor is on a GPU."""
        buffer = self._buffers.get(name)
        if buffer is None or (buffer.dtype, buffer.shape) != (tensor.dtype, tensor.shape):
            buffer = torch.empty_like(tensor.detach(), device="cpu", pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer
        return buffer
