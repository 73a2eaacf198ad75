"""Runs that are stopped, share a folder, or cannot write: what is saved, what is said, and what goes on."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_runs
import torch
import yaml
from distributed_workers import run_apart, run_ranks
from safetensors import SafetensorError
from small_runs import PAIRS, final_tensors, small_config, timeless, tiny_config, write_images

from partialfc.config.options import TrainConfig
from partialfc.core.errors import InputError, JobError, StoppedBySignal
from partialfc.distributed.collectives import Shard
from partialfc.model import files
from partialfc.training import loop
from partialfc.training.checkpoint import write as checkpoint
from partialfc.training.checkpoint import writer as writer_module
from partialfc.training.checkpoint.read import Checkpoint, steps_in
from partialfc.training.checkpoint.write import CheckpointNotWritten, RowTensors, Snapshot, save_checkpoint
from partialfc.training.checkpoint.writer import CheckpointWriter
from partialfc.training.loop import train
from partialfc.training.run.folder import lock_folder
from partialfc.training.run.log import read_metrics
from partialfc.training.step import Stepper


def config_of(**output: Any) -> TrainConfig:
    base = small_config(precision="float32")
    return replace(base, output=replace(base.output, checkpoint_every=1000, evaluate_every=1000, **output))


def signal_in_step(monkeypatch: pytest.MonkeyPatch, number: int, which: signal.Signals) -> None:
    """This process gets the signal while it computes step `number`."""
    plain = Stepper.step

    def step(self: Stepper, batches: Any) -> Any:
        if self.state.done == number:
            os.kill(os.getpid(), which)
        return plain(self, batches)

    monkeypatch.setattr(Stepper, "step", step)


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("number", [0, 3, 7])
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(
    which: signal.Signals, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config_of(), tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patch:
        signal_in_step(patch, number, which)
        with pytest.raises(StoppedBySignal) as stop:
            train(config_of(), tmp_path / "stopped", quiet=True)
    assert stop.value.signum == which
    # What arrives in a step is told to the other ranks in the next one.
    assert steps_in(tmp_path / "stopped" / "checkpoints") == [number + 2]
    train(config_of(), tmp_path / "stopped", resume=True, quiet=True)
    whole, resumed = final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "stopped")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    lines = [timeless(read_metrics(tmp_path / run / "metrics.jsonl")) for run in ("whole", "stopped")]
    assert lines[0] == lines[1]


def stopped_rank(rank: int, folder: Path) -> None:
    """One of two ranks gets SIGTERM."""
    plain = Stepper.step

    def step(self: Stepper, batches: Any) -> Any:
        if rank == 1 and self.state.done == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, batches)

    Stepper.step = step  # type: ignore[method-assign]
    try:
        train(config_of(), folder / "run", quiet=True)
    except StoppedBySignal as stop:
        (folder / f"rank{rank}.txt").write_text(str(stop))


def test_a_signal_on_one_rank_stops_all_after_the_same_step(tmp_path: Path) -> None:
    run_ranks(2, stopped_rank, tmp_path)
    said = {(tmp_path / f"rank{rank}.txt").read_text() for rank in range(2)}
    assert said == {"stopped by SIGTERM after step 4, and saved; go on with --resume"}
    assert steps_in(tmp_path / "run" / "checkpoints") == [4]


class Interrupted(Exception):
    """The run was interrupted on purpose."""


def interrupted_and_whole(rank: int, folder: Path) -> None:
    """One of three ranks: a run without interruption, and one that breaks off in a step and goes on."""
    config = tiny_config(folder / "images", precision="float32")
    train(config, folder / "whole", quiet=True)
    plain = Stepper.step

    def step(self: Stepper, batches: Any) -> Any:
        if self.state.done == 4:
            raise Interrupted
        return plain(self, batches)

    Stepper.step = step  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        train(config, folder / "stopped", quiet=True)
    Stepper.step = plain  # type: ignore[method-assign]
    train(config, folder / "stopped", resume=True, quiet=True)


def test_three_ranks_go_on_bit_for_bit(tmp_path: Path) -> None:
    """With three, the order in which gradients are added can be told from the sum."""
    write_images(tmp_path / "images", [f"person {number}" for number in range(8)])
    run_ranks(3, interrupted_and_whole, tmp_path)
    digests = []
    for run in ("whole", "stopped"):
        root = tmp_path / run / "checkpoints"
        digests.append(Checkpoint(root / f"step-{steps_in(root)[-1]:08d}").digest)
    assert digests[0] == digests[1]


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
            train(config_of(), tmp_path, quiet=True)
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    with monkeypatch.context() as patch:
        signal_in_step(patch, 2, signal.SIGTERM)
        with pytest.raises(StoppedBySignal):
            train(config_of(), tmp_path, quiet=True)  # it is no other run
        patch.setattr(loop, "build_state", build)
        with pytest.raises(StoppedBySignal, match="with 4 steps done and saved; go on with --resume"):
            train(config_of(), tmp_path, resume=True, quiet=True)


@pytest.mark.parametrize("number", [1, 2])
def test_a_signal_in_an_evaluation_breaks_it_off_and_it_comes_again(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first evaluation of two, and the last, after which no step is left."""
    base = small_config(precision="float32")
    train(base, tmp_path / "whole", benchmarks=PAIRS, quiet=True)
    plain, calls = loop.evaluate_pair_set, []

    def evaluate(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate_pair_set", evaluate)
        with pytest.raises(StoppedBySignal, match=f"after step {5 * number}, and saved"):
            train(base, tmp_path / "stopped", benchmarks=PAIRS, quiet=True)
    lines = read_metrics(tmp_path / "stopped" / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [5][: number - 1]
    train(base, tmp_path / "stopped", benchmarks=PAIRS, resume=True, quiet=True)
    whole, resumed = (tmp_path / run / "checkpoints" / "step-00000010" for run in ("whole", "stopped"))
    assert Checkpoint(whole).digest == Checkpoint(resumed).digest
    lines = [timeless(read_metrics(tmp_path / run / "metrics.jsonl")) for run in ("whole", "stopped")]
    assert lines[0] == lines[1]
    train(base, tmp_path / "stopped", benchmarks=PAIRS, resume=True, quiet=True)  # a finished run says nothing twice
    assert timeless(read_metrics(tmp_path / "stopped" / "metrics.jsonl")) == lines[0]


LONE = """
import os, signal, sys, threading, time
from partialfc.distributed.signals import StopSignals
with StopSignals() as signals, signals.exit_on_signal():
    print("waiting", flush=True)
    if sys.argv[1] == "alone":
        time.sleep(60)
    os.kill(os.getpid(), signal.SIGTERM)
print("received", signals.received)
"""


def test_a_process_that_waits_for_others_ends_by_itself() -> None:
    """Its main thread sits in a call that a signal does not end; where the others come, the signal is remembered."""
    command = [sys.executable, "-c", LONE]
    process = subprocess.Popen([*command, "alone"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors == "partialfc: stopped by SIGTERM while it was not training; nothing was to be saved\n"
    done = subprocess.run([*command, "met"], capture_output=True, text=True, check=True)
    assert done.stdout == "waiting\nreceived 15\n"


IMPORTING = """
import os, signal, sys, types
from partialfc.__main__ import main
assert "torch" not in sys.modules
class Cli(types.ModuleType):
    def __getattr__(self, name):
        os.kill(os.getpid(), signal.SIGTERM)
        return None
sys.modules["partialfc.cli"] = Cli("partialfc.cli")
main()
"""


def test_a_signal_while_the_command_imports_is_heard() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTING], capture_output=True, text=True, check=False)
    assert done.returncode == 143, done.stderr
    assert done.stderr == "partialfc: stopped by SIGTERM while it was not training; nothing was to be saved\n"


def test_a_full_disk_spares_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(config_of(), tmp_path, quiet=True)
    before, plain = (tmp_path / "config.yaml").read_bytes(), os.fsync

    def full(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".config.yaml.writing"):
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"config\.yaml cannot be written \(No space left on device\)"):
        train(config_of(), tmp_path, resume=True, quiet=True)
    assert (tmp_path / "config.yaml").read_bytes() == before
    assert not list(tmp_path.glob(".config*"))


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_model_that_cannot_be_written(goes_on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    config = config_of(on_checkpoint_error="continue" if goes_on else "stop")
    config = replace(config, output=replace(config.output, evaluate_every=4))
    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", full)
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
    plain, scores = loop.evaluate_pair_set, iter((0.5, 0.9, 0.7))

    def evaluate(*arguments: Any, **options: Any) -> Any:
        return replace(plain(*arguments, **options), accuracy=next(scores))

    def write(folder: Path, *arguments: Any) -> None:
        calls.append(folder.name)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_model(folder, *arguments)

    calls: list[str] = []
    save_model = loop.save_model
    monkeypatch.setattr(loop, "evaluate_pair_set", evaluate)
    monkeypatch.setattr(loop, "save_model", write)
    config = config_of(on_checkpoint_error="continue")
    config = replace(config, output=replace(config.output, evaluate_every=4))
    result = train(config, tmp_path, benchmarks=PAIRS, quiet=True)
    assert calls == ["last", "best", "last", "last", "best"]
    assert (result.best_score, result.best_step) == (0.7, 10)


def test_the_last_checkpoint_must_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that may go on without a checkpoint must not end without its last one as if all were well."""
    failing_at(monkeypatch, 10)
    with pytest.raises(CheckpointNotWritten, match="No space left"):
        train(config_of(on_checkpoint_error="continue"), tmp_path, quiet=True)


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    holder = "import sys; from pathlib import Path; from partialfc.training.run.folder import lock_folder\n"
    holder += "with lock_folder(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=rf"in use by another run \(process {process.pid} on "):
        train(config_of(), tmp_path, quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock"]
    process.kill()  # however it ends, the lock goes with it
    process.communicate()
    with lock_folder(tmp_path):
        pass
    train(config_of(), tmp_path, quiet=True)


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
    base = config_of(checkpoint_async=asynchronous)
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


FAILING = """
import os, sys
from dataclasses import replace
from pathlib import Path
import small_runs
from partialfc.core.errors import JobError
from partialfc.training.checkpoint import writer
from partialfc.training.checkpoint.write import CheckpointNotWritten
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


@pytest.mark.parametrize("what", ["checkpoint", "step"])
def test_a_run_that_fails_ends_with_its_readers(what: str, tmp_path: Path) -> None:
    """An error that lives to the end of the process, or that nobody catches, does not keep the readers alive."""
    search = os.pathsep.join([str(Path(small_runs.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", FAILING, what, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": search}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert "nothing works" in done.stdout + done.stderr


def too_early(rank: int, folder: Path) -> None:
    """Rank 1 is lost after the processes have met, before they watch each other."""
    if rank == 1:
        loop.HeartbeatMonitor.__enter__ = lambda self: os._exit(0)  # type: ignore[method-assign,assignment]
    base = config_of()
    try:
        train(replace(base, processes=replace(base.processes, heartbeat_timeout_seconds=5)), folder / "run", quiet=True)
    except JobError as error:
        (folder / "said.txt").write_text(str(error))


def test_a_process_lost_before_they_watch_each_other_is_a_sentence_too(tmp_path: Path) -> None:
    assert run_apart(2, too_early, tmp_path) == [0, 0]
    said = (tmp_path / "said.txt").read_text()
    assert said.startswith("the exchange with the other processes broke off (")
    assert said.endswith("): go on from the last checkpoint with --resume.")


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *arguments: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(
        InputError, match=r"/run cannot be used \(Read-only file system\): give another folder with --out"
    ):
        train(config_of(), tmp_path / "run", quiet=True)


def slow_rank(rank: int, folder: Path) -> None:
    """Rank 0 takes longer to write than any other exchange may."""
    plain = checkpoint.write_hashed

    def write(path: Path, *arguments: Any) -> Any:
        if path.name == "backbone.safetensors":
            time.sleep(9)
        return plain(path, *arguments)

    if rank == 0:
        checkpoint.write_hashed = write  # type: ignore[assignment]
    loop._patience = lambda config: 5.0
    train(config_of(), folder / "run", quiet=True)


def test_the_others_wait_for_a_slow_checkpoint(tmp_path: Path) -> None:
    run_ranks(2, slow_rank, tmp_path)
    assert steps_in(tmp_path / "run" / "checkpoints") == [10]


def test_minutes_make_checkpoints_too(tmp_path: Path) -> None:
    config = config_of(checkpoint_minutes=1e-9)
    train(replace(config, output=replace(config.output, keep=50)), tmp_path, quiet=True)
    assert len(steps_in(tmp_path / "checkpoints")) >= 5


def snapshot(values: torch.Tensor) -> Snapshot:
    rows = RowTensors(Shard.of(len(values)), {"centers": values})
    return Snapshot(7, {"backbone": {"weight": values}}, rows, {"seed": 1}, {})


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
    with pytest.raises(ValueError, match="finish"):
        writer.save(snapshot(values))
    may_write.set()
    writer.finish()
    assert not writer.pending
    written = Checkpoint(tmp_path / "step-00000007")
    assert torch.equal(written.rows("centers", 0, 4), torch.arange(12.0).view(4, 3))
    assert torch.equal(written.tensors("backbone")["weight"], torch.arange(12.0).view(4, 3))


def test_the_memory_of_the_first_copy_is_taken_before(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep=1)
    values = torch.arange(12.0).view(4, 3)
    writer.preallocate(snapshot(values).rows.tensors)
    writer.save(snapshot(values))
    taken = writer._copies._buffers["rows/centers"].data_ptr()
    writer.finish()
    written = Checkpoint(tmp_path / "step-00000007")
    assert torch.equal(written.rows("centers", 0, 4), values)
    other = CheckpointWriter(tmp_path, keep=1)
    other.preallocate({"centers": values})
    assert other._preallocation is not None
    other._preallocation.join()
    before = other._copies._buffers["rows/centers"].data_ptr()
    other.save(snapshot(values))
    other.finish()
    assert other._copies._buffers["rows/centers"].data_ptr() == before != taken


def test_a_run_on_the_cpu_leaves_gpus_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for a stream would start CUDA, which takes memory of the first GPU, or fails."""

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("CUDA was started")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", refuse)
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(snapshot(torch.arange(12.0).view(4, 3)))
    writer.finish()


def test_a_run_from_before_an_option_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing key of the stored configuration has its default; another value is still another run."""
    with monkeypatch.context() as patch:
        signal_in_step(patch, 1, signal.SIGTERM)
        with pytest.raises(StoppedBySignal):
            train(config_of(), tmp_path, quiet=True)
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del stored["head"]["unsampled"], stored["backbone"]["sync_batch_norm"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored))
    changed = config_of()
    changed = replace(changed, head=replace(changed.head, unsampled="lazy_dense"))
    with pytest.raises(InputError, match=r"another head\.unsampled"):
        train(changed, tmp_path, resume=True, quiet=True)
    train(config_of(), tmp_path, resume=True, quiet=True)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize(("world_size", "status"), [("2", 3), ("1", -signal.SIGABRT)])
def test_one_of_several_processes_ends_without_pythons_own_end(world_size: str, status: int) -> None:
    program = (
        "import atexit, os\nfrom partialfc.distributed.signals import end_process\natexit.register(os.abort)\n"
        "print('done', end='')\nend_process(3)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env=os.environ | {"WORLD_SIZE": world_size}, check=False
    )
    assert done.returncode == status
    if world_size == "2":
        assert done.stdout == b"done"
