"""When a run saves its state, and what happens if that fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from partialfc.config.options import TrainConfig
from partialfc.core.errors import JobError
from partialfc.distributed.collectives import Group, gather_json, rank_of
from partialfc.training.checkpoint.write import CheckpointNotWritten
from partialfc.training.checkpoint.writer import CheckpointWriter
from partialfc.training.run.folder import RunFolder
from partialfc.training.state import TrainState


class Saver:
    """The checkpoints of one run; every rank calls the same methods after the same steps.

    Args:
        config: of the run; it is stored with each checkpoint.
        group: all ranks, and used by nothing else.
        report: told on every rank about a checkpoint that could not be written, where the run goes on without.
    """

    def __init__(
        self, config: TrainConfig, folder: RunFolder, group: Group | None, report: Callable[[str], None]
    ) -> None:
        self.config, self.output, self.report = config.to_dict(), config.output, report
        self.writer = CheckpointWriter(
            folder.checkpoints, config.output.keep, asynchronous=config.output.checkpoint_async, group=group
        )
        self._last = time.monotonic()

    @property
    def minutes_passed(self) -> bool:
        """Whether it is time for a checkpoint by rank 0's clock; False on the other ranks, which ask rank 0."""
        due = self._last + 60 * self.output.checkpoint_minutes
        return self.output.checkpoint_minutes > 0 and rank_of() == 0 and time.monotonic() >= due

    def save(self, state: TrainState) -> None:
        """Save, after waiting for the checkpoint before if that is still being written.

        Raises:
            CheckpointNotWritten: on all ranks alike, unless the run is to go on without.
        """
        self.finish()
        self._last = time.monotonic()
        self._tolerantly(lambda: self.writer.save(state.snapshot(self.config)))

    def finish(self) -> None:
        """Wait for what is being written. Raises as `save` does."""
        self._tolerantly(self.writer.finish)

    def save_and_wait(self, state: TrainState) -> None:
        """Save for the end of the process: an error is one, whatever is tolerated on the way."""
        self.finish()
        try:
            self.writer.save(state.snapshot(self.config))
            self.writer.finish()
        except CheckpointNotWritten as error:
            raise _with_remedy(error) from error

    def write_models(self, write: Callable[[], None], group: Group | None) -> bool:
        """Let rank 0 write models; whether it could. Two collectives.

        Raises:
            JobError: on all ranks alike, if it could not, unless the run is to go on without.
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
