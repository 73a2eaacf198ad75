"""The short form of the table of faults: real processes, killed, stopped, damaged and starved."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("faults", BENCHMARKS / "faults.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_short_form_ends_as_written(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(BENCHMARKS / "faults.py"), "--short", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) >= 2 + 14
    assert not any("did otherwise" in line for line in lines)


def test_what_ended_otherwise_is_shown_kept_and_tried_again(faults: ModuleType, tmp_path: Path) -> None:
    outcomes = [faults.Outcome(problem="it went wrong"), faults.Outcome(lost=2), faults.Outcome(lost=5)]
    row = faults.Row("key", "a fault", "all is well", lambda bench, short: iter(()))
    results, folders = tmp_path / "results.jsonl", [tmp_path / name for name in "abc"]
    for name, outcome, folder in zip("xxy", outcomes, folders, strict=True):
        faults.run_one(row, faults.Injection(name, lambda folder, outcome=outcome: outcome), folder, results)
    assert [folder.exists() for folder in folders] == [True, False, False]
    done = faults.read_results(results)
    assert done == {("key", "x"): outcomes[1], ("key", "y"): outcomes[2]}
    assert faults.table([row], done)[2] == "| a fault | 2 | all is well | 3.5, 5 |"
    done["key", "y"] = outcomes[0]
    assert faults.table([row], done)[2] == "| a fault | 2 | **1 did otherwise** | 2.0, 2 |"


def test_an_error_in_a_row_is_a_problem_of_that_injection(faults: ModuleType, tmp_path: Path) -> None:
    row = faults.Row("key", "a fault", "all is well", lambda bench, short: iter(()))
    outcome = faults.run_one(row, faults.Injection("x", lambda folder: 1 // 0), tmp_path / "a", tmp_path / "r.jsonl")
    assert outcome.problem == "ZeroDivisionError: integer division or modulo by zero"
