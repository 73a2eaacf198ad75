from __future__ import annotations

import json
import os
import pickle
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from format_files import png, samples, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from partialfc.core.errors import InputError
from partialfc.core.files import atomic_file
from partialfc.data.images import UnreadableImage
from partialfc.data.loader import Loader
from partialfc.data.sources import open_source, webdataset
from partialfc.data.sources.base import file_name, read_image
from partialfc.data.sources.tar_members import BLOCK, DamagedTar, member_head, members

Copy = Callable[[Path], Path]


class TestRealShards:
    def test_samples(self, copy_of: Copy, real_webdataset: Path) -> None:
        folder = copy_of(real_webdataset)
        source = open_source(folder)
        assert (source.format, len(source), source.num_classes, source.identities) == ("webdataset", 48, 8, None)
        assert source.labels().tolist() == [label for label in range(8) for _ in range(6)]
        for index in (47, 0, 24):
            sample, image = read_image(source, index)
            assert (sample.label, image.shape) == (index // 6, (112, 112, 3))
            assert sample.name == source.name(index)
        assert source.name(25) == f"01/000001.jpg in {folder / 'train-000001.tar'}"
        with pytest.raises(IndexError):
            source.read(48)

    def test_the_index_is_kept_and_renewed(
        self, copy_of: Copy, real_webdataset: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = copy_of(real_webdataset)
        open_source(folder)
        (index,) = folder.glob(".*.npy")
        monkeypatch.setattr(webdataset, "build_index", lambda shards: pytest.fail("the index was not used"))
        assert len(open_source(folder)) == 48
        monkeypatch.undo()
        write_tar(folder / "train-000001.tar", samples([9, 9, 4]))
        assert open_source(folder).labels().tolist()[24:] == [9, 9, 4]
        assert not index.exists()  # the one of the old shard makes way

    def test_an_index_that_is_damaged_is_made_anew(self, copy_of: Copy, real_webdataset: Path) -> None:
        folder = copy_of(real_webdataset)
        open_source(folder)
        (index,) = folder.glob(".*.npy")
        os.truncate(index, 200)
        assert len(open_source(folder)) == 48

    def test_several_threads(self, copy_of: Copy, real_webdataset: Path) -> None:
        """Files are opened and closed by threads that race for them."""
        folder = copy_of(real_webdataset)
        source = open_source(folder)
        expected = [source.read(index).encoded for index in range(48)]
        for _ in range(20):
            source = open_source(folder)
            with ThreadPoolExecutor(8) as pool:
                assert [sample.encoded for sample in pool.map(source.read, range(48))] == expected

    def test_pickled_for_a_spawned_worker(self, copy_of: Copy, real_webdataset: Path) -> None:
        source = open_source(copy_of(real_webdataset))
        assert pickle.loads(pickle.dumps(source)).read(30) == source.read(30)  # noqa: S301

    def test_resumed_in_mid_epoch(self, copy_of: Copy, real_webdataset: Path) -> None:
        source = open_source(copy_of(real_webdataset))
        loader = Loader(source, global_batch_size=7, micro_batch_size=7, seed=3)
        through = list(loader.batches(0, 10))
        resumed = list(loader.batches(4, 10))
        for first, second in zip(through[4:], resumed, strict=True):
            assert bool((first.images == second.images).all())
            assert first.labels.tolist() == second.labels.tolist()


class TestForms:
    def test_keys_suffixes_and_labels(self, tmp_path: Path) -> None:
        big = (1 << 24) + 1
        files = [
            ("a/x.JPG", png(0)), ("a/x.json", b'{"label": 3, "age": 7}'),
            ("a/y.CLS", b" 5\n"), ("a/y.png", png(1)), ("a/y.landmarks.npy", b"..."),
            ("b/x.json", b"%d" % big), ("b/x.PnG", png(2)),
            ("b/.hidden.png", b""), ("b/__meta__", b""), ("c.d/x.image.png", png(3)), ("c.d/x.cls", b"0"),
        ]  # fmt: skip
        source = open_source(write_tar(tmp_path / "x.tar", files))
        assert source.labels().tolist() == [3, 5, big, 0]
        assert [source.read(index).encoded for index in range(4)] == [png(number) for number in range(4)]
        assert [file_name(source, index) for index in range(4)] == ["a/x.JPG", "a/y.png", "b/x.PnG", "c.d/x.image.png"]
        assert source.num_classes == big + 1
        assert open_source(tmp_path / "x.tar", num_classes=1 << 30).num_classes == 1 << 30

    @pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_formats_of_tar(self, tmp_path: Path, tar_format: int) -> None:
        long = f"{'d' * 90}/{'n' * 60}"
        extra = [("ü.png", png(4)), ("ü.cls", b"4"), *([] if tar_format == tarfile.USTAR_FORMAT else
                 [(f"{'d' * 290}.png", png(5)), (f"{'d' * 290}.cls", b"5")])]  # fmt: skip
        write_tar(tmp_path / "x.tar", [(f"{long}.png", png(3)), (f"{long}.cls", b"3"), *extra], tar_format)
        source = open_source(tmp_path / "x.tar")
        assert file_name(source, 0) == f"{long}.png"
        assert file_name(source, 1) == "ü.png"
        assert [source.read(index).encoded for index in range(len(source))] == [png(3), png(4), png(5)][: len(source)]

    def test_classes_beside_the_shards(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "x.tar", samples([0, 1]))
        classes = tmp_path / "partialfc-classes.json"
        classes.write_text(json.dumps({"schema_version": 1, "num_classes": 3, "identities": ["a", "b", "c"]}))
        source = open_source(tmp_path)
        assert (source.num_classes, source.identities) == (3, ["a", "b", "c"])
        assert open_source(tmp_path, num_classes=5).identities is None
        classes.write_text(json.dumps({"schema_version": 2, "num_classes": 3, "identities": None}))
        with pytest.raises(InputError, match=r"partialfc-classes.json has schema_version 2, and this partialfc reads"):
            open_source(tmp_path)
        classes.write_text("[1]")
        with pytest.raises(InputError, match=r"partialfc-classes.json does not name the classes"):
            open_source(tmp_path)

    def test_where_nothing_can_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_tar(tmp_path / "x.tar", samples([0, 1]))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        refused = [tmp_path]

        def refuse(path: Path) -> AbstractContextManager[BinaryIO]:
            if path.parent in refused:
                raise PermissionError(13, "Permission denied", str(path))
            return atomic_file(path)

        monkeypatch.setattr("partialfc.data.sources.derived.atomic_file", refuse)
        assert open_source(tmp_path).labels().tolist() == [0, 1]
        assert len(list((tmp_path / "cache" / "partialfc").iterdir())) == 1
        refused.append(tmp_path / "cache" / "partialfc")
        write_tar(tmp_path / "x.tar", samples([0, 1, 2]))
        assert open_source(tmp_path).labels().tolist() == [0, 1, 2]


class TestDamage:
    @pytest.mark.parametrize(
        ("files", "reason"),
        [
            ([("k/a.png", b""), ("b.png", b""), ("b.cls", b"0"), ("k/a.cls", b"0")], "k/a in .* are not adjacent"),
            ([("a.png", b""), ("a.PNG", b""), ("a.cls", b"0")], "Sample a in .* two files with one suffix"),
            ([("a.png", b""), ("a.jpg", b""), ("a.cls", b"0")], "Sample a in .* 2 images among"),
            ([("a.raw", b""), ("a.cls", b"0")], r"Sample a in .* 0 images among its files \.raw, \.cls"),
            ([("a.png", b"")], r"Sample a in .* has no label among its files \.png"),
            ([("a.png", b""), ("a.cls", b"")], "Sample a in .* has the label ''"),
            ([("a.png", b""), ("a.cls", b"-1")], "Sample a in .* has the label '-1'"),
            ([("a.png", b""), ("a.cls", b"1.5")], r"Sample a in .* has the label '1.5'"),
            ([("a.png", b""), ("a.cls", b"9" * 30)], "Sample a in .* has the label '999"),
            ([("a.png", b""), ("a.json", b'{"class": 1}')], "Sample a in .* has the label"),
            ([("a.png", b""), ("a.json", b'{"label": true}')], "Sample a in .* has the label"),
            ([("a.png", b""), ("a.json", b"[" * 60_000)], "Sample a in .* has the label"),
            ([], "holds no samples"),
        ],
    )
    def test_samples(self, tmp_path: Path, files: list[tuple[str, bytes]], reason: str) -> None:
        write_tar(tmp_path / "shard-0.tar", files)
        with pytest.raises(InputError, match=rf"(?s)^(?=.*shard-0\.tar).*{reason}"):
            open_source(tmp_path)

    def test_files(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "a.tar", samples(range(3)))
        content = path.read_bytes()
        for damaged, reason in {
            content[: 3 * 2048]: r"a\.tar is no sound tar file: it ends after 0002\.cls, without the blocks of zeros",
            content[:550]: r"a\.tar is no sound tar file: it ends inside 0000\.png",
            content[:4000]: r"a\.tar is no sound tar file: it ends after 0001\.cls",
            b"PK\3\4" + content[4:]: r"a\.tar is no sound tar file: no head of a member stands at byte 0",
            content[:1024] + b"oops" + content[1028:]: r"a\.tar is no sound .* byte 1024, after 0000\.png",
            b"": r"a\.tar is empty",
            bytes(1024): r"a\.tar holds no samples",
        }.items():
            path.write_bytes(damaged)
            with pytest.raises(InputError, match=reason):
                open_source(path)

    def test_compressed(self, tmp_path: Path) -> None:
        (tmp_path / "faces.tar.gz").write_bytes(b"")
        for path in (tmp_path, tmp_path / "faces.tar.gz"):
            with pytest.raises(InputError, match=rf"partialfc data convert {path} --out DIR --to webdataset"):
                open_source(path)

    def test_a_shard_that_shrinks_while_it_is_read(self, tmp_path: Path) -> None:
        source = open_source(write_tar(tmp_path / "a.tar", samples(range(3))))
        os.truncate(tmp_path / "a.tar", 1600)
        with pytest.raises(UnreadableImage, match=r"0002\.png in .*a\.tar: it runs past the end"):
            source.read(2)
        (tmp_path / "a.tar").unlink()
        assert source.read(0).encoded == png(0)  # still open


class TestMembers:
    def test_as_the_standard_library_writes_them(self, tmp_path: Path) -> None:
        for name in ("a.jpg", "d" * 80 + "/" + "n" * 90, "x" * 180, "ü/ß.png"):
            assert member_head(name, 5)[-BLOCK:][257:262] == b"ustar"
            content = member_head(name, 5) + b"12345" + bytes(3 * BLOCK - 5)
            (member,) = members(content)
            assert (os.fsdecode(member.name), member.size) == (name, 5)
            assert content[member.offset :][:5] == b"12345"

    @pytest.mark.parametrize(
        "records", [b"6 a=b\nno-length=12345678901", b"6 a=b\n0 a=b\n", b" a=b\n", b"99 a=b\n", b"6 ab\n\n"]
    )
    def test_a_damaged_extended_head_is_refused_and_does_not_loop(self, records: bytes) -> None:
        member = tarfile.TarInfo("x")
        member.type, member.size = tarfile.XHDTYPE, len(records)
        content = member.tobuf(tarfile.USTAR_FORMAT) + records.ljust(BLOCK, b"\0") + member_head("a", 0)
        with pytest.raises(DamagedTar, match="extended head at byte 512 is damaged"):
            list(members(content + bytes(2 * BLOCK)))

    def test_a_size_past_8_gib(self) -> None:
        head = bytearray(member_head("a.jpg", 0))
        head[124:136] = b"\x80" + (1 << 34).to_bytes(11, "big")
        head[148:156] = b"%06o\0 " % (sum(head[:148]) + 8 * 32 + sum(head[156:]))
        with pytest.raises(DamagedTar, match=r"it ends inside a\.jpg"):
            list(members(bytes(head)))

    @settings(max_examples=150, deadline=None)
    @given(st.data())
    def test_damage_ends_in_an_error_or_in_other_members(self, data: st.DataObject) -> None:
        content = bytearray()
        for number in range(3):
            name = data.draw(st.sampled_from(["a.jpg", "n" * 120, "ü" * 70])) + str(number)
            content += member_head(name, 5) + b"12345" + bytes(BLOCK - 5)
        content += bytes(2 * BLOCK)
        for _ in range(data.draw(st.integers(0, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        cut = bytes(content[: data.draw(st.integers(0, len(content)))])
        try:
            found = list(members(cut))
        except DamagedTar:
            return
        assert all(member.offset >= 0 and member.offset + member.size <= len(cut) for member in found)

    @settings(max_examples=200, deadline=None)
    @given(st.binary(max_size=600), st.sampled_from([b"x", b"g", b"L", b"K", b"0"]))
    def test_any_extended_head(self, text: bytes, kind: bytes) -> None:
        head = bytearray(member_head("a", len(text)))
        head[156:157] = kind
        head[148:156] = b"%06o\0 " % (sum(head[:148]) + 8 * 32 + sum(head[156:]))
        content = bytes(head) + text + bytes(-len(text) % BLOCK) + member_head("b.jpg", 0)
        with suppress(DamagedTar):
            list(members(content))


def test_names_take_no_memory_of_their_own(copy_of: Copy, real_webdataset: Path) -> None:
    source = open_source(copy_of(real_webdataset))
    assert isinstance(source, webdataset.WebDatasetSource)
    assert isinstance(source._rows, np.memmap)
