"""Points of others, in every order and form; what cannot be told is refused, and nothing is mirrored."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from marked_photographs import placed

from partialfc.core.errors import InputError
from partialfc.data.align import MIRRORED, TEMPLATE
from partialfc.data.photographs.landmarks import is_mirrored, read_landmarks, residual

FACES = [
    placed(1 + number / 5, 12 * (number - 3), (200, 150 + number))
    + np.random.default_rng(number).normal(0, 1.5, (5, 2)) * (1 + number / 5)
    for number in range(7)
]


def write(path: Path, faces: Sequence[np.ndarray], separator: str = " ", header: str = "", score: str = "") -> Path:
    lines = [separator.join([f"a/{number}.jpg", *map(str, face.reshape(-1)), *([score] * bool(score))])
             for number, face in enumerate(faces)]  # fmt: skip
    path.write_text(header + "\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("order", [*itertools.permutations(range(5))][::13])
@pytest.mark.parametrize("x_first", [False, True])
def test_every_order_is_recognised(tmp_path: Path, order: tuple[int, ...], x_first: bool) -> None:
    stored = [face[list(order)].T if x_first else face[list(order)] for face in FACES]
    found = read_landmarks(write(tmp_path / "points.txt", stored))
    assert np.allclose(found.points, FACES)
    assert ("all x before all y" in found.reading) == x_first
    assert found.reading.split(", ")[order.index(0)].startswith("image-left eye")


@pytest.mark.parametrize(
    ("separator", "header", "score"),
    [
        (" ", "", "0.75"),
        (",", "NAME_ID,P1X,P1Y,P2X,P2Y,P3X,P3Y,P4X,P4Y,P5X,P5Y\n", ""),
        ("  ", "7\nlefteye_x lefteye_y righteye_x righteye_y nose_x nose_y x y x y\n", ""),
    ],
)
def test_the_usual_files_are_read(tmp_path: Path, separator: str, header: str, score: str) -> None:
    found = read_landmarks(write(tmp_path / "points.txt", FACES, separator, header, score))
    assert np.allclose(found.points, FACES)
    face = found.of("a/2.jpg")[0]
    assert np.allclose(face.points, FACES[2])
    assert face.score == float(score or 1)
    assert found.of("a/9.jpg") == []


def test_names_without_a_suffix_and_with_spaces(tmp_path: Path) -> None:
    path = write(tmp_path / "points.txt", FACES)
    path.write_text(path.read_text().replace("a/3.jpg", '"my photo"').replace("a/4.jpg", "my photo"), encoding="utf-8")
    assert len(read_landmarks(path).of("my photo.png")) == 2


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_faces_that_lie_or_stand_on_their_heads_are_refused(tmp_path: Path, degrees: float) -> None:
    lying = [placed(2, degrees + number, (200, 200)) for number in range(7)]
    with pytest.raises(InputError, match=r"order that cannot be told from their shape .as they stand, the faces are"):
        read_landmarks(write(tmp_path / "points.txt", lying))


def test_points_without_a_face_are_refused(tmp_path: Path) -> None:
    random = list(np.random.default_rng(0).uniform(0, 200, (50, 5, 2)))
    with pytest.raises(InputError, match="order that cannot be told"):
        read_landmarks(write(tmp_path / "points.txt", random))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no face: its lines must be “name x1 y1"),
        ("a.jpg 1 2 3 4\n" * 5, "Line 3 of .* is “a.jpg 1 2 3 4”, but must be"),
        ("a.jpg 1 2 3 4 5 6 7 8 9 nan\n", "the face of a.jpg has a number that is not finite"),
        ('{"schema_version": 99}\n', "schema_version 99, and this partialfc reads them up to 1"),
        ('{"schema_version": 1}\n{"faces": [{}]}\n', "no sound file of landmarks"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "points.txt").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_landmarks(tmp_path / "points.txt")


def test_a_mirrored_face_is_told_from_a_face() -> None:
    assert [is_mirrored(face) for face in FACES] == [False] * 7
    assert [is_mirrored(face[MIRRORED]) for face in FACES] == [True] * 7
    assert residual(TEMPLATE.numpy()[None]) == pytest.approx(0, abs=1e-9)
    assert np.isinf(residual(np.ones((1, 5, 2))))


@pytest.mark.parametrize("width", [112, 96])
def test_points_of_aligned_crops_are_told(tmp_path: Path, width: int) -> None:
    shift = ((112 - width) / 2, 0)
    crops = [TEMPLATE.numpy() - shift + np.random.default_rng(number).normal(0, 1, (5, 2)) for number in range(7)]
    assert read_landmarks(write(tmp_path / "points.txt", crops)).crop == (width, 112)
    assert read_landmarks(write(tmp_path / "points.txt", FACES)).crop is None
