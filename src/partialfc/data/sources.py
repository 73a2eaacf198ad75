"""Training sets as a numbered row of encoded images with labels, whatever they are stored in."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from partialfc.data.images import UnreadableImage, decode_image
from partialfc.data.recordio import LABEL_LIMIT, Record, RecordReader, UnreadableRecord, class_of
from partialfc.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
_PROBED = 16  # records tried, to tell a damaged file from one that does not fit its index


@dataclass(frozen=True)
class Sample:
    """An encoded image, its class id, and what messages call it."""

    encoded: bytes
    label: int
    name: str


class Source(Protocol):
    """A training set. `identities` are the names of the classes, where the storage has names."""

    @property
    def path(self) -> Path: ...
    @property
    def format(self) -> str: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def identities(self) -> list[str] | None: ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What messages call the sample at `index`."""
        ...

    def labels(self) -> np.ndarray:
        """The class id of every sample, int64 (N,), −1 where it cannot be read, without reading the images.

        Raises:
            InputError: a label is no class id.
        """
        ...

    def read(self, index: int) -> Sample:
        """The sample at `index`, from 0.

        Raises:
            UnreadableImage: it cannot be read; the message names it.
            InputError: its label is no class id.
        """
        ...


def read_image(source: Source, index: int) -> tuple[Sample, np.ndarray]:
    """The sample at `index` and its decoded image, uint8 (H, W, 3) RGB. Raises as `Source.read`."""
    sample = source.read(index)
    try:
        return sample, decode_image(sample.encoded)
    except UnreadableImage as error:
        raise UnreadableImage(f"{sample.name}: {error}") from error


def check_label(sample: Sample, num_classes: int) -> None:
    """Refuse a label outside [0, num_classes) with an InputError that names the record."""
    if not 0 <= sample.label < num_classes:
        raise InputError(
            f"The label of {sample.name} is {sample.label}, outside the range [0, {num_classes}): give the right "
            "num_classes, or correct the data (and its property file)."
        )


def open_source(path: str | Path, *, num_classes: int | None = None) -> Source:
    """Open a training set, deciding by what is there: a `.rec` file, a folder with one, or identity folders.

    Args:
        path: the file or folder.
        num_classes: the number of classes; by default what the data says.

    Raises:
        InputError: there is no training set at `path`.
    """
    path = Path(path)
    if num_classes is not None and num_classes < 1:
        raise InputError(f"num_classes is {num_classes}, but a training set has at least one class.")
    if not path.exists():
        raise InputError(f"{path} does not exist: give a .rec file, a folder that holds one, or an image folder.")
    if path.is_file():
        return RecordSource(path, num_classes)
    try:
        with os.scandir(path) as entries:
            records = sorted(entry.name for entry in entries if entry.name.endswith(".rec"))
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from error
    if not records:
        return FolderSource(path, num_classes)
    if len(records) > 1 and "train.rec" not in records:
        raise InputError(f"{path} holds several .rec files ({', '.join(records[:5])}): give the path of one of them.")
    return RecordSource(path / ("train.rec" if "train.rec" in records else records[0]), num_classes)


class RecordSource:
    """The images of a `.rec` file, in the order of their keys."""

    identities: list[str] | None = None

    def __init__(self, path: Path, num_classes: int | None = None) -> None:
        self.path = path
        self._reader = RecordReader(path)
        self._check_fit()
        header = self._read_header()
        if header is None:
            self.format = "recordio"
            self._start, self._stop = 0, len(self._reader)
        else:
            self.format = "recordio-header"
            self._start, self._stop = self._reader.place_of(1), self._identity_start(int(header.labels[0]))
        if self._stop <= self._start:
            raise InputError(f"{path} holds no image.")
        self.num_classes = num_classes or self._read_property() or self._count_classes(header)

    def __len__(self) -> int:
        return self._stop - self._start

    def name(self, index: int) -> str:
        """As `Source.name`."""
        return self._reader.name(self._start + index)

    def read(self, index: int) -> Sample:
        """As `Source.read`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        record = self._reader.read(self._start + index)
        name = self.name(index)
        return Sample(record.body, class_of(record.labels, name), name)

    def labels(self) -> np.ndarray:
        """As `Source.labels`, by a pass over the heads of the records."""
        labels = self._reader.first_labels(self._start, self._stop)
        for index in np.flatnonzero(np.isfinite(labels) & ((labels % 1 != 0) | (labels >= LABEL_LIMIT)))[:1]:
            class_of(labels[index : index + 1], self.name(int(index)))
        return np.where(np.isfinite(labels), labels, -1).astype(np.int64)

    def _check_fit(self) -> None:
        """Refuse a file of another format, and an index that belongs to another file."""
        for place in np.linspace(0, len(self._reader) - 1, _PROBED, dtype=np.int64).tolist():
            with contextlib.suppress(UnreadableRecord):
                self._reader.read(place)
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

    def _is_bookkeeping(self, place: int) -> bool:
        try:
            return self._reader.read(place).is_bookkeeping
        except UnreadableRecord:
            return False

    def _identity_start(self, hint: int) -> int:
        """The place of the first identity record. The header names its key in float32, so it may be a few off."""
        slack = int(np.spacing(np.float32(hint)))
        low = max(1, self._reader.place_of(hint - slack))
        high = min(len(self._reader), self._reader.place_of(hint + slack) + 1)
        for place in range(low, high):
            if self._is_bookkeeping(place):
                return place
        return min(self._reader.place_of(hint), len(self._reader))

    def _read_property(self) -> int | None:
        """The class count in the `property` file beside the data, None without that file."""
        path = self.path.with_name("property")
        if not path.is_file():
            return None
        first_line = path.read_text(errors="replace").partition("\n")[0]
        count = first_line.split(",")[0].strip()
        if not count.isdecimal() or int(count) < 1:
            raise InputError(f"{path} begins with {first_line[:40]!r} instead of 'num_classes,height,width'.")
        return int(count)

    def _count_classes(self, header: Record | None) -> int:
        if header is None:
            return int(self.labels().max(initial=0)) + 1
        first, stop = float(header.labels[0]), float(header.labels[1])
        if stop < LABEL_LIMIT:
            return int(stop - first)
        return len(self._reader) - self._stop


class FolderSource:
    """An image folder, `<identity>/<image>`. Class ids number the identity folders, empty ones too, by sorted name."""

    format = "folder"

    def __init__(self, path: Path, num_classes: int | None = None) -> None:
        self.path = path
        files: list[bytes] = []
        stops: list[int] = []
        try:
            with os.scandir(path) as entries:
                names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
            for name in names:
                images = sorted(image for image in os.listdir(path / name) if _is_image(image))
                files += [os.fsencode(image) for image in images]
                stops.append(len(files))
        except OSError as error:
            raise InputError(f"Cannot read {error.filename}: {error.strerror}.") from error
        if not files:
            raise InputError(f"No .rec and no identity folders with images in {path}: give the folder that holds them.")
        # One block of bytes: a list of strings would be copied into every worker as its reference counts change.
        self._file_names = b"".join(files)
        self._file_stops = np.cumsum([len(name) for name in files])
        self._identity_stops = np.array(stops, np.int64)
        self.identities = names
        self.num_classes = num_classes or len(names)

    def __len__(self) -> int:
        return len(self._file_stops)

    def labels(self) -> np.ndarray:
        """As `Source.labels`: they follow from the folders."""
        counts = np.diff(self._identity_stops, prepend=0)
        return np.repeat(np.arange(len(counts), dtype=np.int64), counts)

    def _label(self, index: int) -> int:
        return int(np.searchsorted(self._identity_stops, index, side="right"))

    def name(self, index: int) -> str:
        """As `Source.name`: the path of the file."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = int(self._file_stops[index - 1]) if index else 0
        file_name = os.fsdecode(self._file_names[start : int(self._file_stops[index])])
        return os.path.join(self.path, self.identities[self._label(index)], file_name)

    def read(self, index: int) -> Sample:
        """As `Source.read`."""
        path = self.name(index)
        try:
            with open(path, "rb") as file:
                return Sample(file.read(), self._label(index), path)
        except OSError as error:
            raise UnreadableImage(f"{path}: {error.strerror}") from error


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
