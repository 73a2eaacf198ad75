"""`partialfc align`: what it prints, and one sentence for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import complaint, run
from marked_photographs import photograph, placed
from PIL import Image

POINTS = placed(1.5, 10, (100, 120))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a photograph of `anna`, and its points."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in/anna").mkdir(parents=True)
    Image.fromarray(photograph(220, 240, POINTS)).save("in/anna/1.png")
    Path("points.txt").write_text(f"anna/1.png {' '.join(map(str, POINTS.reshape(-1)))}\n")
    return tmp_path


def test_it_prints_json_and_nothing_else(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("align", "in", "--out", "out", "--landmarks", "points.txt", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["photographs"], facts["crops"], facts["left_out"]) == (1, 1, 0)
    assert run("data", "inspect", "out", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["images"], facts["classes"], facts["sizes"]) == (1, 1, {"112 x 112": 1})


def test_it_prints_what_became_of_the_files(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("in/anna/2.jpg").write_bytes(b"no image")
    assert run("align", "in", "--out", "out", "--landmarks", "points.txt", "--faces", "all") == 0
    printed = capsys.readouterr().out
    assert "unreadable: 1" in printed
    assert Path("out/anna/1-1.jpg").is_file()


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("in --out out", "Give either --detector, such as mtcnn, or --landmarks FILE."),
        ("in --out out --detector mtcnn --landmarks points.txt", "Give either --detector"),
        ("in --out out --detector retina=x", "There is no detector 'retina': give mtcnn, mtcnn=FOLDER or yunet=FILE."),
        ("in --out out --detector mtcnn=nowhere", "There is no file nowhere/pnet.pt: MTCNN needs"),
        ("in --out out --detector mtcnn --min-face 2", "--min-face is 2: give at least 12 pixels."),
        ("in --out out --detector mtcnn --min-score 7", "--min-score is 7: give a number from 0 to 1."),
        ("in --out out --landmarks nowhere", "Cannot read --landmarks nowhere: No such file or directory."),
        ("in --out in --landmarks points.txt", "in exists already: remove it, or write somewhere else."),
        ("in --out in/out --landmarks points.txt", "in/out lies in in, whose files are to be aligned:"),
        (
            "https://example.org/a.jpg --out out --landmarks points.txt",
            "https://example.org/a.jpg is an address, and nothing is fetched",
        ),
        ("nowhere --out out --landmarks points.txt", "There is no nowhere: give a folder of photographs."),
        (
            "huge.ppm --out out --landmarks points.txt",
            "gives a crop (1 × unreadable), such as huge.ppm, unreadable: Image size (1600000000 pixels) exceeds",
        ),
    ],
)
def test_mistakes(place: Path, capsys: pytest.CaptureFixture[str], command: str, sentence: str) -> None:
    (place / "huge.ppm").write_bytes(b"P6 40000 40000 255\n")
    assert sentence in complaint(capsys, "align", *command.split())
    assert not (place / "out").exists()
    assert np.asarray(Image.open("in/anna/1.png")).shape == (240, 220, 3)
