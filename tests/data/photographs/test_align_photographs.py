"""A folder like that of a phone: every file is accounted for, and what is made is a training set."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from marked_photographs import DiscDetector, centers, photograph, placed
from page_reader import read_page
from PIL import Image

from partialfc.core.errors import InputError
from partialfc.data.align import TEMPLATE
from partialfc.data.images import decode_image
from partialfc.data.photographs.align import LANDMARKS, LEFT_OUT, SHEET, align_photographs
from partialfc.data.photographs.face import Face, Pixels
from partialfc.data.photographs.landmarks import read_landmarks
from partialfc.data.sources import open_source

TURNS = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


def save(image: Pixels, path: Path, orientation: int = 1) -> None:
    """Write a photograph as a camera that was held in another way does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(image)
    (stored.transpose(TURNS[orientation]) if orientation in TURNS else stored).save(path, exif=exif)


@pytest.fixture(scope="module")
def phone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    plain = photograph(400, 300, placed(1.5, 15, (100, 140)))
    for orientation in (1, 3, 6, 8):
        save(plain, root / "anna" / f"IMG_{orientation}.png", orientation)
    save(plain, root / "anna/IMG_1.webp")
    save(photograph(500, 300, placed(1, 0, (120, 140)), placed(1.5, -20, (370, 150))), root / "ben/two.png")
    save(photograph(400, 300), root / "ben/Screenshot.png")
    (root / "misc/.hidden.jpg").parent.mkdir()
    (root / "misc/.hidden.jpg").touch()
    (root / "misc/broken.png").write_bytes((root / "anna/IMG_1.png").read_bytes()[:-200])
    (root / "misc/IMG.HEIC").write_bytes(b"\0\0\0\x24ftypheic" + bytes(99))
    (root / "misc/notes.txt").write_text("no photograph")
    os.mkfifo(root / "misc/pipe.jpg")
    (root / "misc/dead.jpg").symlink_to("nowhere")
    return root


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / LANDMARKS).read_text().splitlines()]


@pytest.fixture(scope="module")
def crops(phone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("aligned") / "crops"
    return out, align_photographs(phone, out, DiscDetector())


def test_every_file_is_accounted_for(phone: Path, crops: tuple[Path, dict[str, Any]]) -> None:
    out, facts = crops
    assert facts == {
        "out": str(out), "photographs": 13, "crops": 6, "several_faces": 1, "left_out": 7,
        "reasons": {"unreadable": 5, "no face found": 1, "hidden file": 1}, **DiscDetector.facts,
    }  # fmt: skip
    header, *lines = records(out)
    assert header["schema_version"] == 1
    assert header["finder"] == DiscDetector.facts
    files = sorted(str(path.relative_to(phone)) for path in phone.rglob("*") if not path.is_dir())
    assert [line["photograph"] for line in lines] == files
    left_out = {row["photograph"]: row["reason"] for row in csv.DictReader((out / LEFT_OUT).read_text().splitlines())}
    assert left_out == {line["photograph"]: line["left_out"] for line in lines if not line.get("faces")}
    assert left_out["misc/IMG.HEIC"].endswith("convert it to JPEG")
    page = read_page((out / SHEET).read_text(encoding="utf-8"))
    assert len(page.find_all("img")) == 6
    assert all(name in page.words() for name in left_out)


def test_the_crops_are_a_training_set_of_upright_faces(crops: tuple[Path, dict[str, Any]]) -> None:
    source = open_source(crops[0])
    assert source.identities == ["anna", "ben"]
    names = [source.name(index).removeprefix(f"{crops[0]}/") for index in range(len(source))]
    anna = ["IMG_1.png.jpg", "IMG_1.webp.jpg", "IMG_3.jpg", "IMG_6.jpg", "IMG_8.jpg"]
    assert names == [*(f"anna/{name}" for name in anna), "ben/two.jpg"]
    for index in range(len(source)):
        crop = decode_image(source.read(index).encoded)
        assert crop.shape == (112, 112, 3)
        assert np.abs(centers(crop) - TEMPLATE.numpy()).max() < 1.5


def test_of_several_faces_the_largest_or_all(phone: Path, tmp_path: Path) -> None:
    align_photographs(phone / "ben", tmp_path / "one", DiscDetector())
    [largest] = records(tmp_path / "one")[2]["faces"]
    assert largest["points"][0][0] > 250
    facts = align_photographs(phone / "ben", tmp_path / "all", DiscDetector(), every_face=True)
    assert facts["crops"] == 2
    faces = records(tmp_path / "all")[2]["faces"]
    assert [face["crop"] for face in faces] == ["two-1.jpg", "two-2.jpg"]
    assert faces[0] == {**largest, "crop": "two-1.jpg"}


def test_the_record_gives_the_same_crops_again(phone: Path, crops: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    facts = align_photographs(phone, tmp_path / "again", read_landmarks(crops[0] / LANDMARKS))
    assert facts["crops"] == 6
    assert facts["reasons"]["no landmarks in landmarks.jsonl"] == 1
    for path in crops[0].rglob("*.jpg"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(crops[0])).read_bytes()


class Interrupted(DiscDetector):
    def __call__(self, image: Pixels) -> list[Face]:
        if self.calls == 11:
            raise KeyboardInterrupt
        return super().__call__(image)


def test_an_interrupted_call_goes_on(tmp_path: Path) -> None:
    for number in range(20):
        save(photograph(200, 150, placed(0.8, number, (50, 70))), tmp_path / f"in/a/{number:02}.png")
    align_photographs(tmp_path / "in", tmp_path / "whole", DiscDetector())
    with pytest.raises(KeyboardInterrupt):
        align_photographs(tmp_path / "in", tmp_path / "crops", Interrupted())
    assert not (tmp_path / "crops").exists()
    with pytest.raises(InputError, match="is what another call, or one for other photographs, has left"):
        align_photographs(tmp_path / "in", tmp_path / "crops", DiscDetector(), every_face=True)
    with (tmp_path / ".crops.writing" / LANDMARKS).open("a") as file:
        file.write('{"photograph": "cut o')
    detector = DiscDetector()
    align_photographs(tmp_path / "in", tmp_path / "crops", detector)
    assert detector.calls == 12  # eight were recorded
    for path in (tmp_path / "whole").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "crops" / path.relative_to(tmp_path / "whole")).read_bytes()


def test_landmarks_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    points = placed(1.5, 5, (200, 150))
    mirrored = points[[1, 0, 2, 4, 3]]
    for number in range(4):
        save(photograph(400, 300, points), tmp_path / f"in/{number}.png")
    lines = [f"{number}.png {' '.join(map(str, (points if number else mirrored).reshape(-1)))}" for number in range(3)]
    (tmp_path / "points.txt").write_text("\n".join(lines))
    facts = align_photographs(tmp_path / "in", tmp_path / "out", read_landmarks(tmp_path / "points.txt"))
    assert facts["reasons"] == {"landmarks whose left and right are exchanged": 1, "no landmarks in points.txt": 1}
    assert [path.name for path in sorted((tmp_path / "out").glob("*.jpg"))] == ["1.jpg", "2.jpg"]


def test_points_that_show_no_face_are_left_out_with_their_reason(tmp_path: Path) -> None:
    points = placed(1.5, 5, (200, 150))
    long = f"{'n' * 249}.png"
    lines = [f"{long} {' '.join(map(str, points.reshape(-1)))}"]
    for number, own in enumerate((points, np.zeros((5, 2)), points + 1000)):
        lines.append(f"{number}.png {' '.join(map(str, own.reshape(-1)))}")
    for line in lines:
        save(photograph(400, 300, points), tmp_path / "in" / line.split()[0])
    (tmp_path / "points.txt").write_text("\n".join(lines))
    facts = align_photographs(tmp_path / "in", tmp_path / "out", read_landmarks(tmp_path / "points.txt"))
    assert facts["crops"] == 1
    reasons = {"a name that is too long", "landmarks that coincide", "landmarks outside the photograph"}
    assert facts["reasons"] == dict.fromkeys(reasons, 1)
    (tmp_path / "points.txt").write_text(f"0.png {' '.join(map(str, (points / 400).reshape(-1)))}")
    with pytest.raises(InputError, match=r"All numbers of .*points\.txt are fractions"):
        read_landmarks(tmp_path / "points.txt")


def test_points_that_were_corrected_are_not_mixed_with_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = placed(1.5, 5, (200, 150))
    for number in range(20):
        save(photograph(400, 300, points), tmp_path / f"in/{number:02}.png")
    file = tmp_path / "points.txt"

    def landmarks(shift: float) -> Any:
        lines = [f"{number:02}.png {' '.join(map(str, (points + shift).reshape(-1)))}" for number in range(20)]
        file.write_text("\n".join(lines))
        return read_landmarks(file)

    with monkeypatch.context() as patch:
        patch.setattr("partialfc.data.photographs.align._summarise", lambda work: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            align_photographs(tmp_path / "in", tmp_path / "out", landmarks(0))
    with pytest.raises(InputError, match="is what another call, or one for other photographs, has left"):
        align_photographs(tmp_path / "in", tmp_path / "out", landmarks(3))
    assert align_photographs(tmp_path / "in", tmp_path / "out", landmarks(0))["crops"] == 20


@pytest.mark.parametrize("width", [96, 112])
def test_landmarks_of_crops_belong_to_crops(tmp_path: Path, width: int) -> None:
    points = TEMPLATE.numpy() - ((112 - width) / 2, 0)
    save(photograph(width, 112, points), tmp_path / "in/crop.png")
    save(photograph(400, 300), tmp_path / "in/photograph.png")
    lines = [f"{name} {' '.join(map(str, points.reshape(-1)))}" for name in ("crop.png", "photograph.png")]
    (tmp_path / "points.txt").write_text("\n".join(lines))
    align_photographs(tmp_path / "in", tmp_path / "out", read_landmarks(tmp_path / "points.txt"))
    assert "landmarks of an aligned crop" in records(tmp_path / "out")[2]["left_out"]
    assert np.abs(centers(decode_image((tmp_path / "out/crop.jpg").read_bytes())) - TEMPLATE.numpy()).max() < 1


def test_what_gives_nothing_is_an_error(phone: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"No file of .* gives a crop \(5 × unreadable; 1 × hidden file\), such as \.h"
    ):
        align_photographs(phone / "misc", tmp_path / "crops", DiscDetector())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="exists already"):
        align_photographs(phone, tmp_path, DiscDetector())
    with pytest.raises(InputError, match="whose files are to be aligned"):
        align_photographs(phone, phone / "crops", DiscDetector())
