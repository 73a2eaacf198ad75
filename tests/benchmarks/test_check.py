"""The guard of speed: what fails it, and that its measuring processes answer."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("check")


@pytest.mark.parametrize(
    ("ratios", "status"),
    [([1.0, 1.09], 0), ([1.2, 1.0, 1.0], 0), ([1.2, 1.2, 1.0], 1), ([0.5, 1.11, 1.3], 1)],
)
def test_a_figure_over_the_limit_is_measured_again_before_it_fails(
    benchmark: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ratios: list[float],
    status: int,
) -> None:
    left = iter(ratios)

    @contextmanager
    def checkout(base: str, folder: Path) -> Iterator[Path]:
        assert base == "abc"
        yield folder

    monkeypatch.setattr(benchmark, "checkout", checkout)
    monkeypatch.setattr(benchmark, "IMAGES", 2)
    monkeypatch.setattr(benchmark, "compare", lambda *_: (1.0, 1.0, next(left)))
    monkeypatch.setattr(sys, "argv", ["check.py", "--base", "abc", "--only", "sampler", "loader"])
    assert benchmark.main() == status
    assert next(left, None) is None
    captured = capsys.readouterr()
    assert captured.out.count("measured again") == len(ratios) - 2
    assert captured.err.endswith("none\n") == (status == 0)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_both_sides_measure_in_turns(benchmark: ModuleType, tmp_path: Path) -> None:
    from loader import write_images

    write_images(tmp_path / "train.rec", 8, 32)
    before, now, ratio = benchmark.compare("loader", benchmark.ROOT, tmp_path / "train.rec", 3, 1)
    assert before > 0
    assert now > 0
    assert 0.01 < ratio < 100


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_side_without_the_package_is_an_error(benchmark: ModuleType, tmp_path: Path) -> None:
    with benchmark.side("sampler", tmp_path, tmp_path) as process, pytest.raises(SystemExit, match="process ended"):
        process.median_seconds(1)
