"""A disk that is full, or cannot be written: what stays, what is logged, and whether the run continues."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_runs import PAIRS, config_without_saves

from partialfc.checkpoint.read import steps_in
from partialfc.checkpoint.write import CheckpointNotWritten, Snapshot, save_checkpoint
from partialfc.core.errors import InputError, JobError
from partialfc.model import files
from partialfc.training import loop
from partialfc.training import saver as writer_module
from partialfc.training.loop import train
from partialfc.training.run.log import read_metrics

pytestmark = pytest.mark.slow


def test_a_full_disk_spares_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(config_without_saves(), tmp_path, quiet=True)
    before, plain = (tmp_path / "config.yaml").read_bytes(), os.fsync

    def full(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".config.yaml.writing"):
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"config\.yaml cannot be written \(No space left on device\)"):
        train(config_without_saves(), tmp_path, resume=True, quiet=True)
    assert (tmp_path / "config.yaml").read_bytes() == before
    assert not list(tmp_path.glob(".config*"))


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *arguments: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(
        InputError, match=r"/run cannot be used \(Read-only file system\): give another folder with --out"
    ):
        train(config_without_saves(), tmp_path / "run", quiet=True)


def failing_at(monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    def save(root: Path, snapshot: Snapshot, **options: Any) -> Path:
        if snapshot.step == failing:
            raise CheckpointNotWritten("could not write a checkpoint (rank 0: [Errno 28] No space left on device)")
        return save_checkpoint(root, snapshot, **options)

    monkeypatch.setattr(writer_module, "save_checkpoint", save)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_stops_the_run_or_is_logged(
    asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_at(monkeypatch, 4)
    base = config_without_saves(checkpoint_async=asynchronous)
    every = replace(base, output=replace(base.output, checkpoint_every=2))
    with pytest.raises(CheckpointNotWritten, match=r"No space left.*: put that right, and go on .* with --resume"):
        train(every, tmp_path / "stops", quiet=True)
    assert steps_in(tmp_path / "stops" / "checkpoints") == [2]  # the last good one stays
    goes_on = replace(every, output=replace(every.output, on_checkpoint_error="continue"))
    result = train(goes_on, tmp_path / "goes on", quiet=True)
    assert steps_in(tmp_path / "goes on" / "checkpoints")[-1] == result.steps
    lines = read_metrics(tmp_path / "goes on" / "metrics.jsonl")
    messages = [line["message"] for line in lines if line["kind"] == "checkpoint_error"]
    assert len(messages) == 1
    assert "No space left" in messages[0]


def test_the_last_checkpoint_must_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that may go on without a checkpoint must not end without its last one as if all were well."""
    failing_at(monkeypatch, 10)
    with pytest.raises(CheckpointNotWritten, match="No space left"):
        train(config_without_saves(on_checkpoint_error="continue"), tmp_path, quiet=True)


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_model_that_cannot_be_written(goes_on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    config = config_without_saves(on_checkpoint_error="continue" if goes_on else "stop")
    config = replace(config, output=replace(config.output, evaluate_every=4))
    with monkeypatch.context() as patch:
        patch.setattr(files, "safetensors_pieces", full)
        if goes_on:
            result = train(config, tmp_path, quiet=True)
            assert result.best_step is None
            assert "best model" not in result.text()
        else:
            with pytest.raises(JobError, match=r"could not write a model .*No space left.*: make room, and go on with"):
                train(config, tmp_path, quiet=True)
    assert not list((tmp_path / "model").iterdir())
    errors = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "checkpoint_error"]
    assert [line["step"] for line in errors] == ([4, 8, 10] if goes_on else [])


def test_the_best_model_is_the_best_that_could_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores rise to the second evaluation of three, whose model is not written."""
    plain, scores = loop.evaluate_pairs, iter((0.5, 0.9, 0.7))

    def evaluate(*arguments: Any, **options: Any) -> Any:
        return replace(plain(*arguments, **options), accuracy=next(scores))

    def write(folder: Path, *arguments: Any) -> None:
        calls.append(folder.name)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_model(folder, *arguments)

    calls: list[str] = []
    save_model = loop.save_model
    monkeypatch.setattr(loop, "evaluate_pairs", evaluate)
    monkeypatch.setattr(loop, "save_model", write)
    config = config_without_saves(on_checkpoint_error="continue")
    config = replace(config, output=replace(config.output, evaluate_every=4))
    result = train(config, tmp_path, benchmarks=PAIRS, quiet=True)
    assert calls == ["last", "best", "last", "last", "best"]
    assert (result.best_score, result.best_step) == (0.7, 10)
