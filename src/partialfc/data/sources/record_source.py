"""RecordIO as a training set: the images of a `.rec` file, its header record, class ids and class count."""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_left
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from partialfc.core.errors import InputError
from partialfc.data.sources.base import Sample
from partialfc.data.sources.folder import IMAGE_SUFFIXES
from partialfc.data.sources.names import PackedStrings, pack, pack_lines, read_classes
from partialfc.data.sources.recordio import LABEL_LIMIT, Record, RecordReader, UnreadableRecord, class_of

_PROBES = 16  # records tried to tell a damaged file from one that does not fit its index
_OF_OTHERS = (*IMAGE_SUFFIXES, ".csv", ".txt", ".json", ".zip", ".idx")
_FEWEST_BYTES = 32  # of a record


def open_recordio(path: Path, num_classes: int | None) -> RecordSource | None:
    """The `.rec` file at `path`, or the one in the folder `path`; None for a folder without.

    Raises:
        InputError: the folder holds several and no train.rec, or the file is damaged or no RecordIO.
        OSError: the folder cannot be listed.
    """
    if path.is_dir():
        with os.scandir(path) as entries:
            names = sorted(entry.name for entry in entries if entry.name.lower().endswith(".rec"))
        if not names:
            return None
        trains = [name for name in names if name.lower() == "train.rec"]
        if len(trains or names) > 1:
            raise InputError(f"{path} holds several .rec files ({', '.join(names[:5])}): give the path of one of them.")
        path = path / (trains or names)[0]
    elif path.suffix.lower() in _OF_OTHERS:
        return None
    return RecordSource(path, num_classes)


def names_path(path: Path) -> Path:
    """Where the names of the images of a `.rec` file stand."""
    return path.with_suffix(".names.tsv")


class RecordSource:
    """The images of a `.rec` file, in the order of their keys."""

    def __init__(self, path: Path, num_classes: int | None = None) -> None:
        self.path = path
        self._reader = RecordReader(path)
        self._check_fit()
        self.notes: list[str] = []
        if (rest := self._reader.unlisted_bytes()) >= _FEWEST_BYTES:
            self.notes.append(
                f"{path} has {rest:,} bytes after the last record that its .idx lists, and they are passed over: "
                "without the .idx all records are found by a scan"
            )
        header = self._read_header()
        self.format = "recordio" if header is None else "recordio-header"
        self._start, self._stop = 0, len(self._reader)
        if header is not None:
            self._start, self._stop = self._reader.row_of(1), self._first_identity_row(int(header.labels[0]))
        if self._stop <= self._start:
            raise InputError(f"{path} holds no image.")
        self.num_classes: int = num_classes or self._read_property() or self._count_classes(header)
        _, names = read_classes(path.parent)
        self.identities: list[str] | None = names if names and len(names) == self.num_classes else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_names"}  # mapped, and soon made anew

    def __len__(self) -> int:
        return self._stop - self._start

    def name(self, index: int) -> str:
        """As `Source.name`, with the name that `data convert` has kept."""
        file = self.file_name(index)
        return self._reader.name(self._start + index) + (file and f" ({file})")

    def file_name(self, index: int) -> str:
        """The path of the image where it came from, "" if that is unknown."""
        if index >= len(self._names):
            return ""
        key, _, name = self._names[index].rstrip("\n").partition("\t")
        return name if key == str(self._reader.keys[self._start + index]) else ""

    @cached_property
    def _names(self) -> PackedStrings:
        """The lines `key TAB name` of the file of names, in the order of the images."""
        path = names_path(self.path)
        return pack_lines(path) if path.is_file() else pack([])

    def read(self, index: int) -> Sample:
        """As `Source.read`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        record = self._reader.read(self._start + index)
        name = self.name(index)
        return Sample(record.body, class_of(record.labels[0], name), name)

    def labels(self) -> np.ndarray:
        """As `Source.labels`, by a pass over the heads of the records."""
        labels = self._reader.first_labels(self._start, self._stop)
        for index in np.flatnonzero(np.isfinite(labels) & ((labels % 1 != 0) | (labels >= LABEL_LIMIT)))[:1]:
            class_of(float(labels[index]), self.name(int(index)))
        return np.where(np.isfinite(labels), labels, -1).astype(np.int64)

    def order(self) -> list[bytes]:
        """What tells the samples apart: where they begin, since reading all labels of a large file takes hours."""
        return [self._reader.offsets[self._start : self._stop].tobytes()]

    def _check_fit(self) -> None:
        """Refuse a file of another format, and an index that belongs to another file."""
        for row in np.linspace(0, len(self._reader) - 1, _PROBES, dtype=np.int64).tolist():
            with contextlib.suppress(UnreadableRecord):
                self._reader.read(row)
                return
        raise InputError(
            f"No record tried in {self.path} can be read: either it is no RecordIO file, or the .idx beside it "
            "belongs to another (remove that, and the records are found by a scan)."
        )

    def _read_header(self) -> Record | None:
        """The header record, None in a file without."""
        if self._reader.keys[0] != 0:
            return None
        try:
            first = self._reader.read(0)
        except UnreadableRecord as error:
            if not self._is_bookkeeping(len(self._reader) - 1):
                return None
            raise InputError(f"The header record is damaged, get a fresh copy of the file: {error}.") from error
        if not first.is_bookkeeping:
            return None
        if not (np.isfinite(first.labels).all() and 1 <= first.labels[0] <= first.labels[1]):
            raise InputError(f"The header record of {self.path} is damaged: get a fresh copy of the file.")
        return first

    def _is_bookkeeping(self, row: int) -> bool:
        try:
            return self._reader.read(row).is_bookkeeping
        except UnreadableRecord:
            return False

    def _first_identity_row(self, key: int) -> int:
        """The row of the first identity record, found by bisection.

        The header gives its `key`, but in float32, and some headers are those of another file. What that says decides
        only about rows that cannot be read.
        """
        named = self._reader.row_of(key)

        def is_identity(row: int) -> bool:
            try:
                return self._reader.read(row).is_bookkeeping
            except UnreadableRecord:
                return row >= named

        return bisect_left(range(len(self._reader)), True, lo=self._reader.row_of(1), key=is_identity)

    def _read_property(self) -> int | None:
        """The class count in the `property` file beside the data, None without that file."""
        path = self.path.with_name("property")
        if not path.is_file():
            return None
        first_line = path.read_text(encoding="utf-8-sig", errors="replace").partition("\n")[0]
        count = first_line.split(",")[0].strip()
        if not count.isdecimal() or int(count) < 1:
            raise InputError(f"{path} begins with {first_line[:40]!r} instead of 'num_classes,height,width'.")
        return int(count)

    def _count_classes(self, header: Record | None) -> int:
        if header is None:
            return int(self.labels().max(initial=0)) + 1
        first, stop = header.labels
        identities = len(self._reader) - self._stop  # 0 of a file that was cut off and has no index
        is_exact = stop < LABEL_LIMIT and (self._reader.row_of(int(first)) == self._stop or not identities)
        return int(stop - first) if is_exact else identities
