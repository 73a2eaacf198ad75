"""What the end of a training says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from partialfc.training.run.log import SlowData
from partialfc.training.timing import TrainResult, beats_guessing


def result(steps: int = 4, **benchmarks: dict[str, Any]) -> TrainResult:
    return TrainResult(Path("runs/mine"), steps, 24 * steps, 9.6, 12.0, benchmarks, 0.5, steps)


def of_pairs(pairs: int, accuracy: float) -> dict[str, Any]:
    return {"pairs": pairs, "accuracy": accuracy, "accuracy_std": 0.01}


@pytest.mark.parametrize(("pairs", "accuracy", "beats"), [(300, 0.5867, True), (300, 0.58, False), (6000, 0.52, True)])
def test_guessing_is_beaten_by_more_than_three_standard_errors(pairs: int, accuracy: float, beats: bool) -> None:
    assert beats_guessing(of_pairs(pairs, accuracy)) is beats


def test_it_says_whether_the_model_beats_guessing_on_what_and_what_is_next() -> None:
    text = result(lfw=of_pairs(300, 0.55)).text(["lfw=lfw.bin"])
    assert "lfw: accuracy 55.00% ± 1.00% of 300 pairs, no better than guessing (50%)" in text
    assert "partialfc finetune MODEL DATA" in text
    assert text.endswith("next: partialfc report runs/mine --benchmark lfw=lfw.bin")
    better = result(lfw=of_pairs(6000, 0.99)).text(["lfw.bin"])
    assert "of 6,000 pairs, above guessing (50%)" in better
    assert "learned nothing" not in better


def test_one_step_is_one_step_and_without_a_benchmark_nothing_is_claimed() -> None:
    text = result(1).text()
    assert text.startswith("1 step, 24 images in 10 s")
    assert "best model" not in text
    assert "next: partialfc evaluate runs/mine --benchmark lfw.bin" in text
    assert "unknown without a benchmark" in text


def test_slow_data_is_said_once_when_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    slow = SlowData(workers=2)
    said = [slow.hint(wait) for wait in (0.9, 0.1, 0.5, 0.5, 0.52, 0.6, 0.1, 0.9)]
    assert [bool(text) for text in said] == [False] * 4 + [True] + [False] * 3
    assert "52% of the time" in said[4]
    assert "raise --workers, 2 of 8 cores now" in said[4]
