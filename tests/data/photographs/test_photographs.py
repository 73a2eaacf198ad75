"""Photographs upright for every EXIF orientation; every file below a folder once."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from partialfc.core.errors import InputError
from partialfc.data.images import UnreadableImage
from partialfc.data.photographs.files import list_files, read_photograph


def encoded(orientation: int, image_format: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, image_format, exif=exif)
    return stream.getvalue()


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8, 99])
def test_photographs_stand_upright(tmp_path: Path, orientation: int, image_format: str) -> None:
    content = encoded(orientation, image_format)
    (tmp_path / "a").write_bytes(content)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    assert np.array_equal(read_photograph(str(tmp_path / "a")), expected)


def test_every_file_is_listed_once(tmp_path: Path) -> None:
    (tmp_path / "anna" / "deep").mkdir(parents=True)
    for name in ("anna/b.jpg", "anna/deep/.c", "z.txt"):
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "anna/pipe")
    (tmp_path / "anna/dead.jpg").symlink_to("nowhere")
    (tmp_path / "anna/loop").symlink_to("..")
    (tmp_path / "twin").symlink_to("anna")
    assert list_files(tmp_path) == ["anna/b.jpg", "anna/dead.jpg", "anna/deep/.c", "anna/pipe", "z.txt"]
    assert list_files(tmp_path / "z.txt") == ["z.txt"]


@pytest.mark.parametrize("path", ["https://example.org/photographs", "nowhere", "empty"])
def test_nothing_to_list_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    with pytest.raises(InputError, match=r"\.$"):
        list_files(Path(path))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\0\0\0\x24ftypheic\0\0\0\0mif1heic" + bytes(99), "HEIC, which is not read: convert it to JPEG"),
        (b"", "no image"),
        (encoded(1, "JPEG")[:-40], "truncated|broken"),
    ],
)
def test_what_is_no_photograph_has_a_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UnreadableImage, match=reason):
        read_photograph(str(tmp_path / "a"))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a")
    with pytest.raises(UnreadableImage, match=r"^it is no regular file$"):
        read_photograph(str(tmp_path / "a"))
