"""Checkpoints that are written beside the training: what a step waits for, and what it does not wait for."""

from __future__ import annotations

import resource
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_workers import run_ranks
from small_runs import config_without_saves

from partialfc.checkpoint import write as write_module
from partialfc.checkpoint.read import Checkpoint, steps_in
from partialfc.checkpoint.write import Snapshot, save_checkpoint
from partialfc.distributed.collectives import Shard
from partialfc.training import loop
from partialfc.training import saver as writer_module
from partialfc.training.loop import train
from partialfc.training.saver import CheckpointWriter


def slow_rank(rank: int, folder: Path) -> None:
    """Rank 0 takes longer to write than any other exchange may."""
    plain = write_module.write_hashed

    def write(path: Path, *arguments: Any) -> Any:
        if path.name == "backbone.safetensors":
            time.sleep(3.5)
        return plain(path, *arguments)

    if rank == 0:
        write_module.write_hashed = write  # type: ignore[assignment]
    loop._collective_timeout = lambda config: 2.0
    train(config_without_saves(), folder / "run", quiet=True)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_others_wait_for_a_slow_checkpoint(tmp_path: Path) -> None:
    run_ranks(2, slow_rank, tmp_path)
    assert steps_in(tmp_path / "run" / "checkpoints") == [10]


@pytest.mark.slow
def test_minutes_make_checkpoints_too(tmp_path: Path) -> None:
    config = config_without_saves(checkpoint_minutes=1e-9)
    train(replace(config, output=replace(config.output, keep=50)), tmp_path, quiet=True)
    assert len(steps_in(tmp_path / "checkpoints")) >= 5


def snapshot(values: torch.Tensor) -> Snapshot:
    return Snapshot(7, {"backbone": {"weight": values}}, Shard.of(len(values)), {"centers": values}, {"seed": 1}, {})


def test_a_step_waits_for_the_copy_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is what was there when it was saved, though the tensors change before anything is written."""
    may_write = threading.Event()

    def save(*arguments: Any, **contents: Any) -> Any:
        assert may_write.wait(30)
        return save_checkpoint(*arguments, **contents)

    monkeypatch.setattr(writer_module, "save_checkpoint", save)
    writer = CheckpointWriter(tmp_path, keep=1)
    values = torch.arange(12.0).view(4, 3)
    writer.save(snapshot(values))
    assert writer.busy
    values.zero_()
    may_write.set()
    writer.finish()
    assert not writer.busy
    written = Checkpoint(tmp_path / "step-00000007")
    assert torch.equal(written.rows("centers", 0, 4), torch.arange(12.0).view(4, 3))
    assert torch.equal(written.tensors("backbone")["weight"], torch.arange(12.0).view(4, 3))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc")
@pytest.mark.parametrize("preallocates", [True, False])
def test_the_first_save_takes_no_fresh_memory(
    preallocates: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fresh pages cost more time than the copy into them, which a step waits for."""
    monkeypatch.setattr(writer_module, "save_checkpoint", lambda *arguments, **options: None)
    writer, values = CheckpointWriter(tmp_path, keep=1), torch.ones(1 << 20, 16)
    if preallocates:
        others = threading.enumerate()
        writer.preallocate({"centers": values})
        for thread in threading.enumerate():
            if thread not in others:
                thread.join()
    before = resident_bytes()
    writer.save(replace(snapshot(values), tensors={}))
    grown = resident_bytes() - before
    writer.finish()
    assert (grown < values.nbytes / 4) == preallocates


def test_a_run_on_the_cpu_leaves_gpus_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for a stream would start CUDA, which takes memory of the first GPU, or fails."""

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("CUDA was started")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", refuse)
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(snapshot(torch.arange(12.0).view(4, 3)))
    writer.finish()
