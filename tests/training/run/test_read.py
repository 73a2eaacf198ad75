"""A run folder as data: every value is there or None, whatever the files hold."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from run_folders import evaluation_line, train_line, write_run

from partialfc.core.errors import InputError
from partialfc.training.run.read import as_number, read_run, read_settings


def test_a_run_is_its_settings_its_lines_and_its_evaluations(tmp_path: Path) -> None:
    lines = [train_line(step) for step in (5, 10, 20)]
    lines += [evaluation_line(step, accuracy=accuracy) for step, accuracy in ((10, 0.9), (20, 0.8))]
    run = read_run(write_run(tmp_path / "run", [*lines, train_line(10, loss=7.0), evaluation_line(20, accuracy=0.95)]))
    assert (run.name, run.benchmarks, run.counts, run.model) == ("run", ["lfw"], {}, None)
    assert (run.steps, run.total_steps, run.images, run.batch) == (20, 40, 500, 50)
    steps, losses = run.curve("loss")
    assert (steps.tolist(), losses.tolist()) == ([5, 10, 20], [4.0, 7.0, 1.0])
    assert run.last("sampled_classes") == 12
    assert [(line.step, line["accuracy"]) for line in run.evaluations] == [(10, 0.9), (20, 0.95)]
    assert run.best_step == 20
    assert run.seconds == pytest.approx(5 * 50 / 205 + 5 * 50 / 210 + 10 * 50 / 220)
    assert run.setting("backbone.name") == "mini"
    assert (run.number("backbone.name"), run.number("head.scale"), run.setting("no.such.key")) == (None, 32.0, None)


@pytest.mark.parametrize(
    ("value", "number"),
    [(3, 3.0), (0.5, 0.5), (1e-320, 0.0), (True, None), ("3", None), (None, None), (math.nan, None), (10**400, None)],
)
def test_only_finite_numbers_are_numbers(value: Any, number: float | None) -> None:
    assert as_number(value) == number


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert (run.steps, run.images, run.total_steps, run.seconds, run.best_step) == (0, None, None, None, None)


def test_settings_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.yaml cannot be read \(No such file"):
        read_settings(tmp_path / "config.yaml")
    for content, words in (("a: [1", "not readable as YAML"), ("words", "holds no configuration")):
        (tmp_path / "config.yaml").write_text(content)
        with pytest.raises(InputError, match=words):
            read_settings(tmp_path / "config.yaml")


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_report_imports_no_trainer() -> None:
    code = "import json, sys, partialfc.report.page; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = {name.removeprefix("partialfc.training.") for name in json.loads(done.stdout)}
    assert {"run.read", "partialfc.checkpoint.read"} <= imported
    assert not {"build", "loop", "state", "step"} & imported
