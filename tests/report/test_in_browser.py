"""The page in headless Chromium: charts, keys, tables, paper, colours, and a checker of accessibility."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from run_folders import ExampleBenchmark

from partialfc.report.page import write_report
from partialfc.report.subjects import read_subjects
from report_page import check_in_browser, chromium, write_long_run


@pytest.mark.slow
def test_two_runs_in_a_browser(tmp_path: Path) -> None:
    """Run where `pip install playwright axe-playwright-python` was done, and the system has Chromium."""
    pytest.importorskip("playwright")
    pytest.importorskip("axe_playwright_python")
    if shutil.which("chromium") is None:
        pytest.skip("needs chromium")
    for seed, name in enumerate(("one", "two")):
        write_long_run(tmp_path / name, 2000, seed)
    subjects = read_subjects([tmp_path / "one", tmp_path / "two"])
    example = ExampleBenchmark()
    subjects = [subject.with_results({"pairs": example.result()}, {}) for subject in subjects]
    page = write_report(subjects, out=tmp_path / "page.html", pictures={"pairs": example})
    with chromium() as browser:
        assert "none serious" in check_in_browser(browser, page)["axe-core"]
