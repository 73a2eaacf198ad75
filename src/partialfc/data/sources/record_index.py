"""Where the records of a `.rec` file begin: read from its `.idx`, or found by a scan of the file.

A record is one or more chunks, a chunk is `u32 magic, u32 lrec, data, zero padding to 4 bytes` (little-endian) with
cflag = lrec >> 29 and length = lrec & 0x1FFFFFFF. cflag 0 is a whole record; 1, 2 and 3 are a record's first, middle
and last part. The magic never stands at a multiple of 4 bytes inside the data, so that the scan of a damaged file
continues at the next aligned magic that begins a record.
"""

from __future__ import annotations

import mmap
import struct
import warnings
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from partialfc.core.errors import InputError
from partialfc.data.sources.base import skip_byte_order_mark

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
MAX_LENGTH = (1 << 29) - 1
WHOLE, FIRST, MIDDLE, LAST = 0, 1, 2, 3
CHUNK_HEAD = struct.Struct("<II")
_CHUNK_AND_RECORD_HEAD = struct.Struct("<IIIfQ")
_ID_LIMIT = 1 << 62  # ids are u64, keys int64
_NO_OFFSET = (1 << 63) - 1  # as which NumPy reads larger numbers, such as the (size_t)-1 of a failed write
_TEXT_BLOCK = 1 << 22  # bytes of .idx text parsed at a time
_DIGITS = 18  # of a number that fits into 63 bits, whatever it is


def padded(length: int) -> int:
    """`length` rounded up to a multiple of 4."""
    return (length + 3) & ~3


def find_aligned_magic(data: bytes | mmap.mmap, start: int, stop: int | None = None) -> int:
    """The first multiple of 4 in [start, stop) at which the magic stands in `data`, -1 if there is none."""
    stop = len(data) if stop is None else stop
    offset = data.find(MAGIC_BYTES, start, stop)
    while offset >= 0 and offset % 4:
        offset = data.find(MAGIC_BYTES, offset + 1, stop)
    return offset


def read_index(path: Path) -> tuple[range | np.ndarray, np.ndarray]:
    """Read an `.idx`: text lines `key TAB offset`, in any order; the last line of a key wins.

    Takes 8 bytes a record where the keys are 0, 1, 2, ... as the usual packers write them, otherwise 16 (and 40 while
    sorting), so that an index of 42 million records usually stays below 1 GiB.

    Returns:
        The keys in increasing order, a range or int64 (N,), and their offsets in bytes, int64 (N,).

    Raises:
        InputError: a line is not two whole numbers from 0, or larger ones than a file has bytes.
    """
    with path.open("rb") as file:
        blocks = iter(lambda: file.read(_TEXT_BLOCK), b"")
        lines = 1 + sum(np.count_nonzero(np.frombuffer(block, np.uint8) == ord("\n")) for block in blocks)
    offsets = np.full(lines, -1, np.int64)
    count = 0
    for block in _index_blocks(path):
        keys = block[:, 0]
        if int(keys.min()) < 0 or int(keys.max()) >= lines:
            break
        offsets[keys] = block[:, 1]
        count += len(block)
    else:
        if bool((offsets[:count] != -1).all()):
            return range(count), offsets[:count]
    del offsets
    table = np.concatenate(list(_index_blocks(path)))
    table = table[np.argsort(table[:, 0], kind="stable")]
    last = np.append(table[1:, 0] != table[:-1, 0], True)
    return np.ascontiguousarray(table[last, 0]), np.ascontiguousarray(table[last, 1])


def _index_blocks(path: Path) -> Iterator[np.ndarray]:
    """The lines of an `.idx` as int64 (n, 2), one block of text at a time."""
    with path.open("rb") as file:
        rest = b""
        skip_byte_order_mark(file)
        while block := file.read(_TEXT_BLOCK):
            text, _, rest = (rest + block).rpartition(b"\n")
            if text := text.strip():
                yield _parse_lines(text, path)
        if rest := rest.strip():
            yield _parse_lines(rest, path)


def _parse_even_lines(text: bytes) -> np.ndarray | None:
    """The lines where all keys have as many digits, and all offsets, as in nearly every block; otherwise None.

    Whole columns of digits are added up, in a fraction of the time that parsing line by line takes.
    """
    width = text.find(b"\n") + 1
    tab = text.find(b"\t", 0, width)
    if tab < 0 or (len(text) + 1) % width or max(tab, width - tab - 2) > _DIGITS:
        return None
    columns = np.frombuffer(text + b"\n", np.uint8).reshape(-1, width).T.copy()
    if (columns[tab] != ord("\t")).any() or (columns[-1] != ord("\n")).any():
        return None
    columns -= ord("0")  # wraps around for what stands before the digits, and is then above 9, too
    table = np.zeros((columns.shape[1], 2), np.int64)
    for number, part in enumerate((columns[:tab], columns[tab + 1 : -1])):
        if not len(part) or (part > 9).any():
            return None
        total = np.zeros(columns.shape[1], np.int64)
        for digits in part:
            total *= 10
            total += digits
        table[:, number] = total
    return table


def _parse_lines(text: bytes, path: Path) -> np.ndarray:
    if (table := _parse_even_lines(text)) is not None:
        return table
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # older NumPy only warns of text that it cannot parse
            numbers = np.fromstring(text, np.int64, sep=" ")
        table = numbers.reshape(text.count(b"\n") + 1, 2)
        if (wrong := (table < 0).any(axis=1) | (table[:, 1] == _NO_OFFSET)).any():
            text = text.split(b"\n")[int(np.argmax(wrong))]
            raise ValueError("a key or offset is negative, or of more than 63 bits")
        return table
    except (ValueError, DeprecationWarning) as error:
        start = text[:40].decode(errors="replace")
        raise InputError(
            f"{path} is no index of lines 'key TAB offset' (look after {start!r}): remove it, and the records are "
            "found by a scan."
        ) from error


def scan_records(path: Path) -> tuple[range | np.ndarray, np.ndarray]:
    """Find the records of a `.rec` without `.idx`, by walking from head to head.

    A damaged record, or a gap between records, stays in the result as one entry that cannot be read. Keys are the
    records' own ids if those increase through the file, as the usual packers write them, otherwise 0, 1, 2, ...

    Returns:
        As `read_index`. No entry at all if no record begins anywhere in the file.
    """
    starts, ids = array("q"), array("q")
    size = path.stat().st_size
    any_record = False
    if not size:
        return range(0), np.zeros(0, np.int64)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        offset = 0
        while offset < size:
            identifier, stop = _record_at(data, offset)
            if stop:
                any_record = True
                starts.append(offset)
                ids.append(identifier)
                offset = stop
                continue
            begins = _begins_record(data, offset)
            # Without even a head here, the length of the previous record may have skipped the next one.
            resume = _next_start(data, 4 + (offset if begins or not starts else starts[-1]))
            if begins or resume > offset:
                ids.append(ids[-1] + 1 if ids else 0)
                starts.append(offset)
            offset = resume
    if not any_record:
        return range(0), np.zeros(0, np.int64)
    keys = np.frombuffer(ids, np.int64)
    increasing = bool((keys[1:] > keys[:-1]).all()) and int(keys[0]) >= 0
    contiguous = not increasing or int(keys[-1]) == len(keys) - 1
    return range(len(keys)) if contiguous else keys, np.frombuffer(starts, np.int64)


def _begins_record(data: mmap.mmap, offset: int) -> bool:
    if offset + CHUNK_HEAD.size > len(data):
        return False
    magic, lrec = CHUNK_HEAD.unpack_from(data, offset)
    return magic == MAGIC and lrec >> 29 in (WHOLE, FIRST)


def _record_at(data: mmap.mmap, offset: int) -> tuple[int, int]:
    """The id of the record at `offset`, -1 if unknown, and its end; the end is 0 if no whole record begins there."""
    identifier = -1
    if offset + _CHUNK_AND_RECORD_HEAD.size <= len(data):
        _, lrec, _, _, stored_id = _CHUNK_AND_RECORD_HEAD.unpack_from(data, offset)
        if lrec & MAX_LENGTH >= 16 and stored_id < _ID_LIMIT:
            identifier = stored_id
    expected = (WHOLE, FIRST)
    while offset + CHUNK_HEAD.size <= len(data):
        magic, lrec = CHUNK_HEAD.unpack_from(data, offset)
        flag = lrec >> 29
        if magic != MAGIC or flag not in expected:
            break
        start = offset + CHUNK_HEAD.size
        offset = start + padded(lrec & MAX_LENGTH)
        # A wrong length can lead exactly to a later record; the magics of the skipped ones reveal it.
        if offset > len(data) or find_aligned_magic(data, start, offset) >= 0:
            break
        if flag in (WHOLE, LAST):
            return identifier, offset
        expected = (MIDDLE, LAST)
    return -1, 0


def _next_start(data: mmap.mmap, start: int) -> int:
    """The first offset from `start` on at which a record begins, the file's length if there is none."""
    offset = find_aligned_magic(data, start)
    while offset >= 0 and not _begins_record(data, offset):
        offset = find_aligned_magic(data, offset + 4)
    return offset if offset >= 0 else len(data)
