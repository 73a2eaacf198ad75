from __future__ import annotations

import gc
import os
import pickle
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import msgpack
import pytest
from format_files import png, records, write_lmdb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from partialfc.core.errors import InputError
from partialfc.data.images import UnreadableImage
from partialfc.data.loader import Loader
from partialfc.data.sources import lmdb as source_module
from partialfc.data.sources import open_source
from partialfc.data.sources.base import read_image

Copy = Callable[[Path], Path]


class TestRealFile:
    def test_records(self, copy_of: Copy, real_lmdb: Path) -> None:
        folder = copy_of(real_lmdb)
        source = open_source(folder)
        assert (source.format, len(source), source.num_classes, source.identities) == ("lmdb", 48, 8, None)
        assert source.labels().tolist() == [label for label in range(8) for _ in range(6)]
        sample, image = read_image(source, 47)
        assert (sample.label, image.shape) == (7, (112, 112, 3))
        assert sample.name == source.name(47) == f"record 47 of {folder / 'train.lmdb'}"
        with pytest.raises(IndexError):
            source.read(48)

    def test_it_is_checked_once(self, copy_of: Copy, real_lmdb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = copy_of(real_lmdb)
        open_source(folder)
        monkeypatch.setattr(source_module, "_scan_apart", lambda path: pytest.fail("checked again"))
        first, second = open_source(folder), open_source(folder)
        assert first.read(3) == second.read(3)  # LMDB itself refuses to open a file twice
        del first, second
        gc.collect()
        assert open_source(folder).read(3).label == 0

    def test_pickled_for_a_spawned_worker(self, copy_of: Copy, real_lmdb: Path) -> None:
        source = open_source(copy_of(real_lmdb))
        source.read(0)
        assert pickle.loads(pickle.dumps(source)).read(30) == source.read(30)  # noqa: S301

    @pytest.mark.slow
    @pytest.mark.multiprocess
    def test_workers_open_it_anew(self, copy_of: Copy, real_lmdb: Path) -> None:
        source = open_source(copy_of(real_lmdb))
        batches = [
            [batch.images.sum().item() for batch in loader.batches(0, 8)]
            for loader in (
                Loader(source, global_batch_size=8, micro_batch_size=8, seed=1, workers=workers) for workers in (0, 2)
            )
        ]
        assert batches[0] == batches[1]


class TestForms:
    def test_a_folder_with_data_mdb(self, tmp_path: Path) -> None:
        big = (1 << 24) + 1
        write_lmdb(tmp_path / "data.mdb", records([big, 0]))
        source = open_source(tmp_path)
        assert (source.labels().tolist(), source.num_classes) == ([big, 0], big + 1)
        assert source.read(1).encoded == png(1)

    def test_records_that_cannot_be_read(self, tmp_path: Path) -> None:
        values = records([0, 1, 2, 3, 4, 5])
        del values[b"1"], values[b"__classnum__"]
        values |= {b"2": b"\xc1", b"3": msgpack.packb([png(3), -1]), b"4": msgpack.packb([png(4), "4"])}
        source = open_source(write_lmdb(tmp_path / "a.lmdb", values))
        assert source.labels().tolist() == [0, -1, -1, -1, -1, 5]
        assert source.num_classes == 6
        with pytest.raises(UnreadableImage, match=r"record 1 of .*a\.lmdb: its key is missing"):
            source.read(1)
        for index in (2, 3, 4):
            with pytest.raises(UnreadableImage, match=rf"record {index} of .*a\.lmdb: its value is no array"):
                source.read(index)

    def test_several_files(self, tmp_path: Path) -> None:
        for name in ("a.lmdb", "b.lmdb"):
            write_lmdb(tmp_path / name, records([0]))
        with pytest.raises(InputError, match=r"several \.lmdb files"):
            open_source(tmp_path)
        assert len(open_source(tmp_path / "a.lmdb")) == 1


class TestDamage:
    def test_a_truncated_file_that_kills_its_reader(
        self, copy_of: Copy, real_lmdb: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = copy_of(real_lmdb) / "train.lmdb"
        os.truncate(path, 200_000)
        with pytest.raises(InputError, match=r"train\.lmdb is no sound LMDB file \(it has 200000 bytes"):
            open_source(path)
        # Without that check, the pages that are missing end the process.
        code = "import os; os.path.getsize = lambda path: 1 << 40; import partialfc.data.sources.lmdb as module"
        monkeypatch.setattr(source_module, "_SCAN", source_module._SCAN.replace("import sys", f"import sys; {code}"))
        with pytest.raises(InputError, match=r"train\.lmdb is no sound LMDB file \(reading it ends .* SIGBUS"):
            open_source(path)

    @pytest.mark.parametrize(
        ("values", "reason"),
        [
            ({b"0": b"x"}, "its __len__ is no whole number"),
            (records([0]) | {b"__len__": msgpack.packb(1 << 39)}, "it has 3 keys and __len__ is 549755813888"),
            (records([0]) | {b"__len__": msgpack.packb("1")}, "its __len__ is no whole number"),
            (records([0]) | {b"__len__": msgpack.packb(0)}, "__len__ is 0"),
            (records([0]) | {b"__classnum__": msgpack.packb(-1)}, "its __classnum__ is no whole number"),
            (records([0]) | {b"0": pickle.dumps((b"x", 0))}, "no value is an array of image bytes"),
        ],
    )
    def test_values(self, tmp_path: Path, values: dict[bytes, Any], reason: str) -> None:
        path = write_lmdb(tmp_path / "a.lmdb", values)
        with pytest.raises(InputError, match=rf"a\.lmdb is no sound LMDB file \(.*{reason}"):
            open_source(path)

    @pytest.mark.parametrize("content", [b"", b"oops" * 4000])
    def test_other_files(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.lmdb").write_bytes(content)
        with pytest.raises(InputError, match=r"a\.lmdb is no sound LMDB file"):
            open_source(tmp_path)

    @pytest.mark.parametrize("package", ["lmdb", "msgpack"])
    def test_without_a_package(
        self, copy_of: Copy, real_lmdb: Path, package: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def find(name: str) -> ModuleSpec | None:
            return None if name == package else ModuleSpec(name, None)

        monkeypatch.setattr(source_module, "find_spec", find)
        with pytest.raises(InputError, match=rf"need {package}: pip install 'partialfc\[formats\]'"):
            open_source(copy_of(real_lmdb))

    @pytest.mark.slow
    @settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.data())
    def test_changed_bytes(self, tmp_path: Path, real_lmdb: Path, data: st.DataObject) -> None:
        """Whatever the file does to the process that reads it, here is an error or a set that can be read."""
        content = bytearray((real_lmdb / "train.lmdb").read_bytes())
        for _ in range(data.draw(st.integers(1, 30))):
            page = data.draw(st.sampled_from([0, 1, 2, 97, 98]) | st.integers(0, 98)) * 4096
            content[page + data.draw(st.integers(0, 64) | st.integers(0, 4095))] = data.draw(st.integers(0, 255))
        path = tmp_path / f"{data.draw(st.integers(0, 1 << 60))}.lmdb"
        path.write_bytes(content)
        try:
            source = open_source(path)
        except InputError as error:
            assert path.name in str(error)  # noqa: PT017
            return
        for index in range(len(source)):
            try:
                source.read(index)
            except UnreadableImage:
                continue
