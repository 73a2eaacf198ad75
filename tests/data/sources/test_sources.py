from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from partialfc.core.errors import InputError
from partialfc.data.images import UnreadableImage
from partialfc.data.sources import open_source
from partialfc.data.sources.base import check_label, file_name, read_image
from partialfc.data.sources.recordio import RecordWriter, build_payload, build_record
from partialfc.data.sources.subset import SubsetSource

Copy = Callable[[Path], Path]


def write_header_layout(path: Path, images: int, header: tuple[float, float], identities: int) -> None:
    """Write a file whose header record may be rounded, with images that are no images but carry their key."""
    index = []
    with path.open("wb") as file:
        payloads = [build_payload(header, 0, b"")]
        payloads += [build_payload(float(key % identities), key, b"image %d" % key) for key in range(1, images + 1)]
        payloads += [build_payload((1.0, 2.0), images + 1 + n, b"") for n in range(identities)]
        for key, payload in enumerate(payloads):
            index.append(f"{key}\t{file.tell()}\n")
            file.write(build_record(payload))
    path.with_suffix(".idx").write_text("".join(index[1:] + index[:1]))


class TestRecordSource:
    @pytest.mark.parametrize("layout", ["with_header", "im2rec"])
    @pytest.mark.parametrize("target", ["folder", "file"])
    @pytest.mark.parametrize("index", [True, False])
    def test_real_files(
        self, layout: str, target: str, index: bool, request: pytest.FixtureRequest, copy_of: Copy
    ) -> None:
        folder = copy_of(request.getfixturevalue(layout))
        if not index:
            (folder / "train.idx").unlink()
        source = open_source(folder / "train.rec" if target == "file" else folder)
        assert (len(source), source.num_classes, source.identities) == (48, 8, None)
        assert source.format == ("recordio-header" if layout == "with_header" else "recordio")
        labels = [source.read(index).label for index in range(48)]
        assert np.bincount(labels).tolist() == [6] * 8
        assert source.labels().tolist() == labels
        sample, image = read_image(source, 0)
        assert image.shape == (112, 112, 3)
        assert sample.name == source.name(0) == f"record {int(layout == 'with_header')} of {folder / 'train.rec'}"

    def test_labels_without_the_images(self, unpacked: Path, numbered: Callable[..., Path]) -> None:
        """Of a folder from its names, of a file from the heads of its records: no image is decoded."""
        for source in (open_source(unpacked), open_source(numbered(9, broken=(3,)))):
            assert source.labels().tolist() == [source.read(index).label for index in range(len(source))]
            assert source.labels().dtype == np.int64

    def test_a_label_that_is_no_class_is_refused(self, numbered: Callable[..., Path]) -> None:
        folder = numbered(4)
        content = bytearray((folder / "train.rec").read_bytes())
        place = content.index(np.float32(1).tobytes(), 12)
        content[place : place + 4] = np.float32(1.5).tobytes()
        (folder / "train.rec").write_bytes(content)
        with pytest.raises(InputError, match=r"1\.5"):
            open_source(folder, num_classes=2).labels()

    @pytest.mark.parametrize("index", [-1, 48])
    def test_places_outside(self, im2rec: Path, index: int) -> None:
        with pytest.raises(IndexError):
            open_source(im2rec).read(index)

    def test_number_of_classes(self, copy_of: Copy, with_header: Path, im2rec: Path) -> None:
        folder = copy_of(with_header)
        (folder / "property").write_text("11,112,112\n48\n")
        assert open_source(folder).num_classes == 11
        assert open_source(folder, num_classes=20).num_classes == 20
        (folder / "property").unlink()
        assert open_source(folder).num_classes == 8
        assert open_source(im2rec).num_classes == 8
        with pytest.raises(InputError, match="num_classes is 0"):
            open_source(folder, num_classes=0)

    @pytest.mark.parametrize("text", ["", "many,112,112\n", "0,112,112\n"])
    def test_property_that_is_none(self, copy_of: Copy, with_header: Path, text: str) -> None:
        folder = copy_of(with_header)
        (folder / "property").write_text(text)
        with pytest.raises(InputError, match="instead of 'num_classes,height,width'"):
            open_source(folder)

    @pytest.mark.parametrize("rounding", [-2, -1, 0, 1, 2])
    def test_a_rounded_header_is_put_right_by_the_records(
        self, tmp_path: Path, rounding: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As in WebFace42M, whose header lies beyond what float32 can count."""
        write_header_layout(tmp_path / "train.rec", 40, (41.0 + rounding, 48.0), 7)
        monkeypatch.setattr("numpy.spacing", lambda value: np.float32(4))
        monkeypatch.setattr("partialfc.data.sources.record_source.LABEL_LIMIT", 40)
        source = open_source(tmp_path)
        assert len(source) == 40
        assert source.read(39).encoded == b"image 40"
        assert source.num_classes == 7

    def test_a_truncated_file_keeps_its_classes(self, copy_of: Copy, with_header: Path) -> None:
        folder = copy_of(with_header)
        (folder / "property").unlink()
        os.truncate(folder / "train.rec", 100_000)
        source = open_source(folder)
        assert (len(source), source.num_classes) == (48, 8)
        with pytest.raises(UnreadableImage, match=r"record 17 of .*past the end"):
            source.read(16)
        (folder / "train.idx").unlink()
        source = open_source(folder)
        assert (len(source), source.num_classes) == (16, 8)

    def test_a_damaged_header_is_an_error(self, copy_of: Copy, with_header: Path) -> None:
        folder = copy_of(with_header)
        with (folder / "train.rec").open("r+b") as file:
            file.write(b"oops")
        with pytest.raises(InputError, match="header record is damaged"):
            open_source(folder)

    def test_a_damaged_header_of_a_truncated_file_leaves_images_only(self, copy_of: Copy, with_header: Path) -> None:
        """Nothing in such a file tells that it had a header: its missing records are unreadable images."""
        folder = copy_of(with_header)
        os.truncate(folder / "train.rec", 100_000)
        with (folder / "train.rec").open("r+b") as file:
            file.write(b"oops")
        source = open_source(folder)
        assert (len(source), source.format) == (57, "recordio")

    def test_a_header_of_nonsense_is_an_error(self, tmp_path: Path) -> None:
        write_header_layout(tmp_path / "train.rec", 4, (float("nan"), 5.0), 2)
        with pytest.raises(InputError, match=r"header record of .* is damaged"):
            open_source(tmp_path)

    def test_a_damaged_first_image_is_only_that(self, copy_of: Copy, im2rec: Path) -> None:
        folder = copy_of(im2rec)
        with (folder / "train.rec").open("r+b") as file:
            file.write(b"oops")
        source = open_source(folder)
        assert (len(source), source.num_classes, source.format) == (48, 8, "recordio")
        with pytest.raises(UnreadableImage, match="record 0 of"):
            source.read(0)

    def test_an_index_of_another_file(self, copy_of: Copy, im2rec: Path) -> None:
        folder = copy_of(im2rec)
        (folder / "train.idx").write_text("".join(f"{key}\t{key * 4096 + 8}\n" for key in range(48)))
        with pytest.raises(InputError, match="belongs to another"):
            open_source(folder)

    def test_a_header_without_images(self, tmp_path: Path) -> None:
        with RecordWriter(tmp_path / "train.rec"):
            pass
        with pytest.raises(InputError, match="holds no image"):
            open_source(tmp_path)

    @pytest.mark.parametrize(("label", "reason"), [(2.5, "whole number"), (2.0**24, "16777216")])
    @pytest.mark.parametrize("counted", [True, False])
    def test_labels_that_are_no_class_ids(self, tmp_path: Path, label: float, reason: str, counted: bool) -> None:
        (tmp_path / "train.rec").write_bytes(
            b"".join(build_record(build_payload(value, n, b"image")) for n, value in enumerate((0.0, label, 1.0)))
        )
        if not counted:
            with pytest.raises(InputError, match=f"record 1 of .*{reason}"):
                open_source(tmp_path)
        else:
            with pytest.raises(InputError, match=f"record 1 of .*{reason}"):
                open_source(tmp_path, num_classes=10).read(1)

    def test_an_array_label_counts_by_its_first_element(self, tmp_path: Path) -> None:
        (tmp_path / "train.rec").write_bytes(
            b"".join(build_record(build_payload((value, 99.0), n, b"image")) for n, value in enumerate((0.0, 4.0)))
        )
        source = open_source(tmp_path)
        assert source.num_classes == 5
        assert source.read(1).label == 4

    def test_labels_are_checked_against_the_classes(self, copy_of: Copy, im2rec: Path) -> None:
        source = open_source(copy_of(im2rec))
        check_label(source.read(1), 8)
        with pytest.raises(InputError, match=r"record 1 of .* is 7, outside the range \[0, 7\)"):
            check_label(source.read(1), 7)

    def test_an_image_that_cannot_be_decoded_is_named(self, copy_of: Copy, im2rec: Path) -> None:
        folder = copy_of(im2rec)
        source = open_source(folder)
        with (folder / "train.rec").open("r+b") as file:
            file.seek(6460 + 8 + 24)
            file.write(struct.pack("<Q", 0))
        with pytest.raises(UnreadableImage, match=r"record 1 of .*no image"):
            read_image(source, 1)


class TestFolderSource:
    def test_the_same_images_as_the_records(self, unpacked: Path) -> None:
        source = open_source(unpacked)
        assert (source.format, len(source), source.num_classes) == ("folder", 48, 8)
        assert source.identities == [f"{label:07d}" for label in range(8)]
        samples = [source.read(index) for index in range(48)]
        assert [sample.label for sample in samples] == [label for label in range(8) for _ in range(6)]
        assert [sample.name for sample in samples] == sorted(str(path) for path in unpacked.rglob("*.png"))
        assert all(Path(sample.name).read_bytes() == sample.encoded for sample in samples)

    def test_what_counts(self, tmp_path: Path) -> None:
        for name in ("b/1.JPG", "b/notes.txt", "b/.hidden.jpg", "a/ü 2.png", "a/10.jpeg", ".git/x.png", "stray.png"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(name.encode())
        (tmp_path / "aa").mkdir()
        source = open_source(tmp_path)
        assert source.identities == ["a", "aa", "b"]
        assert [(s.label, s.encoded.decode()) for s in map(source.read, range(len(source)))] == [
            (0, "a/10.jpeg"),
            (0, "a/ü 2.png"),
            (2, "b/1.JPG"),
        ]
        with pytest.raises(IndexError):
            source.read(3)

    def test_any_depth(self, tmp_path: Path) -> None:
        for name in (
            "b/9.png",
            "b/video 2/1.png",
            "b/video 2/deep/0.JPG",
            "b/video 10/1.png",
            "b/.x/1.png",
            "a/x/y/z.png",
        ):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(name.encode())
        source = open_source(tmp_path)
        assert source.identities == ["a", "b"]
        names = ["a/x/y/z.png", "b/9.png", "b/video 10/1.png", "b/video 2/1.png", "b/video 2/deep/0.JPG"]
        assert [file_name(source, index) for index in range(len(source))] == names
        assert [source.read(index).encoded.decode() for index in range(5)] == names
        assert source.labels().tolist() == [0, 1, 1, 1, 1]

    def test_links_that_form_loops(self, tmp_path: Path) -> None:
        root = tmp_path / "root"
        (root / "a" / "x").mkdir(parents=True)
        (root / "a" / "x" / "1.png").write_bytes(b"1")
        (root / "a" / "x" / "up").symlink_to(root / "a")
        (root / "a" / "x" / "root").symlink_to(root)
        (root / "a" / "x" / "self").symlink_to(root / "a" / "x" / "self")
        (root / "a" / "y").symlink_to(root / "a" / "x")
        (root / "b").symlink_to(root / "a")
        (root / "c").symlink_to(root / "c")
        source = open_source(root)
        assert source.identities == ["a", "b"]
        assert [file_name(source, index) for index in range(len(source))] == ["a/x/1.png", "b/x/1.png"]

    def test_many_links_take_no_time(self, tmp_path: Path) -> None:
        folder = tmp_path / "a"
        for _ in range(30):
            folder.mkdir()
            (folder / "l").symlink_to("r")
            folder = folder / "r"
        folder.mkdir()
        (folder / "1.png").write_bytes(b"")
        assert len(open_source(tmp_path)) == 1

    def test_a_file_that_vanished_is_unreadable(self, unpacked: Path) -> None:
        source = open_source(unpacked)
        os.remove(source.name(5))
        with pytest.raises(UnreadableImage, match=r"0000000.*No such file"):
            source.read(5)

    def test_a_folder_that_cannot_be_listed(self, unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = os.scandir

        def refuse(path: str | Path) -> Any:
            if path == unpacked:
                return real(path)
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr("os.scandir", refuse)
        with pytest.raises(InputError, match=r"0000000: Permission denied"):
            open_source(unpacked)


class TestWhichFormat:
    def test_archives_beside_records_and_folders_are_left_alone(
        self, copy_of: Copy, im2rec: Path, unpacked: Path
    ) -> None:
        for folder, expected in ((copy_of(im2rec), "recordio"), (unpacked, "folder")):
            for name in ("faces.tar", "faces.parquet", "faces.lmdb", "faces.lst", "faces.tar.gz"):
                (folder / name).touch()
            assert open_source(folder).format == expected

    def test_subsets_keep_names(self, unpacked: Path) -> None:
        source = SubsetSource(open_source(unpacked), 6)
        assert file_name(source, 7) == file_name(open_source(unpacked), 7) != ""


class TestNoSource:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="nowhere does not exist"):
            open_source(tmp_path / "nowhere")

    def test_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="is no training set: give a"):
            open_source(tmp_path)
        (tmp_path / "identity").mkdir()
        with pytest.raises(InputError, match="is no training set: give a"):
            open_source(tmp_path)

    def test_a_folder_that_cannot_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(path: Path) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr("os.scandir", refuse)
        with pytest.raises(InputError, match=r"Cannot read .*: Permission denied"):
            open_source(tmp_path)

    def test_several_rec_files(self, tmp_path: Path, copy_of: Copy, im2rec: Path) -> None:
        folder = copy_of(im2rec)
        (folder / "test.rec").touch()
        assert len(open_source(folder)) == 48
        (folder / "train.rec").rename(folder / "other.rec")
        with pytest.raises(InputError, match=r"several \.rec files \(other.rec, test.rec\)"):
            open_source(folder)

    def test_one_rec_of_any_name(self, copy_of: Copy, im2rec: Path) -> None:
        folder = copy_of(im2rec)
        for name in ("train.rec", "train.idx"):
            (folder / name).rename(folder / name.replace("train", "faces"))
        assert len(open_source(folder)) == 48

    def test_a_file_of_another_kind(self, tmp_path: Path) -> None:
        for name, message in (("data.txt", "is no training set"), ("a.JPG", "is no training set"), ("b", "no record")):
            (tmp_path / name).write_text("no records here")
            with pytest.raises(InputError, match=message):
                open_source(tmp_path / name)
