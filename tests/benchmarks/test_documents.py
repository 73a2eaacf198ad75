"""The tables of docs/, which the benchmarks write between markers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CALL = re.compile(r'write_between\("(?P<document>[a-z/]+\.md)", f?"(?P<name>[^"{]+)')


@pytest.fixture(autouse=True)
def _beside_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_a_table_goes_between_its_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import documents

    monkeypatch.setattr(documents, "DOCS", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- x begin -->\nold\n<!-- x end -->\nafter\n")
    documents.write_between("page.md", "x", ["| new |"])
    assert page.read_text() == "before\n<!-- x begin -->\n| new |\n<!-- x end -->\nafter\n"


def test_each_benchmark_finds_its_place_filled() -> None:
    import documents

    calls = [match for path in BENCHMARKS.glob("*.py") for match in CALL.finditer(path.read_text())]
    assert len(calls) > 8
    for call in calls:
        page = (documents.DOCS / call["document"]).read_text()
        begun, ended = page.count(f"<!-- {call['name']}"), len(re.findall(rf"<!-- {call['name']}[ a-z]* end -->", page))
        assert begun == 2 * ended > 0, call[0]
        assert "Not measured" not in page, call[0]
