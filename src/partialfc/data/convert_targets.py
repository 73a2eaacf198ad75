"""The formats that `convert` writes, one class each."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from partialfc.core.errors import InputError
from partialfc.core.files import atomic_file, write_file
from partialfc.data.sources import open_source
from partialfc.data.sources.base import Source, file_name
from partialfc.data.sources.folder import IMAGE_SUFFIXES
from partialfc.data.sources.names import write_classes
from partialfc.data.sources.parquet import import_pyarrow, parquet_files, read_rows
from partialfc.data.sources.record_source import names_path
from partialfc.data.sources.recordio import LABEL_LIMIT, RecordReader, RecordWriter
from partialfc.data.sources.tar_members import BLOCK, member_head

PARTS = ".parts"
TargetName = Literal["recordio", "folder", "webdataset", "parquet"]
_ROWS = 512  # of a row group of Parquet
_MAX_NAMES = 1 << 20  # characters of class names in the schema, which every .parquet file repeats
_FILE_NAMES = ("utf-8", "surrogateescape")
_MAX_NAME = 200  # bytes of a file's name; file systems take 255
_KINDS = {
    b"\xff\xd8": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp", b"BM": ".bmp", b"GIF8": ".gif", b"II*\0": ".tif",
    b"MM\0*": ".tif", b"P5": ".ppm", b"P6": ".ppm",
}  # fmt: skip


class Item(NamedTuple):
    """An image to write: its bytes, its class id, and its path where it came from, "" if unknown."""

    encoded: bytes
    label: int
    file_name: str


class Target(Protocol):
    """A set that is being written, part by part, in any order and in threads. A part holds whole identities."""

    def write(self, number: int, items: list[Item]) -> None:
        """Write a part, in place of what an interrupted call has written of it."""
        ...

    def finish(self) -> None:
        """Write what belongs to all parts."""
        ...


class _Folder:
    """`<identity>/…/<image>`."""

    def __init__(self, work: Path, source: Source, parts: int) -> None:
        self._work, self._num_classes, self._paths = work, source.num_classes, _Paths(source)

    def write(self, number: int, items: list[Item]) -> None:
        folders: set[str] = set()
        for item, (stem, suffix) in zip(items, self._paths.of(items), strict=True):
            path = os.path.join(self._work, stem + suffix)
            if (folder := os.path.dirname(path)) not in folders:
                os.makedirs(folder, exist_ok=True)
                folders.add(folder)
            with open(path, "wb") as file:
                file.write(item.encoded)

    def finish(self) -> None:
        for label in range(self._num_classes):
            (self._work / self._paths.folder(label)).mkdir(exist_ok=True)
        os.sync()


class _WebDataset:
    """A `.tar` file for each part, with `<identity>/…/<image>.jpg` and `.cls`."""

    def __init__(self, work: Path, source: Source, parts: int) -> None:
        self._work, self._source, self._paths = work, source, _Paths(source, dots="_")

    def write(self, number: int, items: list[Item]) -> None:
        with atomic_file(self._work / f"train-{number:06d}.tar") as file:
            for item, (stem, suffix) in zip(items, self._paths.of(items), strict=True):
                for name, content in ((stem + suffix, item.encoded), (stem + ".cls", b"%d" % item.label)):
                    file.write(member_head(name, len(content)) + content + bytes(-len(content) % BLOCK))
            file.write(bytes(2 * BLOCK))

    def finish(self) -> None:
        write_classes(self._work, self._source.num_classes, self._source.identities)


class _Parquet:
    """A `.parquet` file for each part, in the layout of Hugging Face."""

    def __init__(self, work: Path, source: Source, parts: int) -> None:
        pa = import_pyarrow()
        self._work, self._source, self._parts = work, source, parts
        label: dict[str, Any] = {"dtype": "int64", "_type": "Value"}
        if source.identities and sum(map(len, source.identities)) <= _MAX_NAMES:
            label = {"names": source.identities, "_type": "ClassLabel"}
        features = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        schema = pa.schema([("image", image), ("label", pa.int64())])
        self._schema = schema.with_metadata({b"huggingface": json.dumps(features).encode()})

    def write(self, number: int, items: list[Item]) -> None:
        pa = import_pyarrow()
        options = {"compression": "none", "use_dictionary": False}  # images are compressed already
        with (
            atomic_file(self._work / f"train-{number:05d}-of-{self._parts:05d}.parquet") as file,
            pa.parquet.ParquetWriter(file, self._schema, **options) as writer,
        ):
            for start in range(0, len(items), _ROWS):
                rows = items[start : start + _ROWS]
                paths = [row.file_name.encode(errors="replace").decode() or None for row in rows]
                images = [{"bytes": row.encoded, "path": path} for row, path in zip(rows, paths, strict=True)]
                columns = {"image": images, "label": [row.label for row in rows]}
                writer.write_batch(pa.RecordBatch.from_pydict(columns, self._schema))

    def finish(self) -> None:
        write_classes(self._work, self._source.num_classes, self._source.identities)


class _RecordIO:
    """`train.rec` in the layout with a header, and the names of images beside it: parts first, then all of them."""

    def __init__(self, work: Path, source: Source, parts: int) -> None:
        if (highest := int(source.labels().max(initial=0))) >= LABEL_LIMIT:
            raise InputError(
                f"{source.path} has labels up to {highest}, but RecordIO stores them as float32, which tells class ids "
                f"apart only below 2^24 = {LABEL_LIMIT}: convert to folder, webdataset or parquet."
            )
        self._work, self._source = work, source

    def write(self, number: int, items: list[Item]) -> None:
        folder = self._work / PARTS / f"{number:06d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_file(folder / "names", "".join(f"{_one_line(item.file_name)}\n" for item in items).encode(*_FILE_NAMES))
        with RecordWriter(folder / "train.rec", header=False) as writer:
            for item in items:
                writer.write(item.encoded, item.label)

    def finish(self) -> None:
        path, classes = self._work / "train.rec", self._source.num_classes
        for left in (path, path.with_suffix(".idx"), path.with_name("property")):
            left.unlink(missing_ok=True)
        key = 0
        with atomic_file(names_path(path)) as names, RecordWriter(path, num_classes=classes) as writer:
            for folder in sorted((self._work / PARTS).iterdir()):
                reader = RecordReader(folder / "train.rec")
                for row, name in enumerate((folder / "names").read_bytes().splitlines()):
                    record = reader.read(row)
                    writer.write(record.body, int(record.labels[0]))
                    key += 1
                    names.write(b"%d\t%s\n" % (key, name))
        if not file_name(self._source, 0):
            names_path(path).unlink()
        write_classes(self._work, classes, self._source.identities)


TARGETS: dict[str, Callable[[Path, Source, int], Target]] = {
    "recordio": _RecordIO,
    "folder": _Folder,
    "webdataset": _WebDataset,
    "parquet": _Parquet,
}


def written_images(work: Path, target: str) -> Iterator[tuple[bytes, int]]:
    """The encoded images and the class ids of a finished set."""
    if target == "parquet":  # not through `open_source`, which would copy it
        for file in parquet_files(work, ".parquet"):
            for rows in read_rows(file):
                yield from zip(rows.images.to_pylist(), rows.labels.tolist(), strict=True)
        return
    source = open_source(work)
    for index in range(len(source)):
        sample = source.read(index)
        yield sample.encoded, sample.label


# -- names of files ----------------------------------------------------------------------------------------------------


class _Paths:
    """Where images go in a set whose storage has file names: `<identity>/<path below it>`.

    Args:
        dots: what stands for dots in the names.
    """

    def __init__(self, source: Source, dots: str = ".") -> None:
        self._width, self._names, self._dots = len(str(source.num_classes - 1)), source.identities, dots
        names = self._names or []
        self._numbered = names != sorted(set(names)) or not all(name and name == _clean(name) for name in names)

    def folder(self, label: int) -> str:
        """The folder of a class; their names sort as the class ids do."""
        if self._names is not None and not self._numbered:
            return self._names[label]
        name = "" if self._names is None else f"_{_clean(self._names[label])}"
        return f"{label:0{self._width}d}{name}"

    def of(self, items: list[Item]) -> list[tuple[str, str]]:
        """Path without suffix, and suffix, of each image of a part; no two paths are equal without it."""
        taken: set[str] = set()
        counts: Counter[int] = Counter()
        paths: list[tuple[str, str]] = []
        for item in items:
            below = item.file_name
            if self._names is not None:
                below = below.removeprefix(self._names[item.label] + "/")
            stem, suffix = os.path.splitext(below)
            if suffix.lower() not in IMAGE_SUFFIXES:
                stem, suffix = below, ""
            parts = [_clean(part).replace(".", self._dots) for part in stem.split("/") if part.strip(".")]
            unique = stem = "/".join([self.folder(item.label), *(parts or [f"{counts[item.label]:06d}"])])
            while unique in taken:
                unique = f"{stem}-{counts[item.label]}"
                counts[item.label] += 1
            counts[item.label] += 1
            taken.add(unique)
            paths.append((unique, suffix or _suffix(item.encoded)))
        return paths


def _suffix(encoded: bytes) -> str:
    return next((suffix for magic, suffix in _KINDS.items() if encoded.startswith(magic)), ".jpg")


def _clean(name: str) -> str:
    """A name for a file: on one line, not hidden, and not too long."""
    name = _one_line(name).replace("/", "_").replace("\\", "_")
    name = f"_{name}" if name.startswith(".") else name
    return name if len(os.fsencode(name)) <= _MAX_NAME else name[-_MAX_NAME // 4 :]


def _one_line(text: str) -> str:
    return "".join(char if char.isprintable() or "\udc80" <= char <= "\udcff" else "_" for char in text)
