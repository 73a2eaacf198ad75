"""Trainings of several processes on one machine, which start without torchrun."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_runs import PAIRS, losses, on_micro_batch, small_config

from partialfc.core.errors import InputError, JobError
from partialfc.data.loader import Batch
from partialfc.training import cores
from partialfc.training.cores import processes_for, train_on_cores
from partialfc.training.step import Stepper


def children() -> list[int]:
    return [int(word) for file in Path("/proc/self/task").glob("*/children") for word in file.read_text().split()]


@pytest.fixture
def others() -> set[int]:
    """Children that this process has from before."""
    return set(children())


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cores, "_FEWEST_IMAGES", 5)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("threads", "changes", "expected"),
    [
        (1, {}, 1),
        (2, {}, 2),
        (4, {}, 2),  # 128 images
        (4, {"data.global_batch_size": 1024}, 4),
        (64, {"data.global_batch_size": 1024}, 8),
        (64, {"data.global_batch_size": 1024, "data.micro_steps": 4}, 4),
        (4, {"data.global_batch_size": 100}, 1),
    ],
)
def test_every_process_has_a_thread_and_64_images(
    threads: int, changes: dict[str, int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    config = small_config().with_values({"data.global_batch_size": 128} | changes)
    assert processes_for(config) == expected
    monkeypatch.setenv("RANK", "0")
    assert processes_for(config) == 1  # torchrun has counted already


def test_a_gpu_is_used_by_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = small_config().with_values({"data.global_batch_size": 256})
    assert processes_for(config) == 1
    assert processes_for(config.with_values({"device": "cpu"})) == 4


@pytest.mark.slow
@pytest.mark.usefixtures("two_cores")
def test_two_processes_train_one_model(tmp_path: Path, others: set[int], capfd: pytest.CaptureFixture[str]) -> None:
    environment = dict(os.environ)
    result = train_on_cores(small_config(), tmp_path / "run", benchmarks=PAIRS)
    assert "2 x cpu" in capfd.readouterr().err
    assert result.steps == len(losses(tmp_path / "run"))
    assert (tmp_path / "run" / "model" / "best").is_dir()
    assert (dict(os.environ), torch.get_num_threads()) == (environment, 2)
    assert set(children()) <= others


@pytest.mark.slow
@pytest.mark.usefixtures("two_cores")
def test_a_process_that_dies_ends_the_training_with_a_sentence(tmp_path: Path, others: set[int]) -> None:
    def kill_the_other(_: Stepper, batch: Batch) -> None:
        if batch.step == 2:
            os.kill(next(iter(set(children()) - others)), signal.SIGKILL)

    with on_micro_batch(kill_the_other), pytest.raises(JobError, match="rank 1"):
        train_on_cores(small_config(), tmp_path / "run", quiet=True)
    assert set(children()) <= others


@pytest.mark.slow
@pytest.mark.usefixtures("two_cores")
def test_a_mistake_is_said_once(tmp_path: Path, others: set[int], capfd: pytest.CaptureFixture[str]) -> None:
    config = small_config().with_values({"data.path": str(tmp_path / "nothing")})
    with pytest.raises(InputError, match="nothing"):
        train_on_cores(config, tmp_path / "run", quiet=True)
    assert capfd.readouterr().err == ""
    assert set(children()) <= others
