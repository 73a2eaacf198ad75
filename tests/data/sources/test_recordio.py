from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from copy import copy as copy_as_pickle_does
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partialfc.core.errors import InputError
from partialfc.data.sources import record_index
from partialfc.data.sources.record_index import MAGIC_BYTES, read_index, scan_records
from partialfc.data.sources.recordio import (
    LABEL_LIMIT,
    RecordReader,
    RecordWriter,
    UnreadableRecord,
    build_payload,
    build_record,
    class_of,
    parse_payload,
)

Copy = Callable[[Path], Path]

# Bodies in which the magic is likely, aligned and not.
bodies = st.lists(st.one_of(st.just(MAGIC_BYTES), st.binary(max_size=6)), max_size=12).map(b"".join)


def write_raw(path: Path, payloads: list[bytes]) -> list[int]:
    """Write a `.rec` without `.idx`; returns the offsets."""
    offsets = []
    with path.open("wb") as file:
        for payload in payloads:
            offsets.append(file.tell())
            file.write(build_record(payload))
    return offsets


def readable(reader: RecordReader) -> dict[int, bytes]:
    """Key and body of all records that can be read."""
    bodies = {}
    for row, key in enumerate(reader.keys):
        with contextlib.suppress(UnreadableRecord):
            bodies[int(key)] = reader.read(row).body
    return bodies


class TestRealFiles:
    def test_header_layout(self, with_header: Path) -> None:
        reader = RecordReader(with_header / "train.rec")
        assert len(reader) == 57
        assert reader.read(0).is_bookkeeping
        assert reader.read(0).labels == (49, 57)
        assert reader.read(1).body.startswith(b"\xff\xd8")
        assert reader.read(7).labels == (1,)
        assert reader.read(56).labels == (43, 49)

    def test_a_record_cut_in_parts_has_its_exact_bytes(self, with_header: Path, im2rec: Path) -> None:
        cut = RecordReader(im2rec / "train.rec").read(3).body
        whole = [body for body in readable(RecordReader(with_header / "train.rec")).values() if body]
        (original,) = [body for body in whole if cut.startswith(body)]
        assert cut[len(original) :].count(MAGIC_BYTES) == 2
        assert len(cut) == 6296

    @pytest.mark.parametrize("layout", ["with_header", "im2rec"])
    def test_without_idx_the_scan_finds_the_same(
        self, layout: str, request: pytest.FixtureRequest, copy_of: Copy
    ) -> None:
        folder = copy_of(request.getfixturevalue(layout))
        indexed = RecordReader(folder / "train.rec")
        (folder / "train.idx").unlink()
        scanned = RecordReader(folder / "train.rec")
        assert list(scanned.keys) == list(indexed.keys)
        assert np.array_equal(scanned.offsets, indexed.offsets)

    def test_our_writer_writes_the_header_layout_byte_for_byte(self, with_header: Path, tmp_path: Path) -> None:
        reader = RecordReader(with_header / "train.rec")
        with RecordWriter(tmp_path / "train.rec") as writer:
            for row in range(1, 49):
                record = reader.read(row)
                writer.write(record.body, int(record.labels[0]))
        for name in ("train.rec", "train.idx", "property"):
            assert (tmp_path / name).read_bytes() == (with_header / name).read_bytes(), name

    def test_our_writer_writes_the_im2rec_layout_byte_for_byte(self, im2rec: Path, tmp_path: Path) -> None:
        reader = RecordReader(im2rec / "train.rec")
        with RecordWriter(tmp_path / "train.rec", header=False) as writer:
            for row in range(len(reader)):
                record = reader.read(row)
                writer.write(record.body, int(record.labels[0]))
        for name in ("train.rec", "train.idx"):
            assert (tmp_path / name).read_bytes() == (im2rec / name).read_bytes(), name
        assert sorted(path.name for path in tmp_path.iterdir()) == ["property", "train.idx", "train.rec"]


class TestRecords:
    @given(st.lists(bodies, min_size=1, max_size=5))
    @settings(max_examples=150, deadline=None)
    def test_any_bytes_come_back_through_a_scan(
        self, tmp_path_factory: pytest.TempPathFactory, given: list[bytes]
    ) -> None:
        path = tmp_path_factory.mktemp("any") / "a.rec"
        offsets = write_raw(path, [build_payload(float(n), n, body) for n, body in enumerate(given)])
        reader = RecordReader(path)
        assert reader.offsets.tolist() == offsets
        assert [reader.read(row).body for row in range(len(reader))] == given
        assert reader.first_labels(0, len(reader)).tolist() == list(range(len(given)))

    @given(bodies)
    @settings(max_examples=100, deadline=None)
    def test_no_aligned_magic_is_left_inside_a_chunk(self, body: bytes) -> None:
        record = build_record(body)
        assert len(record) % 4 == 0
        cuts = sum(body[p : p + 4] == MAGIC_BYTES for p in range(0, len(body) - 3, 4))
        assert sum(record[p : p + 4] == MAGIC_BYTES for p in range(0, len(record), 4)) == cuts + 1

    def test_an_array_label_gives_its_first_element(self) -> None:
        record = parse_payload(build_payload((7.0, 3.0), 1, b"body"))
        assert record.labels == (7, 3)
        assert not record.is_bookkeeping
        assert class_of(record.labels[0], "it") == 7

    @pytest.mark.parametrize("payload", [b"short", struct.pack("<IfQQ", 3, 0.0, 0, 0) + bytes(8)])
    def test_a_payload_shorter_than_it_promises(self, payload: bytes) -> None:
        with pytest.raises(UnreadableRecord):
            parse_payload(payload)

    def test_a_part_must_fit_its_length_field(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("partialfc.data.sources.recordio.MAX_LENGTH", 40)
        with pytest.raises(InputError, match="too long"):
            build_record(bytes(41))

    @pytest.mark.parametrize("label", [0.5, float("nan"), float("inf"), -1.25])
    def test_fractional_labels_are_refused(self, label: float) -> None:
        with pytest.raises(InputError, match=r"record 5 .* whole number"):
            class_of(label, "record 5")

    def test_class_ids_end_below_two_to_the_24(self) -> None:
        assert class_of(float(LABEL_LIMIT - 1), "it") == LABEL_LIMIT - 1
        with pytest.raises(InputError, match=r"record 5 is 16777216.*image folder"):
            class_of(float(LABEL_LIMIT), "record 5")


class TestIndex:
    def test_any_order_of_lines(self, copy_of: Copy, with_header: Path) -> None:
        folder = copy_of(with_header)
        expected = readable(RecordReader(folder / "train.rec"))
        lines = (folder / "train.idx").read_text().splitlines()
        for changed in (lines[1:] + lines[:1], lines[::-1], [*lines, ""]):
            (folder / "train.idx").write_text("\n".join(changed))
            assert readable(RecordReader(folder / "train.rec")) == expected

    @given(st.dictionaries(st.integers(0, 50), st.integers(0, 1 << 62), max_size=20), st.booleans(), st.integers(1, 64))
    @settings(max_examples=100, deadline=None)
    def test_keys_come_out_sorted(
        self, tmp_path_factory: pytest.TempPathFactory, table: dict[int, int], newline: bool, block: int
    ) -> None:
        path = tmp_path_factory.mktemp("index") / "a.idx"
        path.write_text("\n".join(f"{key}\t{offset}" for key, offset in table.items()) + "\n" * newline)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(record_index, "_TEXT_BLOCK", block)
            keys, offsets = read_index(path)
        assert dict(zip([int(key) for key in keys], offsets.tolist(), strict=True)) == table
        assert [int(key) for key in keys] == sorted(table)

    @pytest.mark.parametrize("digits", [1, 17, 18, 19])
    def test_lines_of_one_width_are_parsed_by_columns(self, tmp_path: Path, digits: int) -> None:
        path = tmp_path / "a.idx"
        offsets = [10 ** (digits - 1) * leading for leading in (9, 1, 7, 8)]
        path.write_text("".join(f"{key}\t{offset}\n" for key, offset in enumerate(offsets)))
        assert read_index(path)[1].tolist() == offsets

    def test_the_last_line_of_a_key_holds(self, tmp_path: Path) -> None:
        path = tmp_path / "a.idx"
        path.write_text("1\t10\n0\t5\n1\t20\n")
        keys, offsets = read_index(path)
        assert (list(keys), offsets.tolist()) == ([0, 1], [5, 20])

    @pytest.mark.parametrize(
        "text", ["0\t0\n1\tx\n", "0\t0\n1\t/\n", "0\t0\n1x1\n", "0\t0\t5\n", "0\n", "\x80\x02]", "0\t1.5\n", "a b\n"]
    )
    def test_other_text_is_refused(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "a.idx"
        path.write_text(text, encoding="latin1")
        with pytest.raises(InputError, match=r"a\.idx is no index"):
            read_index(path)

    def test_empty_files(self, tmp_path: Path) -> None:
        (tmp_path / "a.rec").touch()
        with pytest.raises(InputError, match=r"a\.rec holds no record"):
            RecordReader(tmp_path / "a.rec")
        (tmp_path / "a.idx").touch()
        with pytest.raises(InputError, match=r"a\.idx holds no record"):
            RecordReader(tmp_path / "a.rec")

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="No such file"):
            RecordReader(tmp_path / "a.rec")


class TestDamage:
    """Five records of 10, 11, 12, 13 and 14 bytes behind the head; only the damaged ones are lost."""

    @pytest.fixture
    def damaged(self, tmp_path: Path) -> Callable[[Callable[[bytearray, list[int]], object]], RecordReader]:
        def make(damage: Callable[[bytearray, list[int]], object]) -> RecordReader:
            path = tmp_path / "a.rec"
            offsets = write_raw(path, [build_payload(0.0, n, bytes([n]) * (n + 10)) for n in range(5)])
            content = bytearray(path.read_bytes())
            damage(content, offsets)
            path.write_bytes(content)
            return RecordReader(path)

        return make

    def test_smashed_magic(self, damaged: Callable) -> None:
        reader = damaged(lambda content, at: content.__setitem__(slice(at[2], at[2] + 4), b"oops"))
        assert sorted(readable(reader)) == [0, 1, 3, 4]
        assert len(reader) == 5
        with pytest.raises(UnreadableRecord, match=r"record 2 of .*a\.rec: no record begins"):
            reader.read(2)

    @pytest.mark.parametrize("length", [1000, 1 << 28, 60])
    def test_length_too_large(self, damaged: Callable, length: int) -> None:
        reader = damaged(lambda content, at: struct.pack_into("<I", content, at[1] + 4, length))
        assert readable(reader) == {n: bytes([n]) * (n + 10) for n in (0, 2, 3, 4)}

    def test_length_too_small(self, damaged: Callable) -> None:
        reader = damaged(lambda content, at: struct.pack_into("<I", content, at[1] + 4, 12))
        bodies = [body for body in readable(reader).values() if body]
        assert bodies == [bytes([n]) * (n + 10) for n in (0, 2, 3, 4)]

    def test_garbage_between_records_is_one_unreadable_entry(self, damaged: Callable) -> None:
        reader = damaged(lambda content, at: content.__setitem__(slice(at[3], at[3]), b"junk" * 30))
        assert list(readable(reader).values()) == [bytes([n]) * (n + 10) for n in range(5)]
        assert len(reader) == 6

    @pytest.mark.parametrize("records", range(2, 6))
    def test_truncation(self, damaged: Callable, records: int) -> None:
        def cut(content: bytearray, at: list[int]) -> None:
            del content[(*at, len(content))[records] - 5 :]

        reader = damaged(cut)
        assert sorted(readable(reader)) == list(range(records - 1))
        assert len(reader) == records

    def test_a_lost_middle_part(self, tmp_path: Path) -> None:
        body = b"".join((b"abcd", MAGIC_BYTES, b"efgh", MAGIC_BYTES, b"ijkl"))
        offsets = write_raw(tmp_path / "a.rec", [build_payload(0.0, n, body) for n in range(3)])
        content = bytearray((tmp_path / "a.rec").read_bytes())
        second_part = content.index(MAGIC_BYTES, offsets[1] + 4)
        content[second_part : second_part + 4] = b"oops"
        (tmp_path / "a.rec").write_bytes(content)
        reader = RecordReader(tmp_path / "a.rec")
        assert readable(reader) == {0: body, 2: body}
        with pytest.raises(UnreadableRecord, match=r"record 1 .*no next part"):
            reader.read(1)

    def test_a_length_that_leads_to_a_later_record(self, damaged: Callable) -> None:
        reader = damaged(lambda content, at: struct.pack_into("<I", content, at[1] + 4, at[3] - at[1] - 8))
        assert readable(reader) == {n: bytes([n]) * (n + 10) for n in (0, 2, 3, 4)}

    @given(st.integers(0, 40), st.binary(min_size=1, max_size=60))
    @settings(max_examples=300, deadline=None)
    def test_only_what_is_hit_is_lost(
        self, tmp_path_factory: pytest.TempPathFactory, place: int, damage: bytes
    ) -> None:
        path = tmp_path_factory.mktemp("hit") / "a.rec"
        given = [bytes([n, *MAGIC_BYTES, *MAGIC_BYTES[: n % 4]]) * 3 for n in range(12)]
        offsets = [*write_raw(path, [build_payload(0.0, n, body) for n, body in enumerate(given)])]
        size = path.stat().st_size
        start = place * (size - len(damage)) // 40
        content = bytearray(path.read_bytes())
        content[start : start + len(damage)] = damage
        path.write_bytes(content)
        bodies = list(readable(RecordReader(path)).values())
        stops = [*offsets[1:], size]
        spared = [n for n in range(12) if stops[n] <= start or offsets[n] >= start + len(damage)]
        assert [body for body in bodies if body in [given[n] for n in spared]] == [given[n] for n in spared]

    def test_parts_shorter_than_a_head(self, tmp_path: Path) -> None:
        """The magic may stand in the record's own head, as its id."""
        magic = struct.unpack("<I", MAGIC_BYTES)[0]
        write_raw(tmp_path / "a.rec", [build_payload(float(n), magic, b"body") for n in range(3)])
        reader = RecordReader(tmp_path / "a.rec")
        assert list(reader.keys) == [0, 1, 2]
        assert [reader.read(row).identifier for row in range(3)] == [magic] * 3
        assert reader.first_labels(1, 3).tolist() == [1, 2]

    def test_a_magic_that_begins_no_record_is_passed_over(self, damaged: Callable) -> None:
        """A middle part of a record whose first part is lost."""

        def damage(content: bytearray, at: list[int]) -> None:
            content[at[2] : at[2] + 4] = b"oops"
            content[at[2] + 12 : at[2] + 20] = struct.pack("<II", 0xCED7230A, 2 << 29 | 4)

        assert sorted(readable(damaged(damage))) == [0, 1, 3, 4]

    def test_index_entries_that_point_nowhere(self, copy_of: Copy, im2rec: Path) -> None:
        folder = copy_of(im2rec)
        index = (folder / "train.idx").read_text().splitlines()
        index[5:8] = ["5\t99999999", "6\t4", "7\t999999999999999"]
        (folder / "train.idx").write_text("\n".join(index))
        reader = RecordReader(folder / "train.rec")
        for key, reason in ((5, "past the end"), (6, "no record begins"), (7, "past the end")):
            with pytest.raises(UnreadableRecord, match=f"record {key} of .*{reason}"):
                reader.read(key)
        assert len(readable(reader)) == 45
        labels = reader.first_labels(0, len(reader))
        assert np.flatnonzero(np.isnan(labels)).tolist() == [5, 6, 7]

    def test_a_file_of_another_kind_has_no_record(self, tmp_path: Path) -> None:
        (tmp_path / "a.rec").write_bytes(bytes(range(256)) * 40)
        assert not len(scan_records(tmp_path / "a.rec")[1])

    def test_ids_that_do_not_increase_are_not_keys(self, tmp_path: Path) -> None:
        write_raw(tmp_path / "a.rec", [build_payload(0.0, identifier, b"x") for identifier in (5, 5, 2)])
        assert list(RecordReader(tmp_path / "a.rec").keys) == [0, 1, 2]

    def test_ids_with_gaps_are_keys(self, tmp_path: Path) -> None:
        write_raw(tmp_path / "a.rec", [build_payload(0.0, identifier, b"x") for identifier in (2, 5, 9)])
        reader = RecordReader(tmp_path / "a.rec")
        assert list(reader.keys) == [2, 5, 9]
        assert [reader.row_of(key) for key in (0, 2, 3, 9, 10)] == [0, 0, 1, 2, 3]


class TestReader:
    def test_a_copy_in_another_process_reads_by_itself(self, im2rec: Path) -> None:
        reader = RecordReader(im2rec / "train.rec")
        other = copy_as_pickle_does(reader)
        reader.close()
        assert other.read(3).body == reader.read(3).body

    def test_a_failing_disk_is_an_unreadable_record(self, im2rec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        reader = RecordReader(im2rec / "train.rec")

        def fail(*arguments: object) -> bytes:
            raise OSError("Input/output error")

        monkeypatch.setattr("os.pread", fail)
        with pytest.raises(UnreadableRecord, match=r"record 0 of .*Input/output error"):
            reader.read(0)


class TestWriter:
    def test_identities_without_images_keep_their_number(self, tmp_path: Path, jpeg: bytes) -> None:
        with RecordWriter(tmp_path / "a.rec", num_classes=5) as writer:
            writer.write(jpeg, 3)
            writer.write(jpeg, 3)
            writer.write(jpeg, 1)
        reader = RecordReader(tmp_path / "a.rec")
        assert reader.read(0).labels == (4, 9)
        ranges = [list(reader.read(row).labels) for row in range(4, 9)]
        assert ranges == [[4, 4], [3, 4], [4, 4], [1, 3], [4, 4]]
        assert (tmp_path / "property").read_text() == "5,24,24\n"

    @pytest.mark.parametrize(
        ("label", "reason"),
        [(-1, "class ids begin at 0"), (LABEL_LIMIT, "16777216"), (0, "sort them by label")],
    )
    def test_what_cannot_be_stored(self, tmp_path: Path, jpeg: bytes, label: int, reason: str) -> None:
        with RecordWriter(tmp_path / "a.rec") as writer:
            writer.write(jpeg, 0)
            writer.write(jpeg, 1)
            with pytest.raises(InputError, match=reason):
                writer.write(jpeg, label)
        assert len(RecordReader(tmp_path / "a.rec")) == 5

    def test_labels_stay_below_the_number_given(self, tmp_path: Path, jpeg: bytes) -> None:
        with RecordWriter(tmp_path / "a.rec", num_classes=2) as writer, pytest.raises(InputError, match=r"\[0, 2\)"):
            writer.write(jpeg, 2)

    def test_bytes_that_are_no_image_are_stored_as_they_are(self, tmp_path: Path) -> None:
        with RecordWriter(tmp_path / "a.rec") as writer:
            writer.write(b"anything", 0)
        assert RecordReader(tmp_path / "a.rec").read(1).body == b"anything"
        assert (tmp_path / "property").read_text() == "1,0,0\n"

    def test_an_exception_leaves_nothing_behind(self, tmp_path: Path, jpeg: bytes) -> None:
        def write_and_fail() -> None:
            with RecordWriter(tmp_path / "a.rec") as writer:
                writer.write(jpeg, 0)
                raise RuntimeError("no more")

        with pytest.raises(RuntimeError, match="no more"):
            write_and_fail()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("name", ["a.rec", "a.idx", "property"])
    def test_nothing_is_overwritten(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("precious")
        with pytest.raises(InputError, match=f"{name} exists already"):
            RecordWriter(tmp_path / "a.rec")
        assert (tmp_path / name).read_text() == "precious"

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="Cannot write"):
            RecordWriter(tmp_path / "nowhere" / "a.rec")
