"""The check of the plan: what passes, what fails, and that its configurations can run."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from partialfc.training.build import check_config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("plan")


@pytest.mark.parametrize(
    ("name", "memory", "seconds", "holds"),
    [
        ("1m", 1.14, None, True),
        ("1m", 0.86, None, True),
        ("1m", 1.16, None, False),
        ("1m", 0.84, None, False),
        ("r18", 1.0, 3.0, True),  # times are not judged
        ("r18", 1.2, 1.0, False),
    ],
)
def test_what_is_off_by_too_much(
    benchmark: ModuleType, name: str, memory: float, seconds: float | None, holds: bool
) -> None:
    measured = benchmark.Measured(1_000_000, 1.0, seconds)
    checked = benchmark.Checked(name, benchmark.ALL[name], measured, int(memory * 1_000_000))
    assert checked.holds is holds
    assert f"({memory - 1:+.0%})" in checked.row()
    assert seconds is None or f"({seconds - 1:+.0%})" in checked.row()


def test_all_configurations_can_be_planned_and_trained(benchmark: ModuleType) -> None:
    for name, workload in benchmark.ALL.items():
        workload.check()
        if name not in benchmark.HEADS:
            config = benchmark.run_config(workload, Path("data"), steps=8)
            check_config(config)
            assert config.data.num_classes == workload.classes
    assert len(benchmark.HEADS) + len(benchmark.TRAININGS) >= 8


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_process_takes_what_is_predicted(benchmark: ModuleType) -> None:
    workload = benchmark.head(100_000, 0.2, 64)
    # What a first process compiles, the second loads: compiling would raise the memory before.
    benchmark.in_fresh_process(partial(benchmark.warm_up, workload))
    measured = benchmark.in_fresh_process(partial(benchmark.measure_head, workload))
    assert benchmark.head_memory(workload) == pytest.approx(measured.peak_bytes, rel=0.15)
