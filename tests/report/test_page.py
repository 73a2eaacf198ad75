"""The page: whole, alone, harmless, and there for every run, however little it has written."""

from __future__ import annotations

import base64
import io
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from page_reader import Element, check_page, csv_rows, curve, figure, to_values
from PIL import Image
from run_folders import HOSTILE, ExampleBenchmark, evaluation_line, train_line, write_run

from partialfc.checkpoint.write import Snapshot, save_checkpoint
from partialfc.config.options import HeadConfig, TrainConfig
from partialfc.core.errors import InputError
from partialfc.data.images import data_uri
from partialfc.distributed.collectives import Shard
from partialfc.evaluation.statistics.figures import Result
from partialfc.report.page import write_report
from partialfc.report.subjects import read_subjects
from partialfc.training.run.log import MetricsLog

LINES = [train_line(step) for step in range(1, 41)] + [evaluation_line(step) for step in (10, 20, 30, 40)]


def report(*paths: Path, results: dict[str, Result] | None = None, **options: Any) -> Element:
    """The page, checked for what must hold of every page."""
    subjects = read_subjects(paths)
    if results is not None:
        subjects[0] = subjects[0].with_results(results, {})
    text = write_report(subjects, **options).read_text(encoding="utf-8")
    assert "://" not in text
    drawn = text.split("<pre>")[0].partition("</style>")[2]
    assert not re.search(r"url\(|@import|\bnan|inf\b", re.sub(r'href="[^"]*"|src="[^"]*"', "", drawn))
    return check_page(text)


def facts(page: Element) -> dict[str, str]:
    entries = [entry for entries in page.find_all("dl") for entry in entries.find_all("div")]
    return {entry.find_all("dt")[0].text: entry.find_all("dd")[0].text for entry in entries}


def test_a_finished_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "nice run", LINES)
    page = report(run)
    assert (run / "report.html").is_file()
    assert page.find_all("h1")[0].text == "Training report: nice run"
    assert "finished, 40 steps" in page.words()
    assert "84.00%" in page.find_all("div", "figure")[0].words()
    assert "600 pairs, ten folds; best model, after step 40; deviation over the folds" in page.words()
    assert "83.00% to 85.00%" in page.words()
    known = facts(page)
    assert known["Backbone"] == "mini, embedding of 64"
    assert known["Training images"] == "500"
    assert known["Head"] == "cosface 0.4, scale 32"
    assert known["Sample rate"] == "0.1, 12 classes a step"
    assert known["Steps"] == "40 × 50 images"
    assert known["Images seen"] == "2,000, 4 epochs"
    assert known["Speed"] == "220 images/s"
    assert known["Time of the steps"] == "9 s"
    captions = [each.find_all("b")[0].text for each in page.find_all("figure")]
    assert (
        captions
        == [
            "Loss",
            "Target cosine",
            "Learning rate",
            "Gradient norm",
            "Accuracy on lfw",
            "Speed, images/s",
            "Waiting for data",
        ]
        * 2
    )  # by step, and by time
    assert len(page.find_all("tr")) == 5
    assert "global_batch_size: 50" in page.find_all("pre")[0].text


def test_the_curves_are_those_of_the_log(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run", LINES))
    trained = [line for line in LINES if line["kind"] == "train"]
    for name, key, tolerance in (
        ("Loss", "loss", 0.1),
        ("Learning rate", "lr", 6e-4),
        ("Target cosine", "target_cosine", 3e-3),
    ):
        expected = [(line["step"], line[key]) for line in trained]
        assert np.allclose(curve(figure(page, name)), expected, rtol=0, atol=[[0.02, tolerance]]), name
    norms = curve(figure(page, "Gradient norm"), log_y=True)
    assert np.allclose(norms[:, 1], [line["grad_norm"] for line in trained], rtol=0.01)
    accuracy = curve(figure(page, "Accuracy on lfw"))
    assert np.allclose(accuracy, [(10, 0.81), (20, 0.82), (30, 0.83), (40, 0.84)], atol=[[0.02, 2e-4]])


def test_conflicts_and_the_rate_of_the_head_are_shown_where_they_matter(tmp_path: Path) -> None:
    lines = [train_line(step, conflict_share=0.01 * step, lr_head=0.05) for step in (1, 2, 3)]
    page = report(write_run(tmp_path / "run", lines))
    assert np.allclose(curve(figure(page, "Share of conflicts"))[:, 1], [0.01, 0.02, 0.03], atol=1e-3)
    assert np.allclose(curve(figure(page, "Learning rate of the head"))[:, 1], 0.05, atol=1e-3)
    filtered = replace(TrainConfig(), head=HeadConfig(conflict_threshold=0.4, margin="arcface"))
    page = report(write_run(tmp_path / "filtered", [train_line(1)], filtered))
    assert figure(page, "Share of conflicts")
    assert facts(page)["Conflict threshold"] == "0.4"
    assert facts(page)["Head"] == "arcface 0.5, scale 64"


def test_counts_come_from_the_newest_readable_checkpoint(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [train_line(1)])
    rows = {"centers": torch.zeros(3, 2)}
    for step, images in ((1, 4321), (2, 9999)):
        counts = {"images": images, "classes": 1234, "image_size": 64}
        save_checkpoint(run / "checkpoints", Snapshot(step, {}, Shard.of(3), rows, {"data": counts}))
    (run / "checkpoints" / "step-00000002" / "manifest.json").write_text("{", encoding="utf-8")
    known = facts(report(run))
    assert known["Training images"] == "4,321"
    assert known["Identities"] == "1,234"
    assert known["Input"] == "64 × 64 pixels"
    (run / "checkpoints" / "step-00000001" / "manifest.json").unlink()
    assert facts(report(run))["Training images"] == "500"


@pytest.mark.parametrize(
    ("images_per_second", "words"), [(40.0, "50 s"), (4.0, "8 min"), (0.1, "5 h 33 min"), (-1.0, None)]
)
def test_durations_are_in_readable_units(tmp_path: Path, images_per_second: float, words: str | None) -> None:
    line = train_line(40, images_per_second=images_per_second)
    assert facts(report(write_run(tmp_path / "run", [line]))).get("Time of the steps") == words


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (None, "no step has been logged yet"),
        ([], "no step has been logged yet"),
        ([train_line(1)], "step 1 of 40 (2%), not finished"),
        ([evaluation_line(7)], "7 steps logged"),
        ([{"step": 3}], "no step has been logged yet"),
        ([{"kind": "train", "step": 3}], "3 steps logged"),
    ],
)
def test_a_run_that_has_written_little(tmp_path: Path, lines: list[dict[str, Any]] | None, words: str) -> None:
    page = report(write_run(tmp_path / "run", lines))
    assert words in page.words()
    if not any(line.get("kind") == "evaluation" for line in lines or []):
        assert "No benchmark has been run" in page.words()


def test_metrics_without_a_configuration_and_the_other_way_round(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", LINES)
    (run / "config.yaml").unlink()
    page = report(run)
    assert "40 steps logged" in page.words()
    assert "Backbone" not in facts(page)
    run = write_run(tmp_path / "other")
    (run / "config.yaml").write_text("data: [1, 2]\nhead: 7\n", encoding="utf-8")
    assert "Configuration" in report(run).words()


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", LINES)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "step": 41, "lo')
    assert "finished, 40 steps" in report(run).words()


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    odd: list[Any] = [math.nan, math.inf, HOSTILE, None, True, [1], 10**400, -1e308, 1e-320]
    lines = [train_line(1), *[train_line(step, loss=value) for step, value in enumerate(odd, start=2)]]
    lines += [
        {**train_line(9), "step": 10**400},
        train_line(20, skipped_steps=3, unreadable=2, images_per_second="fast"),
    ]
    page = report(write_run(tmp_path / "run", lines))
    drawn = curve(figure(page, "Loss"))
    assert np.allclose(drawn, [(1, 20), (10, 0), (20, 1)], atol=0.2)
    notes = page.find_all("ul", "notes")[0].words()
    assert "3 steps were skipped" in notes
    assert "2 records could not be read" in notes
    assert "loss of 8 logged steps is no finite number" in notes
    assert "Speed" not in facts(page)
    page = report(write_run(tmp_path / "never", [train_line(1, loss=math.nan)]))
    assert "Loss" not in [each.find_all("b")[0].text for each in page.find_all("figure")]


def test_a_repeated_evaluation_counts_once_and_the_best_step_is_the_headline(tmp_path: Path) -> None:
    lines = [
        evaluation_line(10, accuracy=0.91),
        evaluation_line(10, "agedb", accuracy=0.7),
        evaluation_line(20, accuracy=0.93, accuracy_std=math.nan, pairs=None),
        evaluation_line(20, "agedb", accuracy=0.6),
        evaluation_line(20, "agedb", accuracy=0.61),
        evaluation_line(30, accuracy="good"),
    ]
    page = report(write_run(tmp_path / "run", lines))
    assert [each.words().split()[0] for each in page.find_all("div", "figure")] == ["91.00%", "70.00%"]
    assert len(page.find_all("tr")) == 5
    assert "model on agedb" in page.find_all("div", "bars")[0].words()


def test_names_from_files_are_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "<img src=x onerror=y>", [train_line(1), evaluation_line(1, HOSTILE)])
    with (run / "config.yaml").open("a", encoding="utf-8") as file:
        file.write("# " + HOSTILE)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "evaluation", "step": 2, "benchmark": "half \\ud800 a letter", "accuracy": 0.5}\n')
    example = ExampleBenchmark()
    options: dict[str, Any] = {
        "results": {HOSTILE: example.result()},
        "pictures": {HOSTILE: example},
        "baselines": {HOSTILE: 0.6},
    }
    page = report(run, title=HOSTILE, notes=[HOSTILE], **options)
    assert not [image for image in page.find_all("img") if "onerror" in image.attributes]
    assert page.find_all("h1")[0].text == HOSTILE
    assert page.find_all("li")[0].text == HOSTILE
    assert HOSTILE in page.find_all("h2")[-2].text
    assert HOSTILE in page.find_all("pre")[0].text
    assert all("onload" not in element.attributes for element in page.find_all("svg"))


def test_results_are_the_headline_with_baselines_beside_them(tmp_path: Path) -> None:
    example, baselines = ExampleBenchmark(), {"raw pixels": 0.55, "colours": 0.57, "broken": math.nan}
    result = example.result()
    accuracy = result.figures["accuracy"]
    assert accuracy.value is not None
    page = report(
        write_run(tmp_path / "run", LINES),
        out=tmp_path / "deeper" / "page.html",
        results={"pairs": result},
        pictures={"pairs": example},
        baselines=baselines,
        notes=["The faces are drawings."],
    )
    assert (tmp_path / "deeper" / "page.html").is_file()
    tiles = page.find_all("div", "figure")
    assert f"{accuracy.value:.2%} {accuracy.low:.2%} to {accuracy.high:.2%}" in tiles[0].words()
    assert "guessing gives 50%" in page.words()
    assert len(tiles) == 2  # that of the log too, for a benchmark that was not evaluated again
    rows = page.find_all("section", "headline")[0].find_all("div", "row")
    assert [row.find_all("span")[0].text for row in rows] == ["model on pairs", "model on lfw", "raw pixels", "colours"]
    widths = [row.find_all("span", "fill")[0].attributes["style"] for row in rows]
    assert widths == [f"width:{200 * (value - 0.5):.2f}%" for value in (accuracy.value, 0.84, 0.55, 0.57)]
    first = page.find_all("body")[0].find_all("p")[0]
    assert "shows pictures of faces" in first.text
    assert len(page.find_all("img")) == 24
    without = report(tmp_path / "run", results={"pairs": result})
    assert not without.find_all("img")
    assert "pictures of faces" not in without.words()
    assert "Hardest pairs of pairs" in without.words()


def test_a_baseline_below_guessing_moves_the_origin(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run", LINES), baselines={"unlucky": 0.4})
    assert [row.find_all("span", "fill")[0].attributes["style"] for row in page.find_all("div", "row")] == [
        "width:84.00%",
        "width:40.00%",
    ]


def test_the_hardest_pairs_are_shown_hardest_first(tmp_path: Path) -> None:
    example = ExampleBenchmark()
    result = example.result()
    scores = result.scores[""]
    page = report(write_run(tmp_path / "run", LINES), results={"lfw": result}, pictures={"lfw": example})
    impostors, genuine = page.find_all("div", "faces")
    assert [f"cosine {score:.3f}" in impostors.words() for score in np.sort(scores.impostor)[-6:]] == [True] * 6
    assert f"cosine {scores.impostor.max():.3f}, " in impostors.find_all("figure")[0].words()
    assert "wrongly accepted" in impostors.find_all("figure")[0].words()
    assert f"cosine {scores.genuine.min():.3f}, " in genuine.find_all("figure")[0].words()
    source = impostors.find_all("img")[0].attributes["src"]
    assert scores.impostor_rows is not None
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
        assert image.size == (16, 16)
        difference = np.asarray(image).astype(int) - example.image(scores.impostor_rows[scores.impostor.argmax(), 0])
    assert abs(difference).max() < 16  # JPEG


def test_a_benchmark_has_its_charts_and_its_groups(tmp_path: Path) -> None:
    result = ExampleBenchmark().result()
    page = report(write_run(tmp_path / "run", LINES), results={"pairs": result})
    names = {each.find_all("b")[0].text for each in page.find_all("figure")}
    assert {"Scores", "True accept rate (ROC)", "Errors (DET)", "Calibration", "Quality"} < names
    roc = figure(page, "True accept rate (ROC)")
    drawn = curve(roc, log_x=True)
    points = result.facts["curves"]["roc"]
    assert np.allclose(drawn, np.stack([points["far"], points["tar"]], axis=1), rtol=0.02, atol=0.002)
    band = to_values(roc, roc.find_all("path", "band")[0].attributes["d"], log_x=True)
    assert np.allclose(band[:, 1], [*points["high"], *points["low"][::-1]], atol=0.002)
    groups = next(each for each in page.find_all("table") if each.find_all("caption")[0].text == "Groups of pairs")
    assert [row.find_all("th")[0].text for row in groups.find_all("tr")[1:]] == ["odd", "even"]
    assert f"{100 * (result.figures['odd/fnmr'].value or 0):.2f}%" in groups.words()
    tables = {each.find_all("caption")[0].text: each for each in page.find_all("table")}
    link = page.find_all("a")[list(tables).index("Groups of pairs")]
    assert [row[0] for row in csv_rows(link)] == ["group", "odd", "even"]


def test_large_pictures_become_small() -> None:
    source = data_uri(np.zeros((300, 200, 3), np.uint8))
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
        assert image.size == (75, 112)


def test_the_page_is_the_same_each_time(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", LINES)
    first = write_report(read_subjects([run])).read_bytes()
    assert write_report(read_subjects([run])).read_bytes() == first
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "metrics.jsonl", "report.html"]


def test_files_that_are_no_report_are_not_overwritten(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", LINES)
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(InputError, match="is no report"):
        write_report(read_subjects([run]), out=run / "config.yaml")
    assert (run / "config.yaml").read_bytes() == before
    with pytest.raises(InputError, match="Cannot write"):
        write_report(read_subjects([run]), out=run / "config.yaml" / "report.html")
    (tmp_path / "out" / "report.html").mkdir(parents=True)
    with pytest.raises(InputError, match="is a folder"):
        write_report(read_subjects([run]), out=tmp_path / "out")


def test_pictures_of_other_pairs_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", LINES)
    example = ExampleBenchmark()
    with pytest.raises(InputError, match="pictures for agedb but no result"):
        report(run, results={"lfw": example.result()}, pictures={"agedb": example})
    with pytest.raises(InputError, match="pictures given for lfw are not those"):
        report(run, results={"lfw": example.result()}, pictures={"lfw": ExampleBenchmark(100)})
    assert not (run / "report.html").exists()


def test_skipped_steps_are_marked_and_listed(tmp_path: Path) -> None:
    skip = {"kind": "skipped_step", "step": 20, "where": "gradient", "samples": ["a/1.jpg", HOSTILE]}
    page = report(write_run(tmp_path / "run", [*LINES, skip]))
    loss = figure(page, "Loss")
    [mark] = loss.find_all("path", "mark")
    assert to_values(loss, mark.attributes["d"].replace("v-8", ""))[0, 0] == pytest.approx(20, abs=0.1)
    assert "1 steps were skipped" not in page.words()
    assert "A step was skipped" in page.words()
    [listed] = [each for each in page.find_all("table") if "Skipped steps" in each.words()]
    assert [cell.text for cell in listed.find_all("td")] == ["gradient", f"a/1.jpg, {HOSTILE}"]


def test_curves_by_time_are_those_of_the_speeds(tmp_path: Path) -> None:
    lines = [train_line(step, images_per_second=50 / seconds) for step, seconds in ((1, 60), (2, 120), (3, 60))]
    page = report(write_run(tmp_path / "run", lines))
    by_time = page.find_all("div", "by-time")[0]
    assert np.allclose(curve(figure(by_time, "Loss"))[:, 0], [1, 3, 4], atol=0.02)
    assert "minutes of training steps" in by_time.words()
    silent = report(write_run(tmp_path / "silent", [train_line(1, images_per_second=None)]))
    assert not silent.find_all("div", "by-time")
    assert not silent.find_all("input")


def test_where_and_how_a_run_was_made_is_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", LINES)
    with MetricsLog(run / "starts.jsonl") as log:
        for step in (0, 20, 30):
            start = {"step": step, "date": f"2026-11-0{step // 10 + 1}T10:00:00+00:00", "command": HOSTILE}
            log.write({**start, "cpu": "a processor", "cores": 8, "processes": 4, "partialfc": "0.1"})
    known = facts(report(run))
    assert known["Started"] == "2026-11-01 10:00:00 UTC"
    assert known["Continued"] == "2 times, after step 20, 30"
    assert known["Command"] == HOSTILE
    assert known["Trained on"] == "a processor, 8 cores, 4 processes"
