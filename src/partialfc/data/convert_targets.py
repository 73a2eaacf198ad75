"""The formats that `convert` writes, one class each."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from partialfc.core.errors import InputError
from partialfc.core.files import atomic_file, write_file
from partialfc.data.images import UnreadableImage, decode_image
from partialfc.data.sources import open_source
from partialfc.data.sources.base import Source, file_name
from partialfc.data.sources.folder import IMAGE_SUFFIXES
from partialfc.data.sources.names import write_classes
from partialfc.data.sources.parquet import import_pyarrow, parquet_files, read_rows
from partialfc.data.sources.record_source import names_path
from partialfc.data.sources.recordio import LABEL_LIMIT, build_payload, build_record
from partialfc.data.sources.tar_members import BLOCK, member_head

TargetName = Literal["recordio", "folder", "webdataset", "parquet"]
_ROWS = 512  # of a row group of Parquet
_MAX_NAMES = 1 << 20  # characters of class names in the schema, which every .parquet file repeats
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
    """A set that is being written, part by part. Parts hold whole identities, in the order of their labels."""

    def prepare(self, number: int, items: list[Item]) -> Any:
        """Do for a part what can be done in any order and in threads, replacing what an interrupted call has done."""
        ...

    def commit(self, prepared: Any) -> Any:
        """Add a prepared part, in order; returns the state that the next process needs, as JSON can hold it."""
        ...

    def finish(self) -> None:
        """Write what belongs to all parts."""
        ...


class _Folder:
    """`<identity>/…/<image>`."""

    def __init__(self, work: Path, source: Source, parts: int, states: list[Any]) -> None:
        self._work, self._paths = work, _Paths(source)

    def prepare(self, number: int, items: list[Item]) -> None:
        for item, (stem, suffix) in zip(items, self._paths.of(items), strict=True):
            path = self._work / (stem + suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(item.encoded)

    def commit(self, prepared: Any) -> None: ...

    def finish(self) -> None:
        for folder in self._paths.folders:
            (self._work / folder).mkdir(exist_ok=True)
        os.sync()


class _WebDataset:
    """A `.tar` file for each part: `<identity>/…/<image>.jpg` and `.cls`."""

    def __init__(self, work: Path, source: Source, parts: int, states: list[Any]) -> None:
        self._work, self._source, self._paths = work, source, _Paths(source, dots="_")

    def prepare(self, number: int, items: list[Item]) -> None:
        if not items:
            return
        with atomic_file(self._work / f"train-{number:06d}.tar") as file:
            for item, (stem, suffix) in zip(items, self._paths.of(items), strict=True):
                for name, content in ((stem + suffix, item.encoded), (stem + ".cls", b"%d" % item.label)):
                    file.write(member_head(name, len(content)) + content + bytes(-len(content) % BLOCK))
            file.write(bytes(2 * BLOCK))

    def commit(self, prepared: Any) -> None: ...

    def finish(self) -> None:
        write_classes(self._work, self._source.num_classes, self._source.identities)


class _Parquet:
    """A `.parquet` file for each part, in the layout of Hugging Face."""

    def __init__(self, work: Path, source: Source, parts: int, states: list[Any]) -> None:
        pa = import_pyarrow()
        self._work, self._source, self._parts = work, source, parts
        label: dict[str, Any] = {"dtype": "int64", "_type": "Value"}
        if source.identities and sum(map(len, source.identities)) <= _MAX_NAMES:
            label = {"names": source.identities, "_type": "ClassLabel"}
        features = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        schema = pa.schema([("image", image), ("label", pa.int64())])
        self._schema = schema.with_metadata({b"huggingface": json.dumps(features).encode()})

    def prepare(self, number: int, items: list[Item]) -> None:
        pa = import_pyarrow()
        if not items:
            return
        options = {"compression": "none", "use_dictionary": False}  # images are compressed already
        with (
            atomic_file(self._work / f"train-{number:05d}-of-{self._parts:05d}.parquet") as file,
            pa.parquet.ParquetWriter(file, self._schema, **options) as writer,
        ):
            for start in range(0, len(items), _ROWS):
                rows = items[start : start + _ROWS]
                images = [{"bytes": row.encoded, "path": _utf8(row.file_name) or None} for row in rows]
                columns = {"image": images, "label": [row.label for row in rows]}
                writer.write_batch(pa.RecordBatch.from_pydict(columns, self._schema))

    def commit(self, prepared: Any) -> None: ...

    def finish(self) -> None:
        write_classes(self._work, self._source.num_classes, self._source.identities)


class _RecordIO:
    """`train.rec` in the layout with a header, `train.idx` and `property`; the names of images stand beside it.

    Its state after a part: the sizes of the three files, the shape of the images, and label, first key and last key + 1
    of each identity of the part.
    """

    def __init__(self, work: Path, source: Source, parts: int, states: list[Any]) -> None:
        if (highest := int(source.labels().max(initial=0))) >= LABEL_LIMIT:
            raise InputError(
                f"{source.path} has labels up to {highest}, but RecordIO stores them as float32, which tells class ids "
                f"apart only below 2^24 = {LABEL_LIMIT}: convert to folder, webdataset or parquet."
            )
        self._work, self._source, self._named = work, source, bool(file_name(source, 0))
        self._rec = work / "train.rec"
        self._files = [self._rec, work / "train.idx", names_path(self._rec)]
        self._shape = tuple(states[-1]["shape"]) if states else ()
        self._runs: list[tuple[int, int, int]] = [tuple(run) for state in states for run in state["runs"]]
        for file, size in zip(self._files, states[-1]["sizes"] if states else (0, 0, 0), strict=True):
            file.touch()
            os.truncate(file, size)
        if not states:
            self._append([((0.0, 0.0), b"")], 0, [])

    def prepare(self, number: int, items: list[Item]) -> list[Item]:
        return items

    def commit(self, prepared: list[Item]) -> dict[str, Any]:
        key = first = self._runs[-1][2] if self._runs else 1
        runs: list[tuple[int, int, int]] = []
        for label, images in groupby(prepared, key=lambda item: item.label):
            runs.append((label, key, key := key + len(list(images))))
        for item in prepared:
            if self._shape:
                break
            with suppress(UnreadableImage):
                self._shape = decode_image(item.encoded).shape[:2]
        names = [_clean(item.file_name, "/") for item in prepared] if self._named else []
        self._append([(float(item.label), item.encoded) for item in prepared], first, names)
        self._runs += runs
        return {"sizes": [file.stat().st_size for file in self._files], "shape": self._shape, "runs": runs}

    def finish(self) -> None:
        first = self._runs[-1][2] if self._runs else 1
        ranges = {label: (float(start), float(stop)) for label, start, stop in self._runs}
        classes = self._source.num_classes
        self._append([(ranges.get(label, (first, first)), b"") for label in range(classes)], first, [])
        with self._rec.open("r+b") as file:
            file.write(build_record(build_payload((float(first), float(first + classes)), 0, b"")))
        height, width = self._shape or (0, 0)
        write_file(self._work / "property", f"{classes},{height},{width}\n")
        if not self._named:
            self._files[2].unlink()
        write_classes(self._work, classes, self._source.identities)

    def _append(self, records: Sequence[tuple[Any, bytes]], key: int, names: list[str]) -> None:
        """Add records with the keys from `key` on, and the names of their images if there are any."""
        offset = self._rec.stat().st_size
        texts: tuple[list[bytes], list[str], list[str]] = [], [], []
        for number, (label, body) in enumerate(records, key):
            record = build_record(build_payload(label, number, body))
            texts[0].append(record)
            texts[1].append(f"{number}\t{offset}\n")
            offset += len(record)
        texts[2].extend(f"{number}\t{name}\n" for number, name in enumerate(names, key))
        for path, text in zip(self._files, texts, strict=True):
            with path.open("ab") as file:
                file.writelines(os.fsencode(line) if isinstance(line, str) else line for line in text)
                file.flush()
                os.fsync(file.fileno())


TARGETS: dict[str, Callable[[Path, Source, int, list[Any]], Target]] = {
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

    Attributes:
        folders: the folder of each class, in an order in which they sort.

    Args:
        dots: what stands for dots in the names.
    """

    def __init__(self, source: Source, dots: str = ".") -> None:
        width, names = len(str(source.num_classes - 1)), source.identities
        self._names, self._dots = names, dots
        if names is None:
            self.folders = [f"{label:0{width}d}" for label in range(source.num_classes)]
        elif names == sorted(set(names)) and all(name == _clean(name) for name in names):
            self.folders = names
        else:
            self.folders = [f"{label:0{width}d}_{_clean(name)}" for label, name in enumerate(names)]

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
            unique = stem = "/".join([self.folders[item.label], *(parts or [f"{counts[item.label]:06d}"])])
            while unique in taken:
                unique = f"{stem}-{counts[item.label]}"
                counts[item.label] += 1
            counts[item.label] += 1
            taken.add(unique)
            paths.append((unique, suffix or _suffix(item.encoded)))
        return paths


def _suffix(encoded: bytes) -> str:
    return next((suffix for magic, suffix in _KINDS.items() if encoded.startswith(magic)), ".jpg")


def _clean(name: str, allowed: str = "") -> str:
    """A name that a file system takes, does not hide, and that stays on one line."""
    name = "".join("_" if not char.isprintable() or (char in "/\\" and char not in allowed) else char for char in name)
    if name.startswith("."):
        name = f"_{name}"
    return name if len(os.fsencode(name)) <= _MAX_NAME or allowed else name[-_MAX_NAME // 4 :]


def _utf8(name: str) -> str:
    return name.encode(errors="replace").decode()
