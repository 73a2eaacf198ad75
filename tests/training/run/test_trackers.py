"""TensorBoard, Weights & Biases, traces and memory, on recording stand-ins of packages that may be missing."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from small_runs import PAIRS, small_config, tiny_config, write_images

from partialfc.config.options import OutputConfig
from partialfc.core.errors import InputError
from partialfc.training.loop import train
from partialfc.training.run.log import read_metrics


class RecordingTensorBoard(ModuleType):
    """As much of torch.utils.tensorboard as is used."""

    def __init__(self) -> None:
        super().__init__("torch.utils.tensorboard")
        self.opened: list[tuple[str, int | None]] = []
        self.scalars: list[tuple[str, float, int]] = []
        self.closed = 0
        recording = self

        class SummaryWriter:
            def __init__(self, folder: str, purge_step: int | None) -> None:
                recording.opened.append((folder, purge_step))

            def add_scalar(self, name: str, value: float, step: int) -> None:
                recording.scalars.append((name, value, step))

            def close(self) -> None:
                recording.closed += 1

        self.SummaryWriter = SummaryWriter


class RecordingWandb(ModuleType):
    """As much of wandb as is used; its run is itself."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.settings: dict[str, Any] = {}
        self.lines: list[dict[str, Any]] = []
        self.finished = 0

    def init(self, **settings: Any) -> RecordingWandb:
        self.settings = settings
        return self

    def log(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.slow
def test_both_get_every_figure_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board, wandb = RecordingTensorBoard(), RecordingWandb()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = small_config()
    config = replace(config, output=replace(config.output, tensorboard=True, wandb="offline", log_every=2))
    train(config, tmp_path / "run", benchmarks=PAIRS, quiet=True)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [(line["loss"], line["step"]) for line in lines if line["kind"] == "train"]
    assert [(value, step) for name, value, step in board.scalars if name == "train/loss"] == losses
    assert [(line["train/loss"], line["step"]) for line in wandb.lines if "train/loss" in line] == losses
    accuracy = [(line["accuracy"], line["step"]) for line in lines if line["kind"] == "evaluation"]
    assert [(value, step) for name, value, step in board.scalars if name == "lfw/accuracy"] == accuracy
    assert [(line["lfw/accuracy"], line["step"]) for line in wandb.lines if "lfw/accuracy" in line] == accuracy
    assert board.opened == [(str(tmp_path / "run" / "tensorboard"), None)]
    assert (board.closed, wandb.finished) == (1, 1)
    assert wandb.settings["mode"] == "offline"
    assert wandb.settings["config"]["output"]["log_every"] == 2
    train(config, tmp_path / "run", benchmarks=PAIRS, resume=True, quiet=True)
    assert board.opened[1] == (str(tmp_path / "run" / "tensorboard"), 11)


@pytest.mark.parametrize(
    ("output", "module", "extra"),
    [
        (OutputConfig(tensorboard=True), "torch.utils.tensorboard", "tensorboard"),
        (OutputConfig(wandb="offline"), "wandb", "wandb"),
    ],
)
def test_a_missing_package_is_named_before_anything_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: OutputConfig, module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"pip install 'partialfc\[{extra}\]'"):
        train(small_config(output=output), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.multiprocess
@pytest.mark.slow
def test_neither_is_imported_unless_asked_for() -> None:
    code = (
        "import sys, partialfc.training.loop; "
        "print([name for name in ('wandb', 'tensorboard', 'torch.utils.tensorboard') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(("steps", "name"), [("2:4", "trace-2-4.json"), ("4:90", "trace-4-90.json")])
def test_a_trace_of_the_steps_asked_for(tmp_path: Path, steps: str, name: str) -> None:
    images = write_images(tmp_path / "images", ["a", "b", "c"], shots=5)
    config = tiny_config(images, precision="float32", device="cpu")
    config = replace(config, output=replace(config.output, profile_steps=steps))
    config = replace(config, schedule=replace(config.schedule, epochs=4))
    train(config, tmp_path / "run", quiet=True)
    events = json.loads((tmp_path / "run" / name).read_text())["traceEvents"]
    first = int(steps.partition(":")[0])
    recorded = sorted({event["name"] for event in events if event["name"].startswith("step ")})
    assert recorded == [f"step {first}", f"step {first + 1}"]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_memory_is_counted_in_bytes_and_grows_with_what_is_touched() -> None:
    code = (
        "import torch; from partialfc.core.device import peak_bytes; cpu = torch.device('cpu'); "
        "before = peak_bytes(cpu); kept = torch.ones(64 << 18); print(peak_bytes(cpu) - before)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 60 << 20 < int(result.stdout) < 128 << 20
