"""Data as people have them: entries of folders that are no images, odd names, marks and numbers in small files."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_files import png

from partialfc.core.errors import InputError
from partialfc.data.convert import convert
from partialfc.data.images import UnreadableImage
from partialfc.data.inspect import inspect
from partialfc.data.sources import open_source
from partialfc.data.sources.base import order_digest, reading_notes
from partialfc.data.sources.names import read_classes, write_classes
from partialfc.data.sources.recordio import build_payload, build_record

BOM = b"\xef\xbb\xbf"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images of each of two identities, named a and b."""
    for number in range(4):
        (tmp_path / "set" / "ab"[number // 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / "ab"[number // 2] / f"{number}.png").write_bytes(png(number))
    return tmp_path / "set"


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    """A socket, by a short relative name: their names have at most 108 bytes."""
    with socket.socket(socket.AF_UNIX) as new:
        os.chdir(path.parent)
        new.bind(path.name)


SPECIAL: dict[str, Callable[[Path], Any]] = {
    "fifo": fifo,
    "socket": unix_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "circular": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_files_are_never_opened(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    make = SPECIAL[kind]
    make(folder / "a" / "x.jpg")
    make(folder / "c")
    report = inspect(folder)
    assert (report["images"], report["classes"], report["unreadable"]) == (4, 2, 0)
    assert report["passed_over"] == {"that are no regular files": 1}
    assert "1 that are no regular files (such as a/x.jpg)" in report["advice"][0]
    (folder / "all.lst").write_text("0\t0\ta/0.png\n1\t1\ta/x.jpg\n")
    with pytest.raises(UnreadableImage, match=r"a/x.jpg: "):
        open_source(folder / "all.lst").read(1)
    for name in ("x.rec", "x.tar", "x.parquet", "x.lmdb", "x.lst", "x"):
        (folder / "other").mkdir(exist_ok=True)
        make(folder / "other" / name)
        with pytest.raises(
            InputError, match=f"{name} is no regular file, but a dead link, a pipe, a socket or a device"
        ):
            open_source(folder / "other" / name)
        if name not in ("x", "x.lst"):
            with pytest.raises(InputError, match=f"{name} is no regular file"):
                open_source(folder / "other")
        (folder / "other" / name).unlink()


def test_files_passed_over_are_counted_and_named(folder: Path) -> None:
    for name in ("a/4.jpe", "a/5.JFIF", "b/deep/er/6.pgm"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(7))
    for name in ("a/noext", "b/noext", "a/x.HEIC", "top.jpg", "readme.txt", "a/Thumbs.db", "desktop.ini", "b/.hidden"):
        (folder / name).write_bytes(png(8))
    report = inspect(folder)
    assert report["images"] == 7
    assert report["passed_over"] == {"without a suffix": 2, ".heic": 1, "without an identity folder": 1}
    expected = "1 .heic (such as a/x.HEIC), 2 without a suffix (such as a/noext), 1 without an identity folder (such as"
    assert expected in report["advice"][0]
    assert ".lst" in report["advice"][0]
    listed = folder / "all.lst"
    listed.write_text("0\t0\ta/noext\n1\t1\tb/0.png\n")  # as the sentence says
    assert open_source(listed).read(0).encoded == png(8)


def test_a_folder_without_images_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.avif").write_bytes(b"")
    with pytest.raises(InputError, match=r"is no training set: .* files are passed over: 1 .avif \(such as a/1.avif\)"):
        open_source(tmp_path)


def test_names_that_are_no_utf8_survive(folder: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"Jos\xe9")
    (folder / "b").rename(folder / name)
    (folder / name / "2.png").rename(folder / name / os.fsdecode(b"\xff.png"))
    source = open_source(folder)
    assert source.identities == [name, "a"] or source.identities == ["a", name]
    expected = inspect(folder)["sha256_of_decoded"]
    (tmp_path / os.fsdecode(b"\xe9")).mkdir()
    for target in ("recordio", "webdataset", "parquet", "folder"):
        out = tmp_path / os.fsdecode(b"\xe9") / target  # the folder's own name, too
        convert(folder, out, target, quiet=True)
        converted = open_source(out)
        assert converted.identities == source.identities, target
        assert inspect(out)["sha256_of_decoded"] == expected
    write_classes(tmp_path, 2, source.identities)
    assert read_classes(tmp_path) == (2, source.identities)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """`train.rec` and `train.idx` of eight images of four classes, without header."""
    write_records(tmp_path, [(float(key // 2), png(key)) for key in range(8)])
    return tmp_path


def write_records(folder: Path, records: list[tuple[float | tuple[float, ...], bytes]]) -> None:
    content, lines = b"", ""
    for key, (label, body) in enumerate(records):
        lines += f"{key}\t{len(content)}\n"
        content += build_record(build_payload(label, key, body))
    (folder / "train.rec").write_bytes(content)
    (folder / "train.idx").write_text(lines)


@pytest.mark.parametrize("offset", ["-1", str((1 << 64) - 1), str((1 << 63) - 1), str(1 << 70)])
def test_offsets_that_none_can_have(plain: Path, offset: str) -> None:
    index = plain / "train.idx"
    index.write_text(index.read_text() + f"8\t{offset}\n")
    with pytest.raises(
        InputError, match=rf"train.idx is no index .*8\\t{offset}.*: remove it, and the records are found"
    ):
        open_source(plain)
    index.unlink()
    assert len(open_source(plain)) == 8


@pytest.mark.parametrize("offset", [1 << 40, 1 << 62])
def test_offsets_past_the_end_are_unreadable_records(plain: Path, offset: int) -> None:
    index = plain / "train.idx"
    index.write_text(index.read_text() + f"8\t{offset}\n")
    report = inspect(plain)
    assert (report["images"], report["classes"], report["unreadable"]) == (8, 4, 1)
    assert f"byte {offset} lies past the end of the file" in report["unreadable_records"][0]


def test_byte_order_marks(plain: Path, folder: Path) -> None:
    (plain / "property").write_bytes(BOM + b"5,32,32\n")
    (plain / "train.idx").write_bytes(BOM + (plain / "train.idx").read_bytes())
    source = open_source(plain / "train.rec")
    assert (len(source), source.num_classes) == (8, 5)
    (folder / "a.lst").write_bytes(BOM + b"0\t3\ta/0.png\n")
    assert open_source(folder / "a.lst").labels().tolist() == [3]
    for encoding in ("utf-8-sig", "utf-16"):
        (plain / "mix.yaml").write_text("sources:\n- path: set\n", encoding=encoding)
        assert len(open_source(plain / "mix.yaml")) == 4


@pytest.mark.parametrize("name", ["train.idx", "all.lst"])
def test_text_in_utf16_is_named(name: str, plain: Path, folder: Path) -> None:
    (folder / "all.lst").write_text("0\t0\ta/0.png\n")
    path, data = (plain / name, plain) if name == "train.idx" else (folder / name,) * 2
    path.write_bytes(path.read_text().encode("utf-16"))
    with pytest.raises(InputError, match=rf"{name} is text in UTF-16: save it as UTF-8"):
        open_source(data)


def test_an_index_that_lists_too_few_records(plain: Path) -> None:
    assert reading_notes(open_source(plain)) == []
    index = plain / "train.idx"
    index.write_text("".join(index.read_text().splitlines(keepends=True)[:-1]))
    [note] = reading_notes(open_source(plain))
    assert re.search(r"train.rec has [\d,]+ bytes after the last record that its .idx lists", note)
    index.unlink()
    assert reading_notes(open_source(plain)) == []


def test_folders_between_identity_and_image_are_mentioned(folder: Path) -> None:
    (folder.parent / "above" / "0").mkdir(parents=True)
    folder.rename(folder.parent / "above" / "train")
    source = open_source(folder.parent / "above")
    [note] = reading_notes(source)
    assert "train/a/0.png is taken for one of train: if the inner folders are identities" in note
    assert inspect(source.path)["advice"][0] == f"{note}."
    (folder.parent / "above" / "0" / "1.png").write_bytes(png(1))
    assert reading_notes(open_source(folder.parent / "above")) == []


@pytest.mark.parametrize("name", ["train.REC", "Train.Rec"])
def test_capitals_in_suffixes(plain: Path, name: str) -> None:
    (plain / "train.rec").rename(plain / name)
    assert len(open_source(plain)) == 8


@pytest.mark.parametrize("first", [5, 9, 11])
def test_a_header_that_names_too_few_or_too_many_images(tmp_path: Path, first: int) -> None:
    images: list[tuple[float | tuple[float, ...], bytes]] = [((key - 1) // 2, png(key)) for key in range(1, 9)]
    write_records(tmp_path, [((first, first + 4), b""), *images, *[((1.0, 2.0), b"")] * 4])
    source = open_source(tmp_path)
    assert (len(source), source.num_classes) == (8, 4)
    assert source.labels().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    last = int((tmp_path / "train.idx").read_text().splitlines()[8].split()[1])
    os.truncate(tmp_path / "train.rec", last + 10)
    if first == 9:  # cut off within the images, whose number only the header knows now
        assert (len(open_source(tmp_path)), open_source(tmp_path).num_classes) == (8, 4)


def test_too_few_classes_are_refused_at_once(folder: Path) -> None:
    with pytest.raises(InputError, match=r"The label of .*b/2.png is 1, outside the range \[0, 1\)"):
        open_source(folder, num_classes=1)


def test_the_digest_of_the_order_follows_names_and_labels(folder: Path, plain: Path) -> None:
    before = order_digest(open_source(folder))
    assert before == order_digest(open_source(folder))
    (folder / "a" / "0.png").rename(folder / "b" / "0.png")
    assert order_digest(open_source(folder)) != before
    before = order_digest(open_source(plain / "train.rec"))
    records = [(float(key // 2), png(key)) for key in (1, 0, 2, 3, 4, 5, 6, 7)]
    sizes = np.array([len(body) for _, body in records])
    assert sizes[0] != sizes[1]
    write_records(plain, [*records])
    assert order_digest(open_source(plain / "train.rec")) != before
