"""The logic of the GPU backlog, with measurements that need no GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

MACHINE = {"gpu": "NVIDIA Imaginary", "torch": "9.9"}
PATH = Path(__file__).parents[2] / "benchmarks" / "gpu_backlog.py"


@pytest.fixture
def backlog(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_backlog", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_backlog", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "hardware", lambda: MACHINE)
    return module


def item(backlog: ModuleType, name: str, code: str, **options: Any) -> Any:
    return backlog.Item(name, f"What is {name}?", ("-c", code), "A", **options)


def test_a_result_says_what_was_measured_where_and_how(backlog: ModuleType, tmp_path: Path) -> None:
    code = """print('{"step_ms": 1.5}'); print('warming up'); print('{"step_ms": 1.25}')"""
    assert backlog.main([], [item(backlog, "fast", code)], tmp_path / "gpu") == 0
    assert os.listdir(tmp_path / "gpu") == ["fast.json"]
    result = json.loads((tmp_path / "gpu" / "fast.json").read_text())
    assert result["figures"] == [{"step_ms": 1.5}, {"step_ms": 1.25}]
    assert result["output"] == ["warming up"]
    assert result["machine"] == MACHINE
    assert result["command"].startswith("python -c ")
    assert (result["name"], result["question"], result["issue"]) == ("fast", "What is fast?", "A")
    assert result["date"].endswith("+00:00")


def test_what_is_done_runs_only_on_demand(backlog: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    count = tmp_path / "count"
    items = [item(backlog, name, f"open({str(count)!r}, 'a').write('{name} ')") for name in ("one", "two")]
    results = tmp_path / "gpu"
    assert backlog.main(["one"], items, results) == 0
    assert backlog.main(["--list"], items, results) == 0
    listed = capsys.readouterr().out.splitlines()[-2:]
    assert listed == ["done     A  one: What is one?", "pending  A  two: What is two?"]
    assert backlog.main([], items, results) == 0
    assert backlog.main([], items, results) == 0
    assert capsys.readouterr().out.endswith("Nothing is pending.\n")
    assert backlog.main(["--again", "two"], items, results) == 0
    assert count.read_text() == "one two two "


def test_a_failure_leaves_no_result_and_the_rest_is_measured(
    backlog: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    items = [
        item(backlog, "bad", "print('it broke'); raise SystemExit(3)"),
        item(backlog, "later", "raise SystemExit(75)"),
        item(backlog, "good", "pass"),
    ]
    assert backlog.main([], items, tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["good.json"]
    captured = capsys.readouterr()
    assert "bad: failed: exit status 3" in captured.out
    assert "later: to be continued" in captured.out
    assert "it broke" in captured.err


def test_what_takes_too_long_is_ended(backlog: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    endless = item(backlog, "endless", "while True: pass", timeout_seconds=0.2)
    assert backlog.main([], [endless], tmp_path) == 1
    assert "endless: failed: not finished after 0 seconds" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_without_a_gpu_nothing_runs(
    backlog: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog, "hardware", lambda: None)
    assert backlog.main([], [item(backlog, "one", "pass")], tmp_path) == 2
    assert capsys.readouterr().err == "This machine has no CUDA device, which 1 pending measurements need.\n"
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_is_the_users_mistake(
    backlog: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        backlog.main(["tow"], [item(backlog, "two", "pass")], tmp_path)
    assert stopped.value.code == 2
    assert "no measurement is called tow" in capsys.readouterr().err


def test_the_backlog_itself_is_in_order(backlog: ModuleType, capsys: pytest.CaptureFixture) -> None:
    names = [item.name for item in backlog.ITEMS]
    assert len(set(names)) == len(names)
    assert all(item.timeout_seconds <= 540 and item.question and item.issue for item in backlog.ITEMS)
    assert backlog.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(names)
