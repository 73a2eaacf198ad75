"""Saving: what stays, what goes, and what a failure at any moment leaves behind."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import ThreadRank, assert_holds, flip, head_rows, names, newest, on_ranks, save, save_on

from partialfc.checkpoint.read import Checkpoint
from partialfc.checkpoint.write import CheckpointNotWritten
from partialfc.distributed.collectives import Shard


def test_keep(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000030", "step-00000040"]
    save(tmp_path, 50, keep=1)
    assert names(tmp_path) == ["step-00000050"]
    assert_holds(newest(tmp_path), 50)


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    (tmp_path / "step-00000020" / "backbone.safetensors").unlink()
    save(tmp_path, 40, keep=3)
    assert names(tmp_path) == ["step-00000010", "step-00000020", "step-00000030", "step-00000040"]
    save(tmp_path, 50, keep=3)
    assert names(tmp_path) == ["step-00000030", "step-00000040", "step-00000050"]


def test_steps_past_the_saved_one_stay(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    save(tmp_path, 15, keep=1)
    assert names(tmp_path) == ["step-00000015", "step-00000020", "step-00000030"]


def test_a_step_saved_again_takes_the_place_of_the_old(tmp_path: Path) -> None:
    flip(save(tmp_path, 10) / "backbone.safetensors", -1)
    save(tmp_path, 10)
    assert names(tmp_path) == ["step-00000010"]
    assert_holds(newest(tmp_path), 10)


def test_leftovers_of_dead_runs_are_removed(tmp_path: Path) -> None:
    for name in (".step-00000003.0123abcd.writing", ".step-00000002.0123abcd.old"):
        shutil.copytree(save(tmp_path / "other", 3), tmp_path / name)
    (tmp_path / ".mine").mkdir()
    shutil.rmtree(tmp_path / "other")
    save(tmp_path, 4)
    assert names(tmp_path) == [".mine", "step-00000004"]


def test_old_checkpoints_that_cannot_be_deleted_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    rename = os.rename

    def refuse_old(source: Path, target: Path) -> None:
        if target.suffix == ".old":
            raise PermissionError(errno.EACCES, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_old)
    assert_holds(Checkpoint(save(tmp_path, 2, keep=1)), 2)
    assert "could not be deleted" in caplog.text


class Faults:
    """Counts what a save does to the file system, and fails at one of these moments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException]) -> None:
        self.error = error
        self.countdown = 0
        for module, name in ((os, "fsync"), (os, "rename"), (os, "mkdir"), (shutil, "rmtree"), (Path, "open")):
            monkeypatch.setattr(module, name, self.wrap(getattr(module, name)))
        monkeypatch.setattr(hashlib, "sha256", self.wrap(hashlib.sha256))  # once for each block written

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.countdown -= 1
            if self.countdown == 0:
                raise self.error()
            return call(*arguments, **options)

        return counted


class Killed(BaseException):
    """No handler of the package catches it, as none runs in a process that is killed."""


@pytest.mark.parametrize("steps", [(1, 2), (1, 1)], ids=["the next step", "the same step again"])
def test_a_save_killed_at_any_moment_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, int]
) -> None:
    faults = Faults(monkeypatch, Killed)
    outcomes = set()
    for moment in range(1, 1000):
        root = tmp_path / str(moment)
        save(root, steps[0], keep=1)
        faults.countdown = moment
        try:
            save(root, steps[1], keep=1)
            killed = False
        except Killed:
            killed = True
        faults.countdown = 0
        opened = newest(root)
        assert opened is not None
        assert_holds(opened, opened.step)
        outcomes.add((killed, opened.step))
        save(root, 3, keep=1)
        assert names(root) == ["step-00000003"]
        if not killed:
            break
    assert outcomes == {(True, steps[0]), (True, steps[1]), (False, steps[1])}
    assert moment > 30


@pytest.mark.parametrize("steps", [(1, 2), (1, 1)], ids=["the next step", "the same step again"])
def test_a_full_disk_at_any_moment_is_reported_and_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, int]
) -> None:
    faults = Faults(monkeypatch, lambda: OSError(errno.ENOSPC, "No space left on device"))
    messages = set()
    for moment in range(1, 1000):
        root = tmp_path / str(moment)
        save(root, steps[0])
        faults.countdown = moment
        try:
            save(root, steps[1])
            failed = False
        except CheckpointNotWritten as error:
            failed = True
            messages.add(str(error).split(" (")[1])
        done = faults.countdown > 0
        faults.countdown = 0
        opened = newest(root)
        assert opened is not None
        assert_holds(opened, steps[0] if failed and opened.step == steps[0] else steps[1])
        assert not [name for name in names(root) if name.endswith(".writing")]
        if done:
            break
    assert moment > 30
    assert messages == {"rank 0: [Errno 28] No space left on device)"}


def test_a_failure_on_one_rank_is_the_same_error_on_all(tmp_path: Path) -> None:
    whole = head_rows(11)
    on_ranks(3, lambda rank: save_on(rank, tmp_path, 1, whole))

    def broken(rank: ThreadRank) -> Path:
        if rank.rank == 1:
            return save_on(rank, tmp_path, 2, {**whole, "centers": whole["centers"].to(torch.complex64)})
        return save_on(rank, tmp_path, 2, whole)

    outcomes = on_ranks(3, broken)
    assert [type(outcome) for outcome in outcomes] == [CheckpointNotWritten] * 3
    assert len({str(outcome) for outcome in outcomes}) == 1
    assert (
        "could not write a checkpoint (rank 1: ValueError: a checkpoint cannot hold tensors of torch.complex64"
        in str(outcomes[0])
    )
    assert names(tmp_path) == ["step-00000001"]


def test_ranks_that_disagree_about_the_rows_are_refused(tmp_path: Path) -> None:
    whole = head_rows(11)

    def save_some(rank: ThreadRank) -> Path:
        return save_on(rank, tmp_path, 2, whole if rank.rank else {"centers": whole["centers"]})

    outcomes = on_ranks(2, save_some)
    assert all("do not agree on the row tensors" in str(outcome) for outcome in outcomes)
    assert names(tmp_path) == []


def test_storage_that_the_ranks_do_not_share_is_refused(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    outcomes = on_ranks(2, lambda rank: save_on(rank, tmp_path / str(rank.rank), 2, head_rows(11)))
    assert all("head-00001-of-00002.safetensors cannot be read" in str(outcome) for outcome in outcomes)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"state": {"a": {"b": [1.0, float("nan")]}}}, r"state\.a\.b\[1\] is nan, which JSON cannot hold"),
        ({"state": {"optimizer": {3: "x"}}}, "state.optimizer has the key 3, which is no string"),
        ({"tensors": {"head-1": {}}}, "'head-1' cannot name a file"),
        ({"documents": {"manifest": {}}}, "'manifest' cannot name a file"),
        ({"documents": {"../x": {}}}, "cannot name a file"),
        ({"shard": Shard.of(3), "rows": {"centers": torch.zeros(4, 2)}}, r"shape \(4, 2\), not 3 rows"),
        ({"shard": Shard.of(1), "rows": {"centers": torch.tensor(1.0)}}, "not 1 rows"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointNotWritten, match=reason):
        save(tmp_path, 1, **options)
    assert newest(tmp_path) is None


def test_keep_nothing_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1"):
        save(tmp_path, 1, keep=0)
