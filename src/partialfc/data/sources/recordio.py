"""RecordIO, the `.rec` files in which most face training sets are published: reader and writer.

A record's payload is `<IfQQ` (flag, label, id, id2), then `flag` float32 labels if flag > 0, then the encoded image.
How payloads are cut into chunks is told in record_index.py, the two layouts of a file in docs/data-formats.md.
"""

from __future__ import annotations

import contextlib
import os
import struct
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from partialfc.core.errors import InputError
from partialfc.core.files import atomic_file, output_errors
from partialfc.data.images import UnreadableImage, decode_image
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

# Labels are float32, which holds every whole number only up to here.
LABEL_LIMIT = 1 << 24
_RECORD_HEAD = struct.Struct("<IfQQ")
_HEAD_WORDS = 9
_HEADS_AT_ONCE = 1 << 18


class UnreadableRecord(UnreadableImage):
    """A record that is damaged, missing or cut off. The message names the record and says what is wrong."""


@dataclass(frozen=True)
class Record:
    """A payload taken apart. `labels` is float32: the label array, or the one label of a record without array."""

    flag: int
    labels: np.ndarray
    identifier: int
    body: bytes

    @property
    def is_bookkeeping(self) -> bool:
        """True of header and identity records: two labels and no image."""
        return self.flag == 2 and not self.body


class RecordReader:
    """Reads single records of a `.rec` file; safe to share with forked processes and to send to spawned ones.

    Attributes:
        path: the `.rec` file.
        keys: the keys in increasing order, a range or int64 (N,).
        offsets: where the record of each key begins, in bytes: int64 (N,).

    Raises:
        InputError: the file cannot be read, its `.idx` is no index, or it holds no record.
    """

    _descriptor: int | None = None

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.size = os.fstat(self._open()).st_size
        except OSError as error:
            raise InputError(f"Cannot read {self.path}: {error.strerror}.") from error
        index = self.path.with_suffix(".idx")
        self.keys, self.offsets = read_index(index) if index.exists() else scan_records(self.path)
        if not len(self.offsets):
            raise InputError(f"{index if index.exists() else self.path} holds no record: is it the right file?")

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

    def name(self, place: int) -> str:
        """What messages call the record at `place` in the order of the keys."""
        return f"record {self.keys[place]} of {self.path}"

    def place_of(self, key: int) -> int:
        """The place in `keys` of `key`, or where it would have to be inserted."""
        return int(np.searchsorted(self.keys, key)) if isinstance(self.keys, np.ndarray) else key - self.keys.start

    def read(self, place: int) -> Record:
        """Read the record at `place` in the order of the keys.

        Raises:
            UnreadableRecord: no whole record stands where the index says.
        """
        try:
            return parse_payload(self._read_payload(int(self.offsets[place])))
        except (UnreadableRecord, OSError) as error:  # OSError: a disk that fails
            raise UnreadableRecord(f"{self.name(place)}: {error}") from None

    def first_labels(self, start: int, stop: int) -> np.ndarray:
        """The first label of the records at places [start, stop), from their heads alone.

        Returns:
            float32 (stop - start,), NaN where a record is damaged.
        """
        labels = np.full(stop - start, np.nan, np.float32)
        words = np.memmap(self.path, "<u4", "r", shape=(self.size // 4,))
        for begin in range(start, stop, _HEADS_AT_ONCE):
            places = np.arange(begin, min(begin + _HEADS_AT_ONCE, stop))
            offsets = self.offsets[places]
            sound = (offsets >= 0) & (offsets % 4 == 0) & (offsets // 4 + _HEAD_WORDS <= len(words))
            # Words of a record: 0 magic, 1 lrec, 2 flag, 3 label, 4-7 ids, 8 the array's first label, if there is one.
            heads = words[(offsets[sound] // 4)[:, None] + np.arange(_HEAD_WORDS)]
            whole = (heads[:, 0] == MAGIC) & (heads[:, 1] >> 29 == WHOLE) & (heads[:, 1] >= _RECORD_HEAD.size + 4)
            found = np.where(heads[:, 2] > 0, heads[:, 8], heads[:, 3]).astype("<u4").view("<f4")
            labels[places[sound][whole] - start] = found[whole]
            for place in (*places[~sound], *places[sound][~whole]):  # cut in parts, or damaged
                with contextlib.suppress(UnreadableRecord):
                    labels[place - start] = self.read(int(place)).labels[0]
        return labels

    def _open(self) -> int:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        return self._descriptor

    def _read_payload(self, offset: int) -> bytes:
        descriptor = self._open()
        parts: list[bytes] = []
        while True:
            head = os.pread(descriptor, CHUNK_HEAD.size, offset) if offset >= 0 else b""
            if len(head) < CHUNK_HEAD.size:
                raise UnreadableRecord(f"byte {offset} lies past the end of the file")
            magic, lrec = CHUNK_HEAD.unpack(head)
            flag, length = lrec >> 29, lrec & MAX_LENGTH
            if magic != MAGIC or flag not in ((MIDDLE, LAST) if parts else (WHOLE, FIRST)):
                raise UnreadableRecord(f"no {'next part of it' if parts else 'record'} begins at byte {offset}")
            fits = offset + CHUNK_HEAD.size + length <= self.size  # else, do not even make room for it
            data = os.pread(descriptor, length, offset + CHUNK_HEAD.size) if fits else b""
            if len(data) < length:
                raise UnreadableRecord("it runs past the end of the file")
            if find_aligned_magic(data, 0) >= 0:
                raise UnreadableRecord(f"its length, {length} bytes, runs into the next record")
            parts.append(data)
            if flag in (WHOLE, LAST):
                return MAGIC_BYTES.join(parts)
            offset += CHUNK_HEAD.size + padded(length)


def parse_payload(payload: bytes) -> Record:
    """Take a payload apart.

    Raises:
        UnreadableRecord: it is shorter than its own head promises.
    """
    if len(payload) < _RECORD_HEAD.size:
        raise UnreadableRecord(f"it has {len(payload)} bytes and its head alone takes {_RECORD_HEAD.size}")
    flag, label, identifier, _ = _RECORD_HEAD.unpack_from(payload)
    stop = _RECORD_HEAD.size + 4 * flag
    if stop > len(payload):
        raise UnreadableRecord(f"it promises {flag} labels and is too short to hold them")
    labels = np.frombuffer(payload, "<f4", flag, _RECORD_HEAD.size) if flag else np.array([label], np.float32)
    return Record(flag, labels, identifier, payload[stop:])


def class_of(labels: np.ndarray, name: str) -> int:
    """The class id that a record's labels give: their first element.

    Raises:
        InputError: it is no whole number, or at or past 2^24.
    """
    value = float(labels[0])
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
    """Cut a payload into chunks wherever the magic stands 4-aligned in it, with heads and padding.

    Raises:
        InputError: a part does not fit into the 29 bits of its length.
    """
    parts: list[bytes] = []
    start = 0
    while (place := find_aligned_magic(payload, start)) >= 0:
        parts.append(payload[start:place])
        start = place + len(MAGIC_BYTES)
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

    The files appear at a clean end, the `.rec` last; an exception leaves nothing behind. With `header` the images of an
    identity must follow each other: keys 1, 2, ... are images, then come the identity records, and key 0 tells where
    those are. Without, the layout is im2rec's: keys from 0 and images only.

    Args:
        path: the `.rec` file to write.
        header: write the layout with header and identity records.
        num_classes: for `property` and the identity records; by default the largest label + 1.
        size: height and width of the images for `property`; by default those of the first image.

    Raises:
        InputError: one of the files is there already, or the folder is not.
    """

    def __init__(
        self, path: str | Path, *, header: bool = True, num_classes: int | None = None, size: int | None = None
    ) -> None:
        self.path = Path(path)
        self._header = header
        self._num_classes = num_classes
        self._shape = (size, size) if size is not None else None
        targets = [self.path, self.path.with_suffix(".idx"), self.path.with_name("property")]
        for target in targets:
            if target.exists():
                raise InputError(f"{target} exists already: remove it, or write somewhere else.")
        with output_errors(self.path), ExitStack() as stack:
            self._file, *self._others = [stack.enter_context(atomic_file(target)) for target in targets]
            self._stack = stack.pop_all()
        self._index: dict[int, int] = {}
        self._images_of: dict[int, tuple[int, int]] = {}  # label -> first and last + 1 image key
        self._labels_end = 0
        if header:
            self._append(0, build_payload((0.0, 0.0), 0, b""))

    def write(self, image: bytes, label: int, key: int | None = None) -> None:
        """Append an encoded image.

        Args:
            image: the bytes of a JPEG or PNG file.
            label: its class id, below 2^24.
            key: its key in the layout without header; by default its number.

        Raises:
            InputError: the label or key cannot be stored, or the identity's images do not follow each other.
        """
        name = f"image {len(self._index)} for {self.path}"
        if label < 0:
            raise InputError(f"The label of {name} is {label}: class ids begin at 0.")
        if self._num_classes is not None and label >= self._num_classes:
            raise InputError(f"The label of {name} is {label}, outside the range [0, {self._num_classes}).")
        class_of(np.array([label], np.float64), name)
        if key is None:
            key = len(self._index)
        elif self._header or key in self._index:
            reason = "keys are consecutive in the layout with header" if self._header else "that key is taken"
            raise InputError(f"Cannot write {name} under key {key}: {reason}.")
        if self._header:
            first, stop = self._images_of.get(label, (key, key))
            if stop != key:
                raise InputError(f"{name} belongs to label {label}, whose images ended before: sort them by label.")
            self._images_of[label] = (first, key + 1)
        if self._shape is None:
            self._shape = _image_shape(image)
        self._labels_end = max(self._labels_end, label + 1)
        self._append(key, build_payload(float(label), key, image))

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

    def _append(self, key: int, payload: bytes) -> None:
        self._index[key] = self._file.tell()
        self._file.write(build_record(payload))

    def _finish(self) -> None:
        num_classes = self._labels_end if self._num_classes is None else self._num_classes
        if self._header:
            first = len(self._index)
            for label in range(num_classes):
                start, stop = self._images_of.get(label, (first, first))
                self._append(first + label, build_payload((float(start), float(stop)), first + label, b""))
            self._file.seek(0)
            self._file.write(build_record(build_payload((float(first), float(first + num_classes)), 0, b"")))
        height, width = self._shape or (0, 0)
        lines = "".join(f"{key}\t{offset}\n" for key, offset in sorted(self._index.items()))
        for file, text in zip(self._others, (lines, f"{num_classes},{height},{width}\n"), strict=True):
            file.write(text.encode())
            file.flush()  # a full disk must be noticed before any of the files appears
        self._file.flush()


def _image_shape(encoded: bytes) -> tuple[int, int] | None:
    try:
        height, width, _ = decode_image(encoded).shape
    except UnreadableImage:
        return None
    return height, width
