from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from format_files import png
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from partialfc.core.errors import InputError
from partialfc.data.images import UnreadableImage
from partialfc.data.sources import open_source
from partialfc.data.sources.base import file_name


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with two images below `faces`."""
    for number in range(2):
        (tmp_path / "faces" / str(number)).mkdir(parents=True)
        (tmp_path / "faces" / str(number) / "ü.png").write_bytes(png(number))
    return tmp_path


def written(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("place", [".", "lists"])
def test_loose_images(images: Path, place: str) -> None:
    (images / place).mkdir(exist_ok=True)
    big = (1 << 24) + 1
    path = written(images / place / "train.lst", f"7\t{big}.000000\tfaces/1/ü.png", "", "3\t0\t9.5\tfaces/0/ü.png")
    source = open_source(path)
    assert (source.format, len(source), source.num_classes) == ("list", 2, big + 1)
    assert source.labels().tolist() == [big, 0]
    assert [source.read(index).encoded for index in range(2)] == [png(1), png(0)]
    assert os.path.samefile(source.name(0), images / "faces/1/ü.png")
    assert file_name(source, 0) == "faces/1/ü.png"
    with pytest.raises(IndexError):
        source.read(2)


def test_a_list_of_windows(images: Path) -> None:
    source = open_source(written(images / "a.lst", "0\t0\tfaces\\0\\ü.png", "1\t1\tfaces\\1\\ü.png"))
    assert [source.read(index).encoded for index in range(2)] == [png(0), png(1)]
    (images / "faces\\0").mkdir()  # here a backslash may belong to a name
    (images / "faces\\0" / "x.png").write_bytes(png(5))
    source = open_source(written(images / "b.lst", "0\t0\tfaces\\0/x.png"))
    assert source.read(0).encoded == png(5)


def test_the_real_list_names_the_labels_of_the_records(copy_of: Callable[[Path], Path], im2rec: Path) -> None:
    folder = copy_of(im2rec)
    assert open_source(folder / "train.lst").labels().tolist() == open_source(folder).labels().tolist()


def test_a_file_that_is_missing(images: Path) -> None:
    source = open_source(written(images / "a.lst", "0\t0\tfaces/0/ü.png", "1\t1\tfaces/2/x.png"))
    with pytest.raises(UnreadableImage, match=r"faces/2/x\.png: No such file"):
        source.read(1)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("1\tfaces/0/ü.png", "line 2 of .* is '1.*, but an image is listed as 'key TAB label TAB path'"),
        ("1 0 faces/0/ü.png", "line 2 of .*, but an image is listed as"),
        ("1\t0\t", "line 2 of .*, but an image is listed as"),
        ("1\t0\ta\0b", "line 2 of .*, but an image is listed as"),
        ("1\t1.5\tfaces/0/ü.png", "label in line 2 of .* is '1.5'"),
        ("1\t-1\tfaces/0/ü.png", "label in line 2 of .* is '-1'"),
        ("1\tnan\tfaces/0/ü.png", "label in line 2 of .* is 'nan'"),
        ("1\tinf\tfaces/0/ü.png", "label in line 2 of .* is 'inf'"),
        ("1\tid0\tfaces/0/ü.png", "label in line 2 of .* is 'id0'"),
        ("1\t²\tfaces/0/ü.png", "label in line 2 of .* is '²'"),
    ],
)
def test_lines_that_list_no_image(images: Path, line: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        open_source(written(images / "a.lst", "0\t0\tfaces/0/ü.png", line))


def test_an_empty_list(images: Path) -> None:
    with pytest.raises(InputError, match=r"a\.lst lists no images"):
        open_source(written(images / "a.lst", ""))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | st.lists(st.sampled_from([b"1", b"\t", b"\n", b"e9", b".", b"-", b"x", b"\0"])))
def test_any_content(images: Path, content: bytes | list[bytes]) -> None:
    path = images / "a.lst"
    path.write_bytes(content if isinstance(content, bytes) else b"".join(content))
    try:
        source = open_source(path)
    except InputError as error:
        assert "a.lst" in str(error)  # noqa: PT017
        return
    assert source.labels().min() >= 0
    for index in range(len(source)):
        with pytest.raises(UnreadableImage):
            source.read(index)
