"""Runs that break off, and processes that are lost: what is left, and what is said."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from distributed_workers import run_apart, run_ranks
from small_runs import config_without_saves, interrupt_at, tiny_config, write_images

from partialfc.checkpoint.read import Checkpoint, steps_in
from partialfc.core.errors import JobError
from partialfc.training import loop
from partialfc.training.loop import train


def interrupted_and_whole(rank: int, folder: Path) -> None:
    """One of three ranks: a run without interruption, and one that is interrupted in a step and resumed."""
    config = tiny_config(folder / "images", precision="float32")
    train(config, folder / "whole", quiet=True)
    with interrupt_at(4):
        train(config, folder / "stopped", quiet=True)
    train(config, folder / "stopped", resume=True, quiet=True)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_three_ranks_are_resumed_bit_for_bit(tmp_path: Path) -> None:
    """With three, the sum of the gradients depends on the order in which they are added."""
    write_images(tmp_path / "images", [f"person {number}" for number in range(8)])
    run_ranks(3, interrupted_and_whole, tmp_path)
    digests = []
    for run in ("whole", "stopped"):
        root = tmp_path / run / "checkpoints"
        digests.append(Checkpoint(root / f"step-{steps_in(root)[-1]:08d}").digest)
    assert digests[0] == digests[1]


FAILING = """
import os, sys
from dataclasses import replace
from pathlib import Path
import small_runs
from partialfc.core.errors import JobError
from partialfc.training import saver as writer
from partialfc.checkpoint.write import CheckpointNotWritten
from partialfc.training.loop import train
from partialfc.training.step import Stepper

def fail(*arguments, **options):
    raise {"checkpoint": CheckpointNotWritten, "step": ValueError}[sys.argv[1]]("nothing works")

if sys.argv[1] == "checkpoint":
    writer.save_checkpoint = fail
else:
    Stepper.step = fail
base = small_runs.small_config(precision="float32")
config = replace(base, data=replace(base.data, workers=2))
try:
    train(config, Path(sys.argv[2]), quiet=True)
except JobError as error:
    print(error)
    sys.exit(1)
"""


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("what", ["checkpoint", "step"])
def test_a_run_that_fails_ends_with_its_readers(what: str, tmp_path: Path) -> None:
    """An error that lives to the end of the process, or that nobody catches, does not keep the readers alive."""
    command = [sys.executable, "-c", FAILING, what, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert "nothing works" in done.stdout + done.stderr


def too_early(rank: int, folder: Path) -> None:
    """Rank 1 is lost after the rendezvous, before the ranks monitor each other."""
    if rank == 1:
        pytest.MonkeyPatch().setattr(loop.HeartbeatMonitor, "__enter__", lambda self: os._exit(0))
    base = config_without_saves()
    try:
        train(replace(base, processes=replace(base.processes, heartbeat_timeout_seconds=5)), folder / "run", quiet=True)
    except JobError as error:
        (folder / "said.txt").write_text(str(error))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_process_lost_before_the_ranks_monitor_each_other_is_a_sentence_too(tmp_path: Path) -> None:
    assert run_apart(2, too_early, tmp_path) == [0, 0]
    said = (tmp_path / "said.txt").read_text()
    assert said.startswith("the exchange with the other processes broke off (")
    assert said.endswith("): go on from the last checkpoint with --resume.")
