"""Several runs and results on one page, and what is refused or said about those that do not belong together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import complaint, run
from page_reader import Element, check_page, csv_rows, curve, figure
from run_folders import HOSTILE, ExampleBenchmark, evaluation_line, train_line, write_run

from partialfc.config.options import HeadConfig, TrainConfig
from partialfc.core.errors import InputError
from partialfc.evaluation.run import write_results
from partialfc.evaluation.statistics.figures import Result
from partialfc.report.headline import published_table
from partialfc.report.subjects import read_subjects

LINES = [train_line(step) for step in range(1, 41)] + [evaluation_line(40)]


def results_at(folder: Path, results: dict[str, Result], **facts: Any) -> Path:
    benchmarks = {name: result.to_dict() for name, result in results.items()}
    write_results(folder, {**facts, "benchmarks": benchmarks}, results)
    return folder


def page_of(capsys: pytest.CaptureFixture[str], out: Path, *arguments: object) -> Element:
    assert run("report", *arguments, "--out", out, "--json") == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out) == {"report": str(out)}
    return check_page(out.read_text(encoding="utf-8"))


def tables(page: Element) -> dict[str, list[list[str]]]:
    """The rows behind the CSV links, by caption; the tables show the same."""
    found = {}
    for each, link in zip(page.find_all("table"), page.find_all("a"), strict=True):
        rows = csv_rows(link)
        shown = [[cell.text for cell in row.children] for row in each.find_all("tr")]
        assert [[cell.removeprefix("'") for cell in row] for row in rows] == shown
        found[each.find_all("caption")[0].text] = rows
    return found


def test_several_runs_differ_first_and_share_their_axes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    runs = [
        write_run(
            tmp_path / name,
            [{**line, "loss": line.get("loss", 0) + place} for line in LINES],
            TrainConfig(head=HeadConfig(sample_rate=0.1 * (place + 1))),
        )
        for place, name in enumerate(("one", "two", "three"))
    ]
    page = page_of(capsys, tmp_path / "page.html", *runs)
    assert [each.text for each in page.find_all("h2")[:2]] == ["What differs", "Results"]
    found = tables(page)
    differing = [["setting", "one", "two", "three"], ["head.sample_rate", "0.1", "0.2", "0.30000000000000004"]]
    assert found["Settings in which the runs differ"] == differing
    assert found["Main figure of each benchmark"][1][1:] == ["84.00% [83.00, 85.00]"] * 3
    assert found["What was run"][0] == ["fact", "one", "two", "three"]
    loss = figure(page, "Loss")
    for place in range(3):
        expected = [(line["step"], line["loss"] + place) for line in LINES[:-1]]
        assert np.allclose(curve(loss, f"s{place + 1}"), expected, rtol=0, atol=[[0.02, 0.15]])
    assert loss.find_all("title")[0].text == "step 1: one 20, two 21, three 22"
    assert [each.words() for each in page.find_all("ul", "legend")[0].find_all("li")] == ["one", "two", "three"]


def test_results_alone_with_a_run_and_of_several_models(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    example, result = ExampleBenchmark(), ExampleBenchmark().result()
    made = {"date": "2026-11-26T10:00:00+00:00", "command": "partialfc evaluate", "seconds": 7200.0}
    folder = write_run(tmp_path / "mine", LINES)
    model = str(folder / "model" / "best")
    own = results_at(tmp_path / "own", {"pairs": result}, model=model, made=made)
    page = page_of(capsys, tmp_path / "one.html", own)
    assert page.find_all("h1")[0].text == "Evaluation report: own"
    assert "own: results of pairs" in page.words()
    assert "2 h 00 min" in page.words() or "120 min" in page.words()
    joined = read_subjects([folder, own])
    assert [(one.name, list(one.results)) for one in joined] == [("mine", ["pairs"])]
    other = ExampleBenchmark(100, seed=1).result()
    several = {"models": {"a/x": {"benchmarks": {"pairs": other.to_dict()}}, "b/x": {"benchmarks": {}}}}
    write_results(tmp_path / "several", several, {})
    page = page_of(capsys, tmp_path / "all.html", folder, own, tmp_path / "several")
    assert page.find_all("h1")[0].text == "Training report: mine, a/x, b/x"
    notes = page.find_all("ul", "notes")[0].words()
    assert "pairs has no results of b/x." in notes
    assert "pairs is not the same benchmark in all results" in notes
    figures = tables(page)["Figures of pairs"]
    assert figures[0] == ["figure", "mine", "a/x"]
    assert "Scores of a/x" in [each.words() for each in page.find_all("b")]
    assert len(example.images) == result.facts["images"]


def test_results_of_one_name_are_told_apart(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = ExampleBenchmark().result()
    places = [results_at(tmp_path / name / "eval", {"pairs": result}) for name in "ab"]
    assert run("report", *places) == 0
    shown = str(capsys.readouterr().out)
    page = places[0] / "report.html"
    assert f"report: {page}" in shown
    assert tables(check_page(page.read_text()))["Figures of pairs"][0][1:] == [str(place) for place in places]


def test_two_files_of_results_in_one_folder(tmp_path: Path) -> None:
    folder = results_at(tmp_path, {"pairs": ExampleBenchmark().result()})
    files = [folder / "a.json", folder / "b.json"]
    for file in files:
        file.write_bytes((folder / "results.json").read_bytes())
    assert len({one.name for one in read_subjects(files)}) == 2


def test_results_in_the_folder_of_their_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mine", LINES)
    results_at(folder, {"pairs": ExampleBenchmark().result()}, model=str(folder))
    [subject] = read_subjects([folder])
    assert (subject.name, subject.path, list(subject.results)) == ("mine", folder, ["pairs"])
    assert subject.run is not None


def test_published_figures_stand_beside_a_benchmark_of_their_name(tmp_path: Path) -> None:
    result = ExampleBenchmark().result()
    [subject] = read_subjects([results_at(tmp_path / "own", {"IJB-C": result, "agedb_30": result})])
    found = published_table([subject])
    assert "97.97%" in found
    assert "AgeDB-30" in found
    assert "MFR-ALL" not in found
    [subject] = read_subjects([results_at(tmp_path / "other", {"pairs": result})])
    assert published_table([subject]) == ""


def test_results_of_a_newer_version_and_damaged_ones_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "results.json"
    path.write_text('{"schema_version": 2, "benchmarks": {}}')
    assert "schema_version 2, and this partialfc reads them up to 1" in complaint(capsys, "report", path)
    for content in ("{", "[]", "{}", '{"benchmarks": {"lfw": {"kind": "pairs"}}}', '{"benchmarks": {"lfw": []}}'):
        path.write_text(content)
        assert "holds no results of evaluate, or is damaged" in complaint(capsys, "report", tmp_path)
    assert "is given twice" in complaint(capsys, "report", path, path)
    result = ExampleBenchmark().result()
    folder = write_run(tmp_path / "mine", LINES)
    both = [results_at(tmp_path / name, {"pairs": result}, model=str(folder)) for name in "ab"]
    assert "two results of pairs" in complaint(capsys, "report", folder, *both)


def test_runs_that_are_damaged_newer_or_missing_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", LINES)
    for content, words in (
        ('{"step": 1, "schema_version": 9}\n', "schema_version 9"),
        ('{"kind": "train", "st\n', "line 1, is no line of metrics"),
    ):
        (folder / "metrics.jsonl").write_text(content)
        assert words in complaint(capsys, "report", folder)
    (folder / "metrics.jsonl").unlink()
    (folder / "config.yaml").write_text("a: [1")
    assert "not readable as YAML" in complaint(capsys, "report", folder)
    (folder / "config.yaml").write_text("words")
    assert "holds no configuration" in complaint(capsys, "report", folder)
    assert not (folder / "report.html").exists()
    write_run(tmp_path / "outer" / "run", LINES)
    for wrong, words in ((tmp_path / "outer", "did you mean"), (tmp_path / "none", "holds no run")):
        with pytest.raises(InputError, match=words):
            read_subjects([wrong])


def test_a_run_that_never_logged_says_so_beside_one_that_did(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    runs = [write_run(tmp_path / HOSTILE.replace("/", ""), LINES), write_run(tmp_path / "silent")]
    page = page_of(capsys, tmp_path / "page.html", *runs)
    assert "silent: The run has not logged a training step" in page.find_all("ul", "notes")[0].words()
    assert "The runs have the same configuration." in page.words()
    assert curve(figure(page, "Loss")).shape == (40, 2)
    page = page_of(capsys, tmp_path / "page.html", runs[1])
    assert not page.find_all("figure")
