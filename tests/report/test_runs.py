"""`partialfc runs`: the state of runs, and in what they differ."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from partialfc.cli import main
from partialfc.report.runs import list_runs


def write_run(
    folder: Path, steps: int, *, lr: float = 0.1, accuracies: dict[int, float] | None = None, age: float = 3600.0
) -> Path:
    """A run over 100 images in batches of 10 for 2 epochs, of 20 steps in all, that logged its last line `age` ago."""
    folder.mkdir(parents=True)
    settings = {"data": {"global_batch_size": 10}, "schedule": {"epochs": 2}, "optimizer": {"lr": lr}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    lines: list[dict[str, Any]] = [
        {"kind": "train", "step": step, "epoch": step / 10, "loss": 1.0, "images_per_second": 0.2, "schema_version": 1}
        for step in range(5, steps + 1, 5)
    ]
    for step, accuracy in (accuracies or {}).items():
        lines.append(
            {"kind": "evaluation", "step": step, "benchmark": "lfw", "accuracy": accuracy, "schema_version": 1}
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.utime(folder / "metrics.jsonl", (time.time() - age,) * 2)
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    write_run(tmp_path / "a", 20, accuracies={10: 0.8, 20: 0.9})
    write_run(tmp_path / "deep/er/b", 10, lr=0.2, accuracies={10: 0.95})
    write_run(tmp_path / "c", 15, age=700.0)  # 250 s between two lines
    write_run(tmp_path / "d", 0)
    damaged = write_run(tmp_path / "e", 5)
    (damaged / "config.yaml").write_text("[")
    write_run(tmp_path / "a/model/inner", 5)  # within a run
    return tmp_path


def test_states_figures_and_what_differs(runs: Path) -> None:
    rows = {row["run"]: row for row in list_runs(runs)}
    assert {name: row["state"] for name, row in rows.items()} == {
        "a": "finished", "c": "running", "d": "not begun", "deep/er/b": "stopped", "e": "unreadable",
    }  # fmt: skip
    assert (rows["a"]["accuracy"], rows["a"]["benchmarks"]) == (0.9, ["lfw"])
    assert [(rows[name]["step"], rows[name]["steps"]) for name in ("a", "deep/er/b", "d")] == [
        (20, 20), (10, 20), (0, None),
    ]  # fmt: skip
    assert {name: row.get("changed") for name, row in rows.items()} == {
        "a": {}, "c": {}, "d": {}, "deep/er/b": {"optimizer.lr": 0.2}, "e": None,
    }  # fmt: skip
    assert rows["a"]["age"] == pytest.approx(3600, abs=60)


def test_the_command_sorts_fits_the_terminal_and_has_json(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["runs", str(runs), "--sort", "best"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if str(runs) not in line) < 80  # a path is not broken in two
    assert lines[1].split() == ["deep/er/b", "stopped", "50%", "95.00%", "60", "min"]
    assert lines[2] == "    optimizer.lr=0.2"
    assert lines[3].startswith("a ")
    assert main(["runs", str(runs), "--json"]) == 0
    assert [row["run"] for row in json.loads(capsys.readouterr().out)] == ["a", "c", "d", "deep/er/b", "e"]


def test_no_folder_and_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path / "none")]) == 2
    assert "There is no folder" in capsys.readouterr().err
    assert main(["runs", str(tmp_path)]) == 0
    assert "There is no run in" in capsys.readouterr().out
