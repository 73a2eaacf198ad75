"""SIGTERM and SIGINT while a run starts, trains or evaluates: it saves, ends, and is resumed bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_workers import run_ranks
from small_runs import PAIRS, config_without_saves, final_tensors, signal_at, small_config, timeless

from partialfc.checkpoint.read import Checkpoint, steps_in
from partialfc.core.errors import StoppedBySignal
from partialfc.training import loop
from partialfc.training.loop import train
from partialfc.training.run.log import read_metrics


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruption."""
    root = tmp_path_factory.mktemp("whole") / "run"
    train(config_without_saves(), root, quiet=True)
    return root


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with evaluations."""
    root = tmp_path_factory.mktemp("evaluated") / "run"
    train(small_config(precision="float32"), root, benchmarks=PAIRS, quiet=True)
    return root


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("number", [0, *(pytest.param(number, marks=pytest.mark.slow) for number in (3, 7))])
def test_a_signal_saves_and_the_run_is_resumed_bit_for_bit(
    which: signal.Signals, number: int, whole: Path, tmp_path: Path
) -> None:
    with signal_at(number, which), pytest.raises(StoppedBySignal) as stop:
        train(config_without_saves(), tmp_path / "stopped", quiet=True)
    assert stop.value.signum == which
    # A signal that arrives in a step reaches the other ranks in the next one.
    assert steps_in(tmp_path / "stopped" / "checkpoints") == [number + 2]
    train(config_without_saves(), tmp_path / "stopped", resume=True, quiet=True)
    expected, resumed = final_tensors(whole), final_tensors(tmp_path / "stopped")
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())
    lines = [timeless(read_metrics(run / "metrics.jsonl")) for run in (whole, tmp_path / "stopped")]
    assert lines[0] == lines[1]


def stopped_rank(rank: int, folder: Path) -> None:
    """One of two ranks receives SIGTERM."""
    try:
        with signal_at(2) if rank == 1 else nullcontext():
            train(config_without_saves(), folder / "run", quiet=True)
    except StoppedBySignal as stop:
        (folder / f"rank{rank}.txt").write_text(str(stop))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_signal_on_one_rank_stops_all_after_the_same_step(tmp_path: Path) -> None:
    run_ranks(2, stopped_rank, tmp_path)
    said = {(tmp_path / f"rank{rank}.txt").read_text() for rank in range(2)}
    assert said == {"stopped by SIGTERM after step 4, and saved; go on with --resume"}
    assert steps_in(tmp_path / "run" / "checkpoints") == [4]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_command_ends_with_143(tmp_path: Path) -> None:
    """A whole process: the exit status, one line of words, and a folder that goes on."""
    command = [sys.executable, "-m", "partialfc", "train", "--data.path", small_config().data.path]
    options = ["--backbone.name=mini", "--backbone.embedding_dim=16", "--data.workers=0", "--data.global_batch_size=4"]
    options += ["--schedule.epochs=2000", "--output.log_every=1", "--out", str(tmp_path / "run")]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") > 2):
        threading.Event().wait(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "partialfc: stopped by SIGTERM after step" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert len(steps_in(tmp_path / "run" / "checkpoints")) >= 1


def test_a_signal_in_start_up_ends_the_run_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = loop.build_state

    def build(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "build_state", build)
        with pytest.raises(StoppedBySignal, match="stopped by SIGTERM before its first step"):
            train(config_without_saves(), tmp_path, quiet=True)
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    with signal_at(2), pytest.raises(StoppedBySignal):
        train(config_without_saves(), tmp_path, quiet=True)  # it is no other run
    with monkeypatch.context() as patch:
        patch.setattr(loop, "build_state", build)
        with pytest.raises(StoppedBySignal, match="with 4 steps done and saved; go on with --resume"):
            train(config_without_saves(), tmp_path, resume=True, quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_a_signal_interrupts_an_evaluation_which_is_repeated(
    number: int, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first evaluation of two, and the last, after which no step is left."""
    base = small_config(precision="float32")
    plain, calls = loop.embed_share, []

    def embed_share(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "embed_share", embed_share)
        with pytest.raises(StoppedBySignal, match=f"after step {5 * number}, and saved"):
            train(base, tmp_path / "stopped", benchmarks=PAIRS, quiet=True)
    lines = read_metrics(tmp_path / "stopped" / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [5][: number - 1]
    train(base, tmp_path / "stopped", benchmarks=PAIRS, resume=True, quiet=True)
    runs = (evaluated, tmp_path / "stopped")
    digests = [Checkpoint(run / "checkpoints" / "step-00000010").digest for run in runs]
    assert digests[0] == digests[1]
    logs = [timeless(read_metrics(run / "metrics.jsonl")) for run in runs]
    assert logs[0] == logs[1]
    train(base, tmp_path / "stopped", benchmarks=PAIRS, resume=True, quiet=True)  # a finished run logs nothing twice
    assert timeless(read_metrics(tmp_path / "stopped" / "metrics.jsonl")) == logs[0]
