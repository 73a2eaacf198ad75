from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from page_reader import read_page
from pictures import picture
from PIL import Image

from partialfc.core.errors import InputError
from partialfc.data.images import encode_png
from partialfc.data.inspect import inspect
from partialfc.data.inspect_page import write_page
from partialfc.data.sources import open_source
from partialfc.data.sources.recordio import RecordReader

HASH = "48204531bb415f7710f324dcea8d98aaace2f2aaaa20721a85719a482f50be5f"


def test_the_sets_of_all_writers_have_the_same_counts_and_hash(
    with_header: Path,
    im2rec: Path,
    unpacked: Path,
    real_webdataset: Path,
    real_parquet: Path,
    real_lmdb: Path,
    copy_of: Callable[[Path], Path],
) -> None:
    copies = [copy_of(path) for path in (real_webdataset, real_parquet, real_lmdb)]  # indexes are written beside them
    paths = (with_header, im2rec, unpacked, *copies)
    reports = [inspect(path) for path in paths]
    formats = ["recordio-header", "recordio", "folder", "webdataset", "parquet", "lmdb"]
    assert [report.pop("format") for report in reports] == formats
    for report, path in zip(reports, paths, strict=True):
        assert report.pop("advice") == [f"Nothing is in the way of a training: partialfc train {path} --out RUN"]
        del report["duplicates"]["groups"]  # with the names of records
    assert all(report == reports[0] for report in reports)
    assert reports[0] == {
        "images": 48,
        "classes": 8,
        "unreadable": 0,
        "min_per_class": 6,
        "max_per_class": 6,
        "images_per_class": {"0": 0, "1": 0, "2": 0, "3-4": 0, "5-8": 8},
        "sizes": {"112 x 112": 48},
        "brightness": {"1 %": 112, "50 %": 134, "99 %": 154},
        "grey": 0,
        "not_upright": 0,
        "passed_over": {},
        # Two drawings of one identity differ by their noise alone.
        "duplicates": {"exact": 0, "re-encoded": 1, "mirrored": 0, "across_identities": 0},
        "sha256_of_decoded": HASH,
        "unreadable_records": [],
    }


def test_the_hash_is_the_one_that_is_defined(numbered: Callable[..., Path]) -> None:
    digests = [hashlib.sha256(b"%d\n" % (n // 2) + picture(n).tobytes()).hexdigest() for n in range(5)]
    expected = hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()
    assert inspect(numbered(5))["sha256_of_decoded"] == expected


def test_unreadable_records_and_empty_classes(copy_of: Callable[[Path], Path], with_header: Path) -> None:
    folder = copy_of(with_header)
    os.truncate(folder / "train.rec", 100_000)
    report = inspect(folder)
    assert (report["images"], report["unreadable"]) == (15, 33)
    assert (report["min_per_class"], report["max_per_class"]) == (0, 6)
    assert len(report["unreadable_records"]) == 20
    assert report["unreadable_records"][0].startswith("record 16 of")


def test_nothing_readable(numbered: Callable[..., Path]) -> None:
    report = inspect(numbered(2, broken=(0, 1)))
    assert report["images"] == 0
    assert report["sha256_of_decoded"] == hashlib.sha256(b"").hexdigest()


def test_a_label_outside_the_range(with_header: Path) -> None:
    with pytest.raises(InputError, match=r"record 43 of .* is 7, outside the range \[0, 7\)"):
        inspect(with_header, num_classes=7)


def test_progress(numbered: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("partialfc.data.inspect._CHUNK", 4)
    seen: list[tuple[int, int]] = []
    inspect(numbered(10), progress=lambda done, total: seen.append((done, total)))
    assert seen[:3] == [(4, 10), (8, 10), (10, 10)]
    assert {*seen[3:]} <= {(10, 10)}


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs the list of open files of Linux")
def test_what_was_opened_is_closed(im2rec: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        RecordReader(im2rec / "train.rec").read(0)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def odd_folder(tmp_path: Path) -> Path:
    """Images of several shapes: one grey, one turned by its EXIF data, one damaged, two equal under two identities."""
    images = np.random.default_rng(0).integers(0, 255, (4, 24, 24, 3), np.uint8)
    grey = np.broadcast_to(images[3, :, :, :1], (24, 24, 3))
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(images[0]).save(turned, "JPEG", exif=exif)
    files = {
        "a/1.png": encode_png(images[1]),
        "a/2.jpg": turned.getvalue(),
        "a/3.png": b"no image",
        "<b>/1.png": encode_png(images[1]),
        "<b>/2.png": encode_png(grey),
        "c/1.png": encode_png(images[2, :, :20]),
    }
    for name, content in files.items():
        (tmp_path / "odd" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "odd" / name).write_bytes(content)
    return tmp_path / "odd"


def test_what_may_be_wrong_with_a_set(odd_folder: Path) -> None:
    report = inspect(odd_folder)
    assert report["sizes"] == {"24 x 24": 4, "20 x 24": 1}
    assert report["images_per_class"] == {"0": 0, "1": 1, "2": 2}
    assert (report["images"], report["unreadable"], report["grey"], report["not_upright"]) == (5, 1, 1, 1)
    duplicates = report["duplicates"]
    assert (duplicates["exact"], duplicates["re-encoded"], duplicates["across_identities"]) == (1, 0, 1)
    (group,) = duplicates["groups"]
    assert [Path(name).relative_to(odd_folder).as_posix() for name in group["names"]] == ["<b>/1.png", "a/1.png"]
    assert (group["labels"], group["kinds"]) == ([0, 1], ["exact"])
    starts = [sentence.split(" ")[:4] for sentence in report["advice"]]
    assert [" ".join(words) for words in starts] == [
        "The images are of",
        "1 record cannot be",
        "The EXIF orientation of",
        "With one image: 1",
        "1 copies of images",
    ]


def test_a_page_is_complete_escaped_and_replaces_pages_only(odd_folder: Path, tmp_path: Path) -> None:
    facts, source, page = inspect(odd_folder), open_source(odd_folder), tmp_path / "page.html"
    write_page(page, facts, source)
    text = page.read_text()
    assert "&lt;b&gt;/1.png" in text
    assert "<b>/1.png" not in text
    assert len(read_page(text).find_all("img")) == 5 + 2  # of the set, and of the group of duplicates
    assert "://" not in text
    write_page(page, facts, source, pictures=False)
    assert "<img" not in page.read_text()
    assert "&lt;b&gt;/1.png, class 0" in page.read_text()
    page.write_text("a letter")
    with pytest.raises(InputError, match=r"page\.html exists and is no page"):
        write_page(page, facts, source)
