"""The meta files of IJB: what they say, and each way in which they can be wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ijb_sets import random_set, write_identification, write_set

from partialfc.core.errors import InputError
from partialfc.data import ijb_files
from partialfc.data.ijb_files import (
    read_faces,
    read_galleries,
    read_members,
    read_probes,
    read_template_pairs,
    write_ijb,
)

PAIRS, MEDIA, FACES = "ijbx_template_pair_label.txt", "ijbx_face_tid_mid.txt", "ijbx_name_5pts_score.txt"


@pytest.mark.parametrize("below", ["", "meta"])
def test_files_are_read_in_the_folder_and_below_meta(tmp_path: Path, below: str) -> None:
    data = random_set(0)
    write_set(tmp_path / below, data)
    faces = read_faces(tmp_path)
    assert faces.names == data.names
    np.testing.assert_allclose(
        faces.landmarks[-1], np.reshape([30.5, 40.25, 60, 40, 45, 60, 35, 80, 55, 80.125], (5, 2))
    )
    np.testing.assert_array_equal(faces.detector_scores, data.scores)
    members = read_members(tmp_path, faces)
    assert [
        (faces.names[face], template, media)
        for face, template, media in zip(members.faces, members.templates, members.media, strict=True)
    ] == data.lines
    pairs = read_template_pairs(tmp_path)
    assert list(zip(pairs.left, pairs.right, pairs.is_same, strict=True)) == data.pairs


def test_another_order_of_images_is_followed(tmp_path: Path) -> None:
    data = random_set(1)
    write_set(tmp_path, data)
    lines = (tmp_path / MEDIA).read_text().splitlines()
    (tmp_path / MEDIA).write_text("\n".join([*reversed(lines), lines[3]]))  # one image belongs to two lines
    faces = read_faces(tmp_path)
    members = read_members(tmp_path, faces)
    np.testing.assert_array_equal(members.faces, [*reversed(range(len(lines))), 3])
    assert members.templates[-1] == data.lines[3][1]


def test_names_may_repeat_in_the_same_order_only(tmp_path: Path) -> None:
    write_set(tmp_path, random_set(1))
    for name in (MEDIA, FACES):
        path = tmp_path / name
        path.write_text(path.read_text().replace("img/2.jpg", "img/1.jpg"))
    faces = read_faces(tmp_path)
    assert faces.names[:2] == ["img/1.jpg", "img/1.jpg"]
    np.testing.assert_array_equal(read_members(tmp_path, faces).faces, np.arange(len(faces.names)))
    lines = (tmp_path / MEDIA).read_text().splitlines()
    (tmp_path / MEDIA).write_text("\n".join(reversed(lines)))
    with pytest.raises(InputError, match="a name occurs twice"):
        read_members(tmp_path, faces)


numbers = st.integers(0, 10**9 - 1)
spaces = st.sampled_from([" ", " ", " ", "  ", "\t"])
ends = st.sampled_from(["\n", "\n", "\n", "\r\n", " \n", "\n\n"])


@given(rows=st.lists(st.tuples(numbers, numbers, st.integers(0, 1), spaces, ends), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_pairs_are_read_whatever_the_white_space(
    rows: list[tuple[int, int, int, str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("pairs")
    text = "".join(f"{left}{space}{right} {label}{end}" for left, right, label, space, end in rows)
    (folder / PAIRS).write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ijb_files, "_CHUNK", 64)
        pairs = read_template_pairs(folder)
    assert list(zip(pairs.left, pairs.right, pairs.is_same, strict=True)) == [row[:3] for row in rows]


def test_the_last_line_may_lack_its_newline(tmp_path: Path) -> None:
    (tmp_path / PAIRS).write_bytes(b"1 22 0\n333 4 1")
    pairs = read_template_pairs(tmp_path)
    assert (pairs.left.tolist(), pairs.right.tolist(), pairs.is_same.tolist()) == ([1, 333], [22, 4], [False, True])


@pytest.mark.parametrize(
    "bad", ["1 2", "1 2 0 1", "1 x 0", "1 2 2", "1 2 -1", "1 2.5 0", "1234567890 2 0", "1 2 0 \x00"]
)
def test_a_bad_pair_is_named_with_its_line(tmp_path: Path, bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ijb_files, "_CHUNK", 100)
    (tmp_path / PAIRS).write_text("11 12 0\n" * 41 + f"{bad}\n" + "11 12 1\n" * 5)
    with pytest.raises(InputError, match=f"Line 42 of .*{PAIRS} is “{re.escape(bad)}”"):
        read_template_pairs(tmp_path)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        (FACES, "img/3.jpg 1 2 3", "Line 3 of .* must be “image x1 y1"),
        (FACES, "img/3.jpg 1 2 3 4 5 6 7 8 9 10 high", "Line 3 of .*“img/3.jpg 1 2 3 4 5 6 7 8 9 10 high”"),
        (FACES, "img/3.jpg 1 2 3 4 5 6 7 8 9 10 nan", "img/3.jpg has a number not finite"),
        (MEDIA, "img/3.jpg 1", "Line 3 of .* must be “image template media”"),
        (MEDIA, "img/3.jpg one 2", "Line 3 of .*“img/3.jpg one 2”"),
        (MEDIA, "img/3.jpg 1.5 2", "img/3.jpg has a template or media that is no whole number"),
        (MEDIA, "img/unknown.jpg 1 2", "names the image img/unknown.jpg, which .* lacks"),
    ],
)
def test_a_bad_line_of_the_other_files_is_named(tmp_path: Path, name: str, line: str, message: str) -> None:
    write_set(tmp_path, random_set(2))
    lines = (tmp_path / name).read_text().splitlines()
    lines[2] = line
    (tmp_path / name).write_text("\n".join(lines))
    with pytest.raises(InputError, match=message):
        read_members(tmp_path, read_faces(tmp_path))


@pytest.mark.parametrize("name", [PAIRS, MEDIA, FACES])
def test_a_missing_an_empty_and_a_second_file(tmp_path: Path, name: str) -> None:
    def read() -> None:
        read_members(tmp_path, read_faces(tmp_path))
        read_template_pairs(tmp_path)

    write_set(tmp_path, random_set(3))
    text = (tmp_path / name).read_text()
    (tmp_path / name.replace("ijbx", "other")).write_text(text)
    with pytest.raises(InputError, match="2 files"):
        read()
    (tmp_path / name.replace("ijbx", "other")).unlink()
    (tmp_path / name).write_text("\n")
    with pytest.raises(InputError, match="is empty"):
        read()
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=rf"no file \*{name[4:]}, neither there nor in its folder meta"):
        read()


def test_galleries_and_probes(tmp_path: Path) -> None:
    data = random_set(4)
    write_set(tmp_path, data)
    with pytest.raises(InputError, match="1N_gallery"):
        read_galleries(tmp_path)
    write_identification(tmp_path, data)
    galleries, probes = read_galleries(tmp_path), read_probes(tmp_path)
    assert list(galleries) == ["G1", "G2"]
    for subjects in (*galleries.values(), probes):
        assert subjects == {template: data.subjects[template] for template in subjects}
    assert {template for subjects in (*galleries.values(), probes) for template in subjects} == set(data.subjects)


def test_a_template_with_several_lines_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "ijbx_1N_gallery_S1.csv"
    path.write_text('"TEMPLATE_ID","SUBJECT_ID","FILENAME"\n7,3,"img/1.png"\n7,3,"img/2.png"\n\n9,4,"a,b.png"\n')
    (gallery,) = read_galleries(tmp_path).values()
    assert gallery == {7: 3, 9: 4}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("7,3\n7,4\n", "two subjects, the second in line 3"),
        ("7\n", "Line 2 .*“7”"),
        ("7,Ann\n", "Line 2"),
        ("", "empty"),
    ],
)
def test_a_bad_list_of_subjects(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "ijbx_1N_probe_mixed.csv").write_text("TEMPLATE_ID,SUBJECT_ID\n" + lines)
    with pytest.raises(InputError, match=message):
        read_probes(tmp_path)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    data = random_set(2)
    write_set(tmp_path / "first", data)
    write_identification(tmp_path / "first", data)

    def read(folder: Path) -> list[Any]:
        faces = read_faces(folder)
        return [
            faces,
            read_members(folder, faces),
            read_template_pairs(folder),
            read_galleries(folder),
            read_probes(folder),
        ]

    first = read(tmp_path / "first")
    (tmp_path / "again").mkdir()
    write_ijb(tmp_path / "again", "ijbx", *first)
    again = read(tmp_path / "again")
    for one, other in zip(first[:3], again[:3], strict=True):
        for name, values in vars(one).items():
            np.testing.assert_array_equal(getattr(other, name), values)
    assert first[3:] == again[3:]
