from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from pictures import picture

from partialfc.core.errors import InputError
from partialfc.data.inspect import inspect
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
    reports = [inspect(path) for path in (with_header, im2rec, unpacked, *copies)]
    formats = ["recordio-header", "recordio", "folder", "webdataset", "parquet", "lmdb"]
    assert [report.pop("format") for report in reports] == formats
    assert all(report == reports[0] for report in reports)
    assert reports[0] == {
        "images": 48,
        "classes": 8,
        "unreadable": 0,
        "min_per_class": 6,
        "max_per_class": 6,
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
    assert seen == [(4, 10), (8, 10), (10, 10)]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs the list of open files of Linux")
def test_what_was_opened_is_closed(im2rec: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        RecordReader(im2rec / "train.rec").read(0)
    assert len(os.listdir("/proc/self/fd")) == before
