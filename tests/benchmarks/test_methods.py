"""The benchmarks of margins and samplers: every configuration can run, and the tables have a line for each."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from partialfc.training.build import check_config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(request.param)


@pytest.mark.parametrize("benchmark", ["methods"], indirect=True)
def test_every_method_can_be_trained_and_has_a_line_when_all_seeds_are_done(benchmark: Any) -> None:
    for method in benchmark.METHODS:
        check_config(benchmark.configuration(method, 0, Path("data"), 300))
    results = {f"cosface, seed {seed}": {"loss": 1.0 + seed, "accuracy": 0.8} for seed in benchmark.SEEDS}
    results |= {"adaface, seed 0": {"loss": 1.0, "accuracy": 0.8}}
    assert benchmark.lines_of(results)[2:] == ["| cosface | 2.000 ± 1.000 | 80.00% ± 0.00% |"]


@pytest.mark.parametrize("benchmark", ["margins"], indirect=True)
def test_a_ratio_is_the_median_over_rounds(benchmark: Any) -> None:
    seconds = {"CosFace": [1.0, 2.0, 1.0], "AdaFace": [1.1, 2.0, 3.0]}
    table = list(benchmark.table({1000: seconds}, ["CosFace", "AdaFace", "subcenter"], "CosFace"))
    assert table[0] == "| | 1,000 classes | beside CosFace |"
    assert table[2:] == [
        "| CosFace | 1,000.0 ms | 1.00 × |",
        "| AdaFace | 1,100.0 ms | 1.10 × |",
        "| subcenter | – | – |",
    ]
