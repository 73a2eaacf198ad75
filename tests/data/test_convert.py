from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_files import png, samples, write_lmdb, write_tar
from format_files import records as lmdb_records

from partialfc.core.errors import InputError, JobError
from partialfc.data import convert as module
from partialfc.data import convert_targets
from partialfc.data.convert import convert
from partialfc.data.inspect import inspect
from partialfc.data.sources import open_source
from partialfc.data.sources.base import Source, file_name
from partialfc.data.sources.recordio import RecordReader, RecordWriter

Copy = Callable[[Path], Path]
TARGETS = ("recordio", "folder", "webdataset", "parquet")
HASH = "48204531bb415f7710f324dcea8d98aaace2f2aaaa20721a85719a482f50be5f"


def content(source: Source) -> list[tuple[bytes, int]]:
    return sorted((sample.encoded, sample.label) for sample in map(source.read, range(len(source))))


@pytest.fixture
def named(tmp_path: Path) -> Path:
    """An image folder with an empty identity, deeper folders, and names that are hard to keep."""
    root = tmp_path / "named"
    for number, name in enumerate(["a/1.png", "a/1.jpg", "a/video/1.png", "b/x.y.png", "b/x_y.png", "d/ü 2.png"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(number))
    (root / "c").mkdir()
    return root


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "fixture",
    [
        "real_parquet",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("with_header", "im2rec", "unpacked", "real_webdataset", "real_lmdb")
        ),
    ],
)
def test_all_formats_to_all_formats(
    fixture: str, target: Any, tmp_path: Path, copy_of: Copy, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(fixture)
    path = path if path.is_relative_to(tmp_path) else copy_of(path)
    before = inspect(path)
    assert before["sha256_of_decoded"] == HASH
    facts = convert(path, tmp_path / "out", target)
    after = inspect(tmp_path / "out")
    assert (facts["images"], facts["classes"], facts["unreadable"]) == (48, 8, 0)
    assert after.pop("format").startswith(target)
    del before["format"]
    for report in (before, after):  # with the names of files
        del report["advice"], report["duplicates"]["groups"]
    assert after == before
    assert content(open_source(tmp_path / "out")) == content(open_source(path))
    assert [name for name in os.listdir(tmp_path) if "writing" in name] == []


class TestNames:
    @pytest.mark.parametrize("target", TARGETS)
    def test_identities_and_files_keep_theirs(self, named: Path, tmp_path: Path, target: Any) -> None:
        convert(named, tmp_path / "out", target)
        source, original = open_source(tmp_path / "out"), open_source(named)
        assert (source.num_classes, source.identities) == (4, ["a", "b", "c", "d"])
        assert content(source) == content(original)
        names = {source.read(index).encoded: file_name(source, index) for index in range(6)}
        expected = {original.read(index).encoded: file_name(original, index) for index in range(6)}
        if target in ("recordio", "parquet"):
            assert names == expected
        else:
            # One key, or one file without its suffix, is one image; keys have no dots.
            assert {len(Path(name).parts) for name in names.values()} == {2, 3}
            assert names[png(2)] == "a/video/1.png"
            assert names[png(5)] == "d/ü 2.png"
            assert sorted([names[png(0)], names[png(1)]]) == ["a/1-1.png", "a/1.jpg"]
        assert all(names[source.read(index).encoded] in source.name(index) for index in range(6))

    @pytest.mark.parametrize("target", ["recordio", "webdataset", "parquet"])
    def test_there_and_back(self, named: Path, tmp_path: Path, target: Any) -> None:
        (named / "a" / "1.jpg").unlink()
        (named / "b" / "x.y.png").unlink()
        convert(named, tmp_path / "there", target)
        convert(tmp_path / "there", tmp_path / "back", "folder")
        for path in sorted(named.rglob("*")):
            assert (tmp_path / "back" / path.relative_to(named)).is_dir() == path.is_dir()
            assert path.is_dir() or (tmp_path / "back" / path.relative_to(named)).read_bytes() == path.read_bytes()

    def test_identities_in_another_order_or_unfit_for_folders(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "a.tar", samples([0, 1, 2]))
        classes = {"schema_version": 1, "num_classes": 3, "identities": ["b/..", ".a", "a\n"]}
        (tmp_path / "partialfc-classes.json").write_text(json.dumps(classes))
        convert(tmp_path / "a.tar", tmp_path / "out", "folder")
        assert open_source(tmp_path / "out").identities == ["0_b_..", "1__.a", "2_a_"]
        assert content(open_source(tmp_path / "out")) == content(open_source(tmp_path / "a.tar"))

    def test_file_names_that_lead_elsewhere(self, tmp_path: Path) -> None:
        names = ["../../x", "/etc/y", "./x/../z", "n" * 240, "a\\b", "./.../w"]
        members: list[tuple[str, bytes]] = []
        for number, name in enumerate(names):
            members += [(f"{name}.png", png(number)), (f"{name}.cls", b"0")]
        write_tar(tmp_path / "a.tar", members)
        convert(tmp_path / "a.tar", tmp_path / "out", "folder")
        source = open_source(tmp_path / "out")
        assert content(source) == content(open_source(tmp_path / "a.tar"))
        assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == ["a.tar", "out"]

    def test_a_file_of_names_that_belongs_to_another_set(self, named: Path, tmp_path: Path) -> None:
        convert(named, tmp_path / "out", "recordio")
        names = tmp_path / "out" / "train.names.tsv"
        assert names.read_text(encoding="utf-8").splitlines()[0] == "1\ta/1.jpg"
        names.write_text("7\tx.jpg\n")
        source = open_source(tmp_path / "out")
        assert source.name(0) == f"record 1 of {tmp_path / 'out' / 'train.rec'}"
        names.write_text("")
        assert file_name(open_source(tmp_path / "out"), 0) == ""


class TestLabels:
    @pytest.mark.parametrize("target", ["webdataset", "parquet"])
    def test_past_what_recordio_holds(self, tmp_path: Path, target: Any) -> None:
        big = (1 << 24) + 1
        write_tar(tmp_path / "a.tar", samples([big, 3]))
        convert(tmp_path / "a.tar", tmp_path / "out", target)
        assert sorted(open_source(tmp_path / "out").labels().tolist()) == [3, big]
        with pytest.raises(InputError, match=rf"a\.tar has labels up to {big}, but RecordIO .* convert to folder"):
            convert(tmp_path / "a.tar", tmp_path / "rec", "recordio")

    def test_outside_of_the_classes(self, tmp_path: Path) -> None:
        with RecordWriter(tmp_path / "train.rec", header=False) as writer:
            for label in (0, 1, 5):
                writer.write(png(label), label)
        (tmp_path / "property").write_text("2,16,16\n")
        with pytest.raises(InputError, match=r"label of record 2 of .* is 5, outside the range \[0, 2\)"):
            convert(tmp_path, tmp_path / "out", "folder")


class TestUnreadable:
    def test_records_are_left_out_and_named(self, tmp_path: Path, copy_of: Copy, im2rec: Path) -> None:
        folder = copy_of(im2rec)
        os.truncate(folder / "train.rec", 300_000)
        target: Any
        for target in TARGETS:
            facts = convert(folder, tmp_path / target, target)
            assert facts["images"] + facts["unreadable"] == 48
            assert len(facts["unreadable_records"]) == facts["unreadable"] > 0
            assert all("past the end" in reason for reason in facts["unreadable_records"])
            assert inspect(tmp_path / target)["images"] == facts["images"]

    def test_images_that_cannot_be_decoded_are_copied(self, tmp_path: Path, numbered: Callable[..., Path]) -> None:
        folder = numbered(6, broken=(3,))
        target: Any
        for target in TARGETS:
            assert convert(folder, tmp_path / target, target)["unreadable"] == 0
            assert inspect(tmp_path / target)["unreadable"] == 1

    def test_nothing_can_be_read(self, tmp_path: Path) -> None:
        (tmp_path / "a.lst").write_text("0\t0\tx.png\n")
        with pytest.raises(InputError, match=r"None of the 1 records of .*a\.lst can be read"):
            convert(tmp_path / "a.lst", tmp_path / "out", "folder")


class TestCompressed:
    @pytest.mark.parametrize("suffix", [".tar.gz", ".TGZ"])
    def test_shards_are_unpacked(self, tmp_path: Path, real_webdataset: Path, suffix: str) -> None:
        packed = tmp_path / "packed"
        packed.mkdir()
        for shard in real_webdataset.iterdir():
            (packed / f"{shard.stem}{suffix}").write_bytes(gzip.compress(shard.read_bytes(), 1))
        assert convert(packed, tmp_path / "out", "webdataset")["images"] == 48
        assert inspect(tmp_path / "out")["sha256_of_decoded"] == HASH
        assert sorted(os.listdir(tmp_path / "out"))[-2:] == ["partialfc-classes.json", "train-000000.tar"]

    def test_an_archive_beside_a_set_is_left_alone(self, named: Path, tmp_path: Path, real_webdataset: Path) -> None:
        shard = next(real_webdataset.iterdir())
        (named / "old.tar.gz").write_bytes(gzip.compress(shard.read_bytes(), 1))
        facts = convert(named, tmp_path / "out", "recordio")
        assert facts["images"] == 6
        assert "old.tar.gz" in " ".join(facts["notes"])

    def test_an_archive_beside_shards(self, tmp_path: Path, real_parquet: Path, real_webdataset: Path) -> None:
        """It is no part of a Parquet set, but it may be one of a WebDataset."""
        packed = gzip.compress(next(real_webdataset.iterdir()).read_bytes(), 1)
        for name, kind in (("parquet", real_parquet), ("shards", real_webdataset)):
            shutil.copytree(kind if kind.is_dir() else kind.parent, tmp_path / name)
            (tmp_path / name / "old.tar.gz").write_bytes(packed)
        assert convert(tmp_path / "parquet", tmp_path / "out", "folder")["images"] == 48
        with pytest.raises(InputError, match=r"has \.tar and \.tar\.gz files: move those of one kind away"):
            convert(tmp_path / "shards", tmp_path / "out 2", "folder")
        shard = next((tmp_path / "shards").glob("*.tar"))
        shard.write_bytes(shard.read_bytes()[:700])
        with pytest.raises(InputError, match=shard.name):  # a damaged set is no reason to take the archive
            convert(tmp_path / "shards", tmp_path / "out 2", "folder")

    def test_two_archives_of_one_name(self, tmp_path: Path, real_webdataset: Path) -> None:
        for name in ("a.tgz", "a.tar.gz"):
            packed = gzip.compress(next(real_webdataset.iterdir()).read_bytes(), 1)
            (tmp_path / "in").mkdir(exist_ok=True)
            (tmp_path / "in" / name).write_bytes(packed)
        with pytest.raises(InputError, match=r"Two files in .* would unpack to a\.tar"):
            convert(tmp_path / "in", tmp_path / "out", "folder")

    @pytest.mark.parametrize(
        "damage", [lambda data: data[:2000], lambda data: b"oops", lambda data: data[:50] + b"\0" * 50]
    )
    def test_damaged(self, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
        write_tar(tmp_path / "a.tar", [(f"{n}.{s}", os.urandom(900)) for n in range(5) for s in ("png", "npy")])
        (tmp_path / "b.tar.gz").write_bytes(damage(gzip.compress((tmp_path / "a.tar").read_bytes())))
        with pytest.raises(InputError, match=r"b\.tar\.gz is no sound \.gz file"):
            convert(tmp_path / "b.tar.gz", tmp_path / "out", "webdataset")


class TestInterruption:
    @pytest.fixture
    def parts(self, monkeypatch: pytest.MonkeyPatch, numbered: Callable[..., Path]) -> Path:
        """Thirty images, in parts of eight."""
        monkeypatch.setattr(module, "_PART", 8)
        return numbered(30, each=3)

    @pytest.mark.parametrize("target", TARGETS)
    @pytest.mark.parametrize(
        "stop_in", ["write", *(pytest.param(at, marks=pytest.mark.slow) for at in ("finish", "verify"))]
    )
    def test_it_goes_on_where_it_stopped(
        self, parts: Path, tmp_path: Path, target: Any, stop_in: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        kind: Any = convert_targets.TARGETS[target]
        writes: list[int] = []
        real_write = kind.write

        def write(self: Any, number: int, items: list[Any]) -> None:
            writes.append(number)
            real_write(self, number, items)
            if stop_in == "write" and number == 2:
                raise KeyboardInterrupt

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(kind, "write", write)
            if stop_in == "finish":
                patch.setattr(kind, "finish", stop)
            if stop_in == "verify":
                patch.setattr(module, "written_images", stop)
            with pytest.raises(KeyboardInterrupt):
                convert(parts, out, target)
        assert not out.exists()
        left = {2, 3, 4} if stop_in == "write" else set()
        stop_in = "never"
        monkeypatch.setattr(kind, "write", write)
        writes.clear()
        assert convert(parts, out, target)["images"] == 30
        assert set(writes) <= left
        assert content(open_source(out)) == content(open_source(parts))
        convert(parts, tmp_path / "at once", target)
        listing = [
            sorted(os.path.relpath(p, f) for p in f.rglob("*") if p.name[0] != ".") for f in (out, tmp_path / "at once")
        ]
        assert listing[0] == listing[1]

    @pytest.mark.slow
    @pytest.mark.multiprocess
    @pytest.mark.parametrize("target", TARGETS)
    def test_killed(self, tmp_path: Path, target: Any, numbered: Callable[..., Path]) -> None:
        data, out = numbered(400, each=4), tmp_path / "out"
        kills = 0
        for seconds in (0.05, 0.3, 0.6):
            process = multiprocessing.get_context("spawn").Process(target=_convert_slowly, args=(data, out, target))
            process.start()
            while process.is_alive() and not (tmp_path / ".out.writing" / ".journal").exists():
                process.join(0.01)
            process.join(seconds)
            kills += process.is_alive()
            process.kill()
            process.join()
        assert kills
        if not out.exists():
            convert_in_parts(data, out, target)
        assert content(open_source(out)) == content(open_source(data))

    def test_other_images_under_the_same_names_are_refused(
        self, tmp_path: Path, named: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(module, "_sum_of_written", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                convert(named, tmp_path / "out", "recordio")
        for path in named.rglob("*.png"):
            path.write_bytes(png(99))
        with pytest.raises(InputError, match=r"\.out\.writing is what another conversion, or one of other data"):
            convert(named, tmp_path / "out", "recordio")

    @pytest.mark.parametrize("target", TARGETS)
    @pytest.mark.parametrize("step", ["rmtree", "rename"])
    def test_it_goes_on_where_it_was_tidying_up(
        self, parts: Path, tmp_path: Path, target: Any, step: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Stopped when the first folder of what is left over is gone, and when all of it is."""
        real = shutil.rmtree

        def stop(path: Path, *others: Any, **options: Any) -> None:
            real(tmp_path / ".out.writing" / convert_targets.PARTS, ignore_errors=True)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            if step == "rmtree":
                patch.setattr(module.shutil, "rmtree", stop)
            else:
                patch.setattr(module, "describe_copy", lambda *_: patch.setattr(Path, "rename", stop))
            with pytest.raises(KeyboardInterrupt):
                convert(parts, tmp_path / "out", target)
        assert convert(parts, tmp_path / "out", target)["images"] == 30
        assert content(open_source(tmp_path / "out")) == content(open_source(parts))
        left = {module._JOURNAL, module._UNPACKED, module._VERIFIED, convert_targets.PARTS}
        assert not left & {path.name for path in (tmp_path / "out").iterdir()}

    def test_other_data_are_refused(self, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(module, "written_images", lambda *_: iter([(b"", 0)]))
            with pytest.raises(JobError, match=r"is not what .* holds"):
                convert(parts, tmp_path / "out", "folder")
        with pytest.raises(InputError, match=r"\.out\.writing is what another conversion"):
            convert(parts, tmp_path / "out", "parquet")
        shutil.rmtree(tmp_path / ".out.writing")
        assert convert(parts, tmp_path / "out", "parquet")["images"] == 30

    def test_damage_that_the_storage_does_is_noticed(
        self, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kind: Any = convert_targets.TARGETS["folder"]
        real = kind.finish

        def finish(self: Any) -> None:
            real(self)
            victim = next(self._work.rglob("*.png"))
            victim.write_bytes(victim.read_bytes()[:-1] + b"x")

        monkeypatch.setattr(kind, "finish", finish)
        with pytest.raises(JobError, match="is the storage sound"):
            convert(parts, tmp_path / "out", "folder")


def convert_in_parts(data: Path, out: Path, target: Any) -> None:
    module._PART = 8
    try:
        convert(data, out, target)
    finally:
        module._PART = 8192


def _convert_slowly(data: Path, out: Path, target: Any) -> None:
    real = module._write_part

    def slow(*arguments: Any) -> Any:
        import time

        time.sleep(0.02)
        return real(*arguments)

    module._write_part = slow  # type: ignore[assignment]
    convert_in_parts(data, out, target)


def test_parts_hold_whole_identities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PART", 4)
    labels = np.array([-1, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 3, 9, 9])
    starts = module._part_starts(labels)
    assert starts == [0, 4, 6, 12, 15]
    assert module._part_starts(np.array([5])) == [0, 1]


def test_a_set_is_not_written_into_an_image_folder(named: Path) -> None:
    with pytest.raises(InputError, match="would be an identity of"):
        convert(named, named / "out", "webdataset")
    assert not (named / "out").exists()


def test_what_is_there_already_is_left_alone(tmp_path: Path, copy_of: Copy, im2rec: Path) -> None:
    folder = copy_of(im2rec)
    with pytest.raises(InputError, match="exists already"):
        convert(folder, folder, "folder")
    with pytest.raises(InputError, match="There is no format 'zip'"):
        convert(folder, tmp_path / "out", "zip")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="nowhere does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "out", "folder")
    assert sorted(os.listdir(tmp_path)) == ["im2rec"]


def test_recordio_has_the_layout_of_the_published_sets(tmp_path: Path) -> None:
    convert(write_lmdb(tmp_path / "a.lmdb", lmdb_records([1, 0, 1, 3])), tmp_path / "out", "recordio")
    reader = RecordReader(tmp_path / "out" / "train.rec")
    assert isinstance(reader.keys, range)
    header = reader.read(0)
    assert (header.is_bookkeeping, header.labels) == (True, (5.0, 9.0))
    assert [list(reader.read(row).labels) for row in range(1, 9)] == [
        [0], [1], [1], [3], [1, 2], [2, 4], [5, 5], [4, 5],
    ]  # fmt: skip
    assert (tmp_path / "out" / "property").read_text() == "4,16,16\n"
    assert not (tmp_path / "out" / "train.names.tsv").exists()
