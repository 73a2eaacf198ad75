"""Two pictures and a decision: what it says, and what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import complaint, run
from marked_photographs import DiscDetector, photograph, placed
from PIL import Image
from trained_models import DRAWINGS, noise, write_model

from partialfc import InputError, load_model
from partialfc.data.align import scaled_template
from partialfc.data.images import encode_png
from partialfc.data.photographs.face import Face
from partialfc.use.pictures import crop_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        (folder / f"{number}.png").write_bytes(encode_png(noise(number)))
    (folder / "large.png").write_bytes(encode_png(noise(0, size=40)))
    (folder / "text.jpg").write_text("no image")
    os.mkfifo(folder / "pipe.jpg")
    return folder


def test_a_decision_and_its_exit_status(capsys: pytest.CaptureFixture[str], model: Path, pictures: Path) -> None:
    assert run("verify", model, pictures / "0.png", pictures / "0.png") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "the same person: cosine 1.0000"
    measured = "(measured 0.0009, 95 % from 0.0005 to 0.0014, on lfw, 3,000 impostor pairs)"
    assert out[1:] == [
        f"threshold 0.9000 for FMR 1e-3 {measured}",
        "probability 88.08% that they are the same, if it was 50 % beforehand",
    ]
    assert run("verify", model, pictures / "0.png", pictures / "1.png", "--json") == 1
    answer = json.loads(capsys.readouterr().out)
    assert not answer["same"]
    assert answer["score"] < 0.9 == answer["threshold"]["cosine"]
    assert answer["threshold"]["fmr"] == {"value": 0.0009, "low": 0.0005, "high": 0.0014}


def test_a_crash_is_no_decision(
    capsys: pytest.CaptureFixture[str], model: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("partialfc.cli.verify.load_model", crash)
    assert run("verify", model, pictures / "0.png", pictures / "1.png") == 2  # Python's own 1 would say "different"
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_the_score_is_that_of_python(model: Path, pictures: Path) -> None:
    loaded = load_model(model)
    left, right = loaded.embed([pictures / "0.png", noise(1)]).double()
    expected = float(torch.nn.functional.cosine_similarity(left, right, dim=0))
    assert loaded.verify(pictures / "0.png", noise(1)).score == pytest.approx(expected, abs=1e-6)
    assert torch.equal(loaded.embed(np.stack([noise(1)])), loaded.embed([noise(1)]))


def test_the_aligned_pair_as_a_picture(
    capsys: pytest.CaptureFixture[str], model: Path, pictures: Path, tmp_path: Path
) -> None:
    arguments = ("verify", model, pictures / "0.png", pictures / "1.png", "--picture")
    assert run(*arguments, tmp_path / "pair.png") == 1
    pair = np.asarray(Image.open(tmp_path / "pair.png"))
    np.testing.assert_array_equal(pair, np.concatenate([noise(0), noise(1)], axis=1))
    capsys.readouterr()
    assert "pair.png exists already" in complaint(capsys, *arguments, tmp_path / "pair.png")
    assert "written as .png or .jpg" in complaint(capsys, *arguments, tmp_path / "pair.gif")
    assert "There is no folder" in complaint(capsys, *arguments, tmp_path / "none" / "pair.png")
    assert "too long" in complaint(capsys, *arguments, tmp_path / f"{'a' * 300}.png")


def test_pictures_that_cannot_be_used(
    capsys: pytest.CaptureFixture[str], model: Path, pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "huge.ppm").write_bytes(b"P6 40000 40000 255\n")
    wrong = {
        pictures / "none.png": "There is no",
        pictures / "text.jpg": "no image that Pillow knows",
        pictures / "pipe.jpg": "no regular file",
        pictures: "no regular file",
        "https://example.org/a.jpg": "nothing is fetched from the network",
        tmp_path / "huge.ppm": "1600000000 pixels",
        pictures / "large.png": "40 × 40 pixels, which is no aligned crop",
    }
    for path, sentence in wrong.items():
        assert sentence in complaint(capsys, "verify", model, pictures / "0.png", path), path


def test_thresholds_that_do_not_fit(
    capsys: pytest.CaptureFixture[str], model: Path, pictures: Path, tmp_path: Path
) -> None:
    pair = (pictures / "0.png", pictures / "1.png")
    other = write_model(tmp_path / "other", flip=False)
    foreign = complaint(capsys, "verify", model, *pair, "--thresholds", other / "thresholds.json")
    assert "measured with another model" in foreign
    content = json.loads((model / "thresholds.json").read_text()) | {"schema_version": 9}
    (tmp_path / "newer.json").write_text(json.dumps(content))
    newer = complaint(capsys, "verify", model, *pair, "--thresholds", tmp_path / "newer.json")
    assert "schema_version 9" in newer
    assert "for FMR 1e-3" in complaint(capsys, "verify", model, *pair, "--fmr", 0.5)
    assert "could not resolve FMR 1e-6" in complaint(capsys, "verify", model, *pair, "--fmr", 1e-6)
    (other / "thresholds.json").unlink()
    assert "--write-thresholds" in complaint(capsys, "verify", other, *pair)


def test_a_model_of_drawings_decides_nothing_about_photographs(
    capsys: pytest.CaptureFixture[str], pictures: Path, tmp_path: Path
) -> None:
    drawn = write_model(tmp_path / "drawn", trained_on=DRAWINGS)
    pair = (pictures / "0.png", pictures / "0.png")
    assert "procedural faces alone" in complaint(capsys, "verify", drawn, *pair)
    assert run("verify", drawn, *pair, "--force") == 0
    # Drawings are known by the description of their set.
    shots = tmp_path / "faces" / "17"
    shots.mkdir(parents=True)
    (shots / "0.png").write_bytes(encode_png(noise(0)))
    (shots.parent / "faces.json").write_text('{"schema_version": 1, "content": "procedural faces: drawings"}')
    assert run("verify", drawn, shots / "0.png", shots / "0.png") == 0
    with pytest.raises(InputError, match="procedural faces alone"):
        load_model(drawn).verify(shots / "0.png", noise(0))


def test_a_detector_finds_one_face_or_it_is_said() -> None:
    photograph = np.zeros((60, 90, 3), np.uint8)
    photograph[20:36, 30:46] = noise(5)
    points = scaled_template(16).numpy() + np.array([30, 20])
    face = Face(np.array([30.0, 20, 46, 36]), points, 0.99)
    np.testing.assert_array_equal(crop_of(photograph, 16, lambda _: [face]), noise(5))
    for faces, sentence in (([], "No face was"), ([face] * 3, "3 faces were")):
        with pytest.raises(InputError, match=sentence):
            crop_of(photograph, 16, lambda _, faces=faces: faces)  # type: ignore[misc]


def test_photographs_are_turned_upright_for_a_detector(model: Path, tmp_path: Path) -> None:
    image = Image.fromarray(photograph(300, 200, placed(1.2, 10, (75, 90))))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png")
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png", exif=exif)
    loaded = load_model(model)
    answer = loaded.verify(tmp_path / "a.png", tmp_path / "b.png", faces_in=DiscDetector())
    assert answer.is_same
    np.testing.assert_array_equal(answer.crops[0], answer.crops[1])
    vectors = loaded.embed([tmp_path / "a.png", answer.crops[0]], faces_in=DiscDetector())
    assert torch.equal(vectors[0], vectors[1])


def test_a_crop_of_112_pixels_is_brought_to_the_size_of_the_model() -> None:
    crop = crop_of(noise(3, size=112), 16)
    assert crop.shape == (16, 16, 3)
    assert np.abs(crop.astype(int) - noise(3)).mean() < 30
    with pytest.raises(InputError, match="red first"):
        crop_of(np.zeros((16, 16), np.uint8), 16)
