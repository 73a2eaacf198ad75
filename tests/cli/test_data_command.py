"""`partialfc data` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import IM2REC, INSIGHTFACE, QUICK, complaint, run
from PIL import Image


def test_inspect_gives_the_same_facts_for_all_layouts(capsys: pytest.CaptureFixture[str], folder_of_pngs: Path) -> None:
    facts: list[dict[str, Any]] = []
    for path in (INSIGHTFACE, IM2REC, folder_of_pngs):
        assert run("data", "inspect", path, "--json") == 0
        facts.append(json.loads(capsys.readouterr().out))
    keys = ("images", "classes", "unreadable", "min_per_class", "max_per_class", "sha256_of_decoded")
    assert len({json.dumps([fact[key] for key in keys]) for fact in facts}) == 1
    assert facts[0]["images"] == 48
    assert len({fact["format"] for fact in facts}) >= 2


def test_inspect_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data", "inspect", INSIGHTFACE) == 0
    assert "classes" in capsys.readouterr().out


def test_data_faces_writes_real_formats(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "faces"
    options = ["--identities=6", "--shots=3", "--pairs=20", "--pair_identities=8", "--image_size=32"]
    assert run("data", "faces", "--out", out, *options, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["images"] == 18
    assert run("data", "inspect", out / "train", "--json") == 0
    inspected = json.loads(capsys.readouterr().out)
    assert (inspected["images"], inspected["classes"], inspected["unreadable"]) == (18, 6, 0)
    assert "exists" in complaint(capsys, "data", "faces", "--out", out, *options)
    assert run("train", "--data.path", out / "train", *QUICK, "--out", tmp_path / "run", "--json") == 0


def test_pairs_replace_nothing_and_hold_images_that_can_be_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "pairs.bin"
    arguments = ("data", "pairs", IM2REC, "--pairs", 20, "--out", out)
    assert run(*arguments, "--seed", -1) == 0
    capsys.readouterr()
    assert "exists already" in complaint(capsys, *arguments)
    for number in range(4):
        (tmp_path / "set" / str(number // 2)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / str(number // 2) / f"{number}.png").write_bytes(b"\x89PNG but no more")
    said = complaint(capsys, "data", "pairs", tmp_path / "set", "--pairs", 2, "--out", tmp_path / "broken.bin")
    assert "repair the image, or remove it" in said


def test_numbers_of_persons_are_no_labels(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.lst").write_text("0\t20210901123456\ta.png\n")
    said = complaint(capsys, "data", "inspect", tmp_path / "a.lst")
    assert "has 1 images, but labels up to 20,210,901,123,456: number the identities without gaps" in said


def test_convert(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("data", "convert", IM2REC, "--out", tmp_path / "shards", "--to", "webdataset", "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["images"] == 48
    assert (tmp_path / "shards" / "train-000000.tar").is_file()
    line = complaint(capsys, "data", "convert", IM2REC, "--out", tmp_path / "shards", "--to", "parquet")
    assert line.endswith("shards exists already: remove it, or write somewhere else.")
    assert run("data", "inspect", tmp_path / "shards") == 0
    assert "webdataset" in capsys.readouterr().out
    assert "'zip' is not one of recordio" in complaint(
        capsys, "data", "convert", IM2REC, "--out", tmp_path / "x", "--to", "zip"
    )


def test_corrupt_and_inspect_through_the_overlay(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("data", "corrupt", IM2REC, "--out", tmp_path / "out", "--kind", "conflict", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["classes"], summary["identities"]) == (14, 3)
    overlay, page, sheet = tmp_path / "out" / "data.overlay", tmp_path / "page.html", tmp_path / "sheet.png"
    assert run("data", "inspect", IM2REC, "--augmented", sheet, "--json") == 0
    capsys.readouterr()
    with Image.open(sheet) as image:
        assert image.size == (10 * 112, 10 * 112)
    for option, place, words in (
        ("--augmented", "x", "ends in .jpg or .png"),
        ("--augmented", "none/x.png", "There is no folder"),
        ("--page", "none/x.html", "There is no folder"),
    ):
        assert words in complaint(capsys, "data", "inspect", IM2REC, option, tmp_path / place, "--json")
    assert run("data", "inspect", IM2REC, "--overlay", overlay, "--page", page, "--no-pictures", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["images"], facts["classes"], facts["min_per_class"]) == (48, 14, 2)
    assert "<img" not in page.read_text()
    refusal = complaint(capsys, "data", "inspect", INSIGHTFACE, "--overlay", overlay, "--json")
    assert "was made for a set of 48 images" in refusal
    assert run("train", "--data.path", IM2REC, "--data.overlay", overlay, *QUICK, "--out", tmp_path / "run") == 0
