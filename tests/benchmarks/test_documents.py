"""The tables and figures of the documents, which the benchmarks write between markers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CALL = re.compile(r'write_between\("(?P<document>[\w./]+\.md)", f?"(?P<name>[^"{]+)')


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


def between(document: str, name: str) -> str:
    import documents

    text = (documents.DOCS / document).read_text()
    return text.split(f"<!-- {name} begin -->\n")[1].split(f"<!-- {name} end -->")[0]


def test_the_figures_of_the_readme_are_those_of_the_tables() -> None:
    sentence, table = (between(page, "benchmarks/head.py step") for page in ("../README.md", "performance.md"))
    rows = [row for row in table.splitlines() if row.startswith("| 1,000,000 | 0.1 | 128 |")]
    for variant in ("partialfc sparse", "partialfc deferred bfloat16"):
        (row,) = (row for row in rows if f"| {variant} |" in row)
        milliseconds, factor = re.findall(r"([\d,]+ ms) \(([\d.]+) ×\)", row)[0]
        assert milliseconds in sentence
        assert factor in sentence


def test_what_is_pending_on_a_gpu_is_what_the_documents_say() -> None:
    import gpu_backlog

    pending = gpu_backlog.ITEMS, gpu_backlog.RESULTS
    assert between("../README.md", "benchmarks/gpu_backlog.py").splitlines() == gpu_backlog.short_table(*pending)
    assert between("performance.md", "benchmarks/gpu_backlog.py").splitlines() == gpu_backlog.table(*pending)
    assert between("performance.md", "benchmarks/gpu_backlog.py heads").splitlines() == gpu_backlog.head_table(*pending)
    assert {item.name.split("-")[0] for item in gpu_backlog.ITEMS} == set(gpu_backlog.SUBJECTS)


def test_prose_fits_the_documents() -> None:
    import documents

    lines = [*documents.paragraph("word " * 60), *documents.items(["word " * 60, "one"])]
    assert max(map(len, lines)) <= 100
    assert lines[-1] == "- one"


def test_the_page_of_commands_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    import documents

    monkeypatch.setenv("COLUMNS", "80")
    page = (documents.DOCS / "commands.md").read_text(encoding="utf-8")
    assert page == documents.command_pages(), "run: python benchmarks/documents.py"
    assert max(map(len, page.splitlines())) < 80


def test_the_table_of_trainings_is_current() -> None:
    import documents

    assert between("reproduce.md", "benchmarks/documents.py").splitlines() == documents.recipe_table()
