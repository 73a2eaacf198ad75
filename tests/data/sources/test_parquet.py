from __future__ import annotations

import io
import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from format_files import png, table, write_parquet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from partialfc.core.errors import InputError
from partialfc.data.images import UnreadableImage
from partialfc.data.loader import Loader
from partialfc.data.sources import open_source
from partialfc.data.sources.base import file_name, read_image
from partialfc.data.sources.parquet import read_rows

Copy = Callable[[Path], Path]


def write_arrow(path: Path, content: pa.Table, form: str = "file") -> Path:
    new = pa.ipc.new_file if form == "file" else pa.ipc.new_stream
    with new(str(path), content.schema) as writer:
        writer.write_table(content, max_chunksize=2)
    return path


class TestRealFiles:
    def test_rows(self, copy_of: Copy, real_parquet: Path) -> None:
        folder = copy_of(real_parquet)
        source = open_source(folder)
        assert (source.format, len(source), source.num_classes) == ("parquet", 48, 8)
        assert source.identities == [f"id{label}" for label in range(8)]
        assert source.labels().tolist() == [label for label in range(8) for _ in range(6)]
        for index in (47, 0, 24):
            sample, image = read_image(source, index)
            assert (sample.label, image.shape) == (index // 6, (112, 112, 3))
            assert sample.name == source.name(index)
        assert source.name(25) == f"row 1 of {folder / 'train-00001-of-00002.parquet'} (1.jpg)"
        assert open_source(folder, num_classes=9).identities is None
        with pytest.raises(IndexError):
            source.read(48)

    def test_the_copy_is_kept_and_renewed(
        self, copy_of: Copy, real_parquet: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = copy_of(real_parquet)
        open_source(folder)
        assert "copying Parquet to memory-mapped Arrow files, once" in capsys.readouterr().err
        copies = sorted(folder.glob(".*.arrow"))
        assert len(copies) == 2
        assert len(open_source(folder)) == 48
        assert capsys.readouterr().err == ""
        write_parquet(folder / "train-00001-of-00002.parquet", table([7, 6]))
        assert open_source(folder).labels().tolist()[24:] == [7, 6]
        assert [copy.exists() for copy in copies] == [True, False]

    def test_where_there_is_no_room_for_a_copy(
        self, copy_of: Copy, real_parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(path: Path) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("partialfc.data.sources.derived.atomic_file", refuse)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        with pytest.raises(InputError, match=r"no room at .*: set XDG_CACHE_HOME"):
            open_source(copy_of(real_parquet))

    def test_pickled_for_a_spawned_worker(self, copy_of: Copy, real_parquet: Path) -> None:
        source = open_source(copy_of(real_parquet))
        assert pickle.loads(pickle.dumps(source)).read(30) == source.read(30)  # noqa: S301

    @pytest.mark.parametrize("workers", [0, pytest.param(2, marks=[pytest.mark.slow, pytest.mark.multiprocess])])
    def test_resumed_in_mid_epoch(self, copy_of: Copy, real_parquet: Path, workers: int) -> None:
        source = open_source(copy_of(real_parquet))
        loader = Loader(source, global_batch_size=7, micro_batch_size=7, seed=3, workers=workers)
        through = list(loader.batches(0, 10))
        for first, second in zip(through[4:], loader.batches(4, 10), strict=True):
            assert bool((first.images == second.images).all())
            assert first.labels.tolist() == second.labels.tolist()


class TestForms:
    @pytest.mark.parametrize("form", ["file", "stream"])
    def test_arrow_in_place(self, tmp_path: Path, form: str) -> None:
        write_arrow(tmp_path / "data-00000-of-00002.arrow", table([0, 4, 2]), form)
        write_arrow(tmp_path / "data-00001-of-00002.arrow", table([1]), form)
        write_arrow(tmp_path / "cache-1234.arrow", table([9]), form)
        source = open_source(tmp_path)
        assert (source.format, source.labels().tolist()) == ("arrow", [0, 4, 2, 1])
        assert [source.read(index).encoded for index in range(4)] == [png(0), png(1), png(2), png(0)]
        assert source.name(3) == f"row 0 of {tmp_path / 'data-00001-of-00002.arrow'} (0.png)"
        assert sorted(path.name for path in tmp_path.iterdir())[0] == "cache-1234.arrow"  # nothing was written

    @pytest.mark.parametrize("label_type", [pa.int32(), pa.uint64(), pa.int8()])
    def test_any_whole_numbers(self, tmp_path: Path, label_type: Any) -> None:
        assert open_source(write_parquet(tmp_path / "a.parquet", table([3, 5], label_type))).labels().tolist() == [3, 5]

    def test_large_labels_and_values(self, tmp_path: Path) -> None:
        big = (1 << 24) + 1
        large = pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])
        content = table([big, 0]).set_column(0, "image", table([0, 0])["image"].cast(large))
        source = open_source(write_parquet(tmp_path / "a.parquet", content))
        assert source.labels().tolist() == [big, 0]
        assert source.read(1).encoded == png(1)

    def test_without_paths(self, tmp_path: Path) -> None:
        content = pa.table({"label": [0], "extra": ["x"], "image": [{"bytes": png(0)}]})
        source = open_source(write_parquet(tmp_path / "a.parquet", content))
        assert file_name(source, 0) == ""
        assert source.name(0) == f"row 0 of {tmp_path / 'a.parquet'}"
        assert source.identities is None

    def test_a_row_without_an_image(self, tmp_path: Path) -> None:
        for image in ({"bytes": None, "path": "x.jpg"}, None):
            content = pa.table({"image": [{"bytes": png(0), "path": "y.jpg"}, image], "label": [0, 1]})
            source = open_source(write_parquet(tmp_path / "a.parquet", content))
            assert source.read(0).encoded == png(0)
            with pytest.raises(UnreadableImage, match=r"row 1 of .*a\.parquet.*: it holds no bytes"):
                source.read(1)

    def test_nonsense_in_the_schema(self, tmp_path: Path) -> None:
        for text in ("{", "[]", json.dumps({"info": {"features": {"label": {"names": 3}}}})):
            content = table([2]).replace_schema_metadata({"huggingface": text})
            source = open_source(write_parquet(tmp_path / "a.parquet", content))
            assert (source.num_classes, source.identities) == (3, None)


class TestDamage:
    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (table([0]).rename_columns(["picture", "label"]), "has the columns picture, label: rename one to image"),
            (table([0]).rename_columns(["image", "class"]), "has the columns image, class: rename one to label"),
            (table(["x"], pa.string()), r"column label of .*a\.parquet is string"),
            (table([1.5], pa.float64()), r"column label of .*a\.parquet is double"),
            (pa.table({"image": [png(0)], "label": [0]}), r"column image of .*a\.parquet is binary"),
            (pa.table({"image": [{"path": "x"}], "label": [0]}), r"column image of .*a\.parquet is struct<path"),
            (table([0, 1, -1]), r"label of row 2 of .*a\.parquet is -1"),
            (table([0, 1, None]), r"label of row 2 of .*a\.parquet is None"),
            (table([(1 << 64) - 1], pa.uint64()), r"a\.parquet cannot be read from row 0"),
            (table([0]).slice(0, 0), "holds no rows"),
        ],
    )  # fmt: skip
    def test_columns(self, tmp_path: Path, content: pa.Table, reason: str) -> None:
        write_parquet(tmp_path / "a.parquet", content)
        with pytest.raises(InputError, match=reason):
            open_source(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]

    @pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
    def test_files(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        (write_parquet if name == "a.parquet" else write_arrow)(path, table(range(20)))
        size = path.stat().st_size
        for damage in (lambda: os.truncate(path, size // 2), lambda: path.write_bytes(b"oops"), path.write_bytes(b"")):
            if callable(damage):
                damage()
            with pytest.raises(InputError, match=rf"{name} cannot be read from row \d+ on"):
                open_source(path)

    def test_an_empty_arrow_file(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"a\.arrow holds no rows"):
            open_source(write_arrow(tmp_path / "a.arrow", table([0]).slice(0, 0)))

    def test_without_pyarrow(self, copy_of: Copy, real_parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(InputError, match=r"need pyarrow: pip install 'partialfc\[formats\]'"):
            open_source(copy_of(real_parquet))

    @settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.data())
    @pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
    def test_changed_bytes_end_in_an_error_or_in_rows(self, tmp_path: Path, name: str, data: st.DataObject) -> None:
        content = bytearray(_bytes_of(name))
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path = tmp_path / name
        path.write_bytes(content[: len(content) - data.draw(st.sampled_from([0, 0, 0, 1, 100]))])
        try:
            for rows in read_rows(path):
                assert (rows.labels >= 0).all()
                assert len(rows.images.to_pylist()) == len(rows.labels)
        except InputError as error:
            assert name in str(error)  # noqa: PT017


def _bytes_of(name: str) -> bytes:
    stream = io.BytesIO()
    if name == "a.parquet":
        pa.parquet.write_table(table(range(6)), stream)
    else:
        with pa.ipc.new_file(stream, table([0]).schema) as writer:
            writer.write_table(table(range(6)), max_chunksize=2)
    return stream.getvalue()


def test_labels_are_one_array(copy_of: Copy, real_parquet: Path) -> None:
    assert open_source(copy_of(real_parquet)).labels().dtype == np.int64
