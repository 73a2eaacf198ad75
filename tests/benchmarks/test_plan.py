"""The check of the plan: what passes, what fails, and where its tables go. Nothing is measured here."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("plan_benchmark", ROOT / "benchmarks" / "plan.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plan_benchmark"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["plan_benchmark"]


@pytest.mark.parametrize(
    ("memory", "seconds", "is_training", "holds"),
    [
        (1.14, 1.24, False, True),
        (0.86, 0.76, False, True),
        (1.16, 1.0, False, False),
        (0.84, 1.0, False, False),
        (1.0, 1.26, False, False),
        (1.0, 0.74, False, False),
        (1.0, 3.0, True, True),  # the time of whole trainings is not judged
        (1.2, 1.0, True, False),
    ],
)
def test_what_is_off_by_too_much(
    benchmark: ModuleType, memory: float, seconds: float, is_training: bool, holds: bool
) -> None:
    measured = benchmark.Measured(1_000_000, 1.0, benchmark.rates_of(benchmark.HeadRates(1.0, 1.0, 0.0)))
    checked = benchmark.Checked("1m", benchmark.HEADS["1m"], measured, int(memory * 1_000_000), seconds, is_training)
    assert checked.holds is holds
    assert f"({memory - 1:+.0%})" in checked.row()


def test_all_configurations_can_be_planned_and_trained(benchmark: ModuleType) -> None:
    for name, request in benchmark.ALL.items():
        request.check()
        if name not in benchmark.HEADS:
            config = benchmark.configuration(request, Path("data"), steps=8)
            config.check()
            assert config.data.num_classes == request.classes
            assert config.backbone.name == request.backbone
    assert len(benchmark.HEADS) + len(benchmark.TRAININGS) >= 8


def test_tables_go_between_their_markers(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tmp_path / "scaling.md"
    document.write_text(benchmark.DOCUMENT.read_text())
    monkeypatch.setattr(benchmark, "DOCUMENT", document)
    for part in ("checked", "plans"):
        benchmark.write(part, ["one", "two"])
        begin, end = (f"<!-- benchmarks/plan.py {part} {side} -->" for side in ("begin", "end"))
        assert f"{begin}\none\ntwo\n{end}\n" in document.read_text()
