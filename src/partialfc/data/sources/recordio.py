"""RecordIO, the `.rec` files in which most face training sets are published: reader and writer.

A record's payload is `<IfQQ` (flag, label, id, id2), then `flag` float32 labels if flag > 0, then the encoded image.
`record_index` describes the chunks of a payload, docs/data-formats.md the two layouts of a file.
"""

from __future__ import annotations

import os
import struct
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from partialfc.core.errors import InputError
from partialfc.core.files import atomic_file, output_errors
from partialfc.data.images import UnreadableImage, decode_image
from partialfc.data.sources.base import check_regular
from partialfc.data.sources.record_index import (
    CHUNK_HEAD,
    FIRST,
    LAST,
    MAGIC,
    MAGIC_BYTES,
    MAX_LENGTH,
    MIDDLE,
    WHOLE,
    find_aligned_magic,
    padded,
    read_index,
    scan_records,
)

# Labels are float32, which represents every whole number only up to here.
LABEL_LIMIT = 1 << 24
_RECORD_HEAD = struct.Struct("<IfQQ")
_HEAD_WORDS = 9
_HEADS_AT_ONCE = 1 << 18
_READ_AT_ONCE = 1 << 16  # bytes; a shorter record, as those of faces are, is read by one call


class UnreadableRecord(UnreadableImage):
    """A record that is damaged, missing or cut off. The message names the record and says what is wrong."""


class Record(NamedTuple):
    """A parsed payload. `labels` are float32: the label array, or the one label of a record without array."""

    flag: int
    labels: tuple[float, ...]
    identifier: int
    body: bytes

    @property
    def is_bookkeeping(self) -> bool:
        """True of header and identity records: two labels and no image."""
        return self.flag == 2 and not self.body


class RecordReader:
    """Reads single records of a `.rec` file; safe in forked processes, and picklable for spawned ones.

    Attributes:
        path: the `.rec` file.
        keys: the keys in increasing order, a range or int64 (N,).
        offsets: where the record of each key begins, in bytes, int64 (N,). A record's row is its index in both.

    Raises:
        InputError: the file cannot be read, its `.idx` is no index, or it holds no record.
    """

    _descriptor: int | None = None

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        check_regular([self.path])
        try:
            self.size = os.fstat(self._open()).st_size
        except OSError as error:
            raise InputError(f"Cannot read {self.path}: {error.strerror}.") from error
        index = self.path.with_suffix(".idx")
        self.keys, self.offsets = read_index(index) if index.is_file() else scan_records(self.path)
        if not len(self.offsets):
            raise InputError(f"{index if index.is_file() else self.path} holds no record: is it the right file?")

    def __len__(self) -> int:
        return len(self.offsets)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def name(self, row: int) -> str:
        """The name of a record in messages."""
        return f"record {self.keys[row]} of {self.path}"

    def row_of(self, key: int) -> int:
        """The row of `key`, or the one at which it would have to be inserted."""
        return int(np.searchsorted(self.keys, key)) if isinstance(self.keys, np.ndarray) else key - self.keys.start

    def read(self, row: int) -> Record:
        """Read the record in `row`.

        Raises:
            UnreadableRecord: no whole record begins at its offset.
        """
        try:
            return parse_payload(self._read_payload(*self.offsets[row : row + 2].tolist()))
        except (UnreadableRecord, OSError) as error:  # OSError: a failing disk
            raise UnreadableRecord(f"{self.name(row)}: {error}") from None

    def unlisted_bytes(self) -> int:
        """The bytes after the last of the records, 0 if that is damaged: an index may list too few."""
        last = int(self.offsets.max())
        with suppress(UnreadableRecord, OSError):
            return max(0, self.size - last - len(build_record(self._read_payload(last))))
        return 0

    def first_labels(self, start: int, stop: int) -> np.ndarray:
        """The first label of the records in rows [start, stop), from their heads alone.

        Returns:
            float32 (stop - start,), NaN where a record is damaged.
        """
        labels = np.full(stop - start, np.nan, np.float32)
        words = np.memmap(self.path, "<u4", "r", shape=(self.size // 4,))
        for begin in range(start, stop, _HEADS_AT_ONCE):
            rows = np.arange(begin, min(begin + _HEADS_AT_ONCE, stop))
            offsets = self.offsets[rows]
            sound = (offsets >= 0) & (offsets % 4 == 0) & (offsets // 4 + _HEAD_WORDS <= len(words))
            # Words of a record: 0 magic, 1 lrec, 2 flag, 3 label, 4-7 ids, 8 the array's first label, if there is one.
            heads = words[(offsets[sound] // 4)[:, None] + np.arange(_HEAD_WORDS)]
            whole = (heads[:, 0] == MAGIC) & (heads[:, 1] >> 29 == WHOLE) & (heads[:, 1] >= _RECORD_HEAD.size + 4)
            values = np.where(heads[:, 2] > 0, heads[:, 8], heads[:, 3]).astype("<u4").view("<f4")
            labels[rows[sound][whole] - start] = values[whole]
            for row in (*rows[~sound], *rows[sound][~whole]):  # cut into parts, or damaged
                with suppress(UnreadableRecord):
                    labels[row - start] = self.read(int(row)).labels[0]
        return labels

    def _open(self) -> int:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        return self._descriptor

    def _read_payload(self, offset: int, following: int = 0) -> bytes:
        """The payload of the record at `offset`; `following` is where the next one begins, if that is known."""
        descriptor = self._open()
        parts: list[bytes] = []
        while True:
            expected = following - offset if offset < following < offset + _READ_AT_ONCE else _READ_AT_ONCE
            block = os.pread(descriptor, expected, offset) if 0 <= offset < self.size else b""
            if len(block) < CHUNK_HEAD.size:
                raise UnreadableRecord(f"byte {offset} lies past the end of the file")
            magic, lrec = CHUNK_HEAD.unpack_from(block)
            flag, length = lrec >> 29, lrec & MAX_LENGTH
            if magic != MAGIC or flag not in ((MIDDLE, LAST) if parts else (WHOLE, FIRST)):
                raise UnreadableRecord(f"no {'next part of it' if parts else 'record'} begins at byte {offset}")
            fits = offset + CHUNK_HEAD.size + length <= self.size  # otherwise not even the memory is allocated
            data = block[CHUNK_HEAD.size : CHUNK_HEAD.size + length] if fits else b""
            if fits and len(data) < length:
                data = os.pread(descriptor, length, offset + CHUNK_HEAD.size)
            if len(data) < length:
                raise UnreadableRecord("it runs past the end of the file")
            end = offset + CHUNK_HEAD.size + padded(length)
            if end != following and find_aligned_magic(data, 0) >= 0:
                raise UnreadableRecord(f"its length, {length} bytes, runs into the next record")
            parts.append(data)
            if flag in (WHOLE, LAST):
                return MAGIC_BYTES.join(parts)
            offset = end


def parse_payload(payload: bytes) -> Record:
    """Parse a payload.

    Raises:
        UnreadableRecord: it is shorter than its own head promises.
    """
    if len(payload) < _RECORD_HEAD.size:
        raise UnreadableRecord(f"it has {len(payload)} bytes and its head alone takes {_RECORD_HEAD.size}")
    flag, label, identifier, _ = _RECORD_HEAD.unpack_from(payload)
    stop = _RECORD_HEAD.size + 4 * flag
    if stop > len(payload):
        raise UnreadableRecord(f"it promises {flag} labels and is too short to hold them")
    labels = struct.unpack_from(f"<{flag}f", payload, _RECORD_HEAD.size) if flag else (label,)
    return Record(flag, labels, identifier, payload[stop:])


def class_of(value: float, name: str) -> int:
    """The class id that the first label of a record stands for.

    Raises:
        InputError: it is no whole number, or at or past 2^24.
    """
    if not value.is_integer():
        raise InputError(f"The label of {name} is {value:g}, but a class id is a whole number: correct the labels.")
    if value >= LABEL_LIMIT:
        raise InputError(
            f"The label of {name} is {value:.0f}, but RecordIO stores labels as float32, which cannot tell class ids "
            f"apart from 2^24 = {LABEL_LIMIT} on: store this data set as an image folder."
        )
    return int(value)


def build_payload(label: float | tuple[float, ...], identifier: int, body: bytes) -> bytes:
    """The inverse of `parse_payload`; a tuple of labels is stored as an array."""
    if isinstance(label, tuple):
        return _RECORD_HEAD.pack(len(label), 0.0, identifier, 0) + np.array(label, "<f4").tobytes() + body
    return _RECORD_HEAD.pack(0, label, identifier, 0) + body


def build_record(payload: bytes) -> bytes:
    """The chunks of a payload, cut wherever the magic stands 4-aligned in it, with heads and padding.

    Raises:
        InputError: a part does not fit into the 29 bits of its length.
    """
    parts: list[bytes] = []
    start = 0
    while (offset := find_aligned_magic(payload, start)) >= 0:
        parts.append(payload[start:offset])
        start = offset + len(MAGIC_BYTES)
    parts.append(payload[start:])
    pieces: list[bytes] = []
    for number, part in enumerate(parts):
        if len(part) > MAX_LENGTH:
            raise InputError(f"An image of {len(payload)} bytes is too long for RecordIO: 512 MiB at most.")
        last = number == len(parts) - 1
        flag = (WHOLE if last else FIRST) if number == 0 else (LAST if last else MIDDLE)
        pieces += [CHUNK_HEAD.pack(MAGIC, flag << 29 | len(part)), part, bytes(padded(len(part)) - len(part))]
    return b"".join(pieces)


class RecordWriter:
    """Writes a `.rec` with its `.idx` and `property`; a context manager.

    The files appear complete at a clean end, the `.rec` last; an exception leaves nothing behind. With `header` the
    images of an identity must be consecutive: keys 1, 2, ... are images, then come the identity records, whose keys
    the header record 0 holds. Without, the layout is im2rec's: keys from 0 and images only.

    Args:
        path: the `.rec` file to write.
        header: write the layout with header and identity records.
        num_classes: for `property` and the identity records; by default the largest label + 1.

    Raises:
        InputError: one of the files is there already, or the folder is not.
    """

    def __init__(self, path: str | Path, *, header: bool = True, num_classes: int | None = None) -> None:
        self.path = Path(path)
        self._header = header
        self._num_classes = num_classes
        self._shape: tuple[int, ...] = ()  # height and width of the first readable image, for `property`
        targets = [self.path, self.path.with_suffix(".idx"), self.path.with_name("property")]
        for target in targets:
            if target.exists():
                raise InputError(f"{target} exists already: remove it, or write somewhere else.")
        with output_errors(self.path), ExitStack() as stack:
            self._file, *self._others = [stack.enter_context(atomic_file(target)) for target in targets]
            self._stack = stack.pop_all()
        self._offsets: list[int] = []  # by key
        self._images_of: dict[int, tuple[int, int]] = {}  # label -> first and last + 1 image key
        self._labels_end = 0
        if header:
            self._append((0.0, 0.0))

    def write(self, image: bytes, label: int) -> None:
        """Append an encoded image.

        Args:
            image: the bytes of a JPEG or PNG file.
            label: its class id, below 2^24.

        Raises:
            InputError: the label cannot be stored, or the images of an identity are not consecutive.
        """
        key = len(self._offsets)
        name = f"image {key} for {self.path}"
        if label < 0:
            raise InputError(f"The label of {name} is {label}: class ids begin at 0.")
        if self._num_classes is not None and label >= self._num_classes:
            raise InputError(f"The label of {name} is {label}, outside the range [0, {self._num_classes}).")
        class_of(float(label), name)
        if self._header:
            first, stop = self._images_of.get(label, (key, key))
            if stop != key:
                raise InputError(f"{name} belongs to label {label}, whose images ended before: sort them by label.")
            self._images_of[label] = (first, key + 1)
        if not self._shape:
            with suppress(UnreadableImage):
                self._shape = decode_image(image).shape[:2]
        self._labels_end = max(self._labels_end, label + 1)
        self._append(float(label), image)

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, traceback)
            return
        with self._stack:
            self._finish()

    def _append(self, label: float | tuple[float, ...], body: bytes = b"") -> None:
        key = len(self._offsets)
        self._offsets.append(self._file.tell())
        self._file.write(build_record(build_payload(label, key, body)))

    def _finish(self) -> None:
        num_classes = self._labels_end if self._num_classes is None else self._num_classes
        if self._header:
            first = len(self._offsets)
            for label in range(num_classes):
                self._append(self._images_of.get(label, (first, first)))
            self._file.seek(0)
            self._file.write(build_record(build_payload((float(first), float(first + num_classes)), 0, b"")))
        height, width = self._shape or (0, 0)
        lines = "".join(f"{key}\t{offset}\n" for key, offset in enumerate(self._offsets))
        for file, text in zip(self._others, (lines, f"{num_classes},{height},{width}\n"), strict=True):
            file.write(text.encode())
            file.flush()  # a full disk must be noticed before any of the files appears
        self._file.flush()
