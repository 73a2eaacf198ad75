"""Parquet in the layout of Hugging Face, and Arrow IPC files as `datasets.save_to_disk` writes them.

Columns: `image`, a struct of `bytes` and `path`, and `label`, a whole number; class names stand in the schema. A row of
Parquet can only be had by unpacking hundreds of others, so that each file is copied to an Arrow file, once, which is
mapped into memory; Arrow IPC files are mapped as they are.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from partialfc.core.console import Progress
from partialfc.core.errors import InputError
from partialfc.data.images import UnreadableImage
from partialfc.data.sources.base import Sample, check_regular
from partialfc.data.sources.derived import locked, places, write_derived
from partialfc.data.sources.names import read_classes

_ROWS = 512  # a batch; its images must stay below the 2 GiB that Arrow's 32-bit offsets reach


def import_pyarrow() -> Any:
    """The package pyarrow, with its modules for IPC and Parquet.

    Raises:
        InputError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("Parquet and Arrow files need pyarrow: pip install 'partialfc[formats]'.") from error
    return pyarrow


def open_parquet(path: Path, num_classes: int | None) -> ArrowSource | None:
    """The `.parquet` or `.arrow` file at `path`, or those in the folder `path`; None without any.

    Raises:
        InputError: a file is damaged or has other columns, a label is no class id, or pyarrow is not installed.
        OSError: the folder cannot be listed.
    """
    if files := parquet_files(path, ".parquet"):
        return ArrowSource(path, files, _arrow_copies(files), num_classes)
    if files := parquet_files(path, ".arrow"):
        return ArrowSource(path, files, files, num_classes)
    return None


def parquet_files(path: Path, suffix: str) -> list[Path]:
    """The file `path`, or the files in the folder `path` by name, if they have the suffix."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    # Beside a data set of Hugging Face, cache-*.arrow are results of its own functions.
    return check_regular(
        file for file in files if file.suffix.lower() == suffix and not file.name.startswith((".", "cache-"))
    )


class ArrowSource:
    """The rows of Arrow files that are mapped into memory, in the order of the files' names.

    Args:
        path: the file or folder.
        files: the files that hold the rows, for messages.
        mapped: `files`, or the copy of each.
        num_classes: the number of classes; by default what the schema says, else the largest label + 1.
    """

    def __init__(self, path: Path, files: list[Path], mapped: list[Path], num_classes: int | None = None) -> None:
        self.path, self.format = path, files[0].suffix[1:].lower()
        self._arguments = path, files, mapped, num_classes
        self._files = files
        self._batches: list[Rows] = []
        self._file_stops: list[int] = []
        for file in mapped:
            self._batches += read_rows(file)
            self._file_stops.append(sum(len(rows.labels) for rows in self._batches))
        if not self._batches:
            raise InputError(f"{path} holds no rows: is it the right file?")
        self._stops: list[int] = np.cumsum([len(rows.labels) for rows in self._batches]).tolist()
        self._labels = np.concatenate([rows.labels for rows in self._batches])
        counted, names = read_classes(files[0].parent)
        names = _class_names(self._batches[0].batch.schema) or names
        self.num_classes: int = num_classes or len(names or ()) or counted or int(self._labels.max()) + 1
        self.identities = names if names and len(names) == self.num_classes else None

    def __reduce__(self) -> tuple[Any, ...]:
        return ArrowSource, self._arguments

    def __len__(self) -> int:
        return len(self._labels)

    def labels(self) -> np.ndarray:
        """As `Source.labels`."""
        return self._labels

    def name(self, index: int) -> str:
        """As `Source.name`: the row of its file, from 0, and the image's own path."""
        file = bisect_right(self._file_stops, index)
        row = index - (self._file_stops[file - 1] if file else 0)
        path = self.file_name(index)
        return f"row {row} of {self._files[file]}{path and f' ({path})'}"

    def file_name(self, index: int) -> str:
        """The path in the image's struct, "" without."""
        rows, row = self._locate(index)
        return "" if rows.paths is None else rows.paths[row].as_py() or ""

    def read(self, index: int) -> Sample:
        """As `Source.read`."""
        rows, row = self._locate(index)
        encoded = rows.images[row].as_py()
        if encoded is None:
            raise UnreadableImage(f"{self.name(index)}: it holds no bytes of an image")
        return Sample(encoded, int(self._labels[index]), self.name(index))

    def _locate(self, index: int) -> tuple[Rows, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        batch = bisect_right(self._stops, index)
        return self._batches[batch], index - (self._stops[batch - 1] if batch else 0)


# -- batches of rows ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """A checked batch.

    Attributes:
        images: the encoded images, an Arrow array of binary.
        paths: their paths, an Arrow array of strings, None without.
        labels: int64 (N,), from 0.
        batch: all of it as it was read.
    """

    images: Any
    paths: Any | None
    labels: np.ndarray
    batch: Any


def read_rows(file: Path) -> Iterator[Rows]:
    """The rows of a Parquet or Arrow file, in batches.

    Raises:
        InputError: the file is damaged, has other columns, or a label is no class id; the message names file and row.
    """
    pa = import_pyarrow()
    row = 0
    try:
        schema, batches = _open_batches(file)
        _check_schema(schema, file)
        for batch in batches:
            batch.validate(full=True)  # of offsets too: Arrow trusts them when it reads
            label, image = batch.column("label"), batch.column("image")
            labels = np.asarray(label.cast(pa.int64()).fill_null(-1))
            for bad in np.flatnonzero(labels < 0)[:1].tolist():
                raise InputError(
                    f"The label of row {row + bad} of {file} is {label[bad].as_py()}, but a class id is a whole number "
                    "from 0: correct the labels, or leave the row out."
                )
            parts = dict(zip(_fields(image.type), image.flatten(), strict=True))
            yield Rows(parts["bytes"], parts.get("path"), labels, batch)
            row += batch.num_rows
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise _unsound(file, row, error) from error


def _unsound(file: Path, row: int, error: BaseException) -> InputError:
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")[:200]
    return InputError(f"{file} cannot be read from row {row} on ({reason}): get a fresh copy of it.")


def _open_batches(file: Path) -> tuple[Any, Iterable[Any]]:
    """The schema of a file and its batches; an Arrow file may have the form for files or that for streams."""
    pa = import_pyarrow()
    if file.suffix.lower() == ".parquet":
        opened = pa.parquet.ParquetFile(pa.memory_map(os.fsencode(file)), pre_buffer=False)
        return opened.schema_arrow, opened.iter_batches(_ROWS, columns=["image", "label"], use_threads=False)
    mapped = pa.memory_map(os.fsencode(file))
    try:
        reader = pa.ipc.open_file(mapped)
    except pa.ArrowInvalid:
        mapped.seek(0)
        stream = pa.ipc.open_stream(mapped)
        return stream.schema, stream
    return reader.schema, map(reader.get_batch, range(reader.num_record_batches))


def _check_schema(schema: Any, file: Path) -> None:
    """Refuse a file without the columns `image` (a struct with `bytes`) and `label` (whole numbers)."""
    pa = import_pyarrow()
    for column in ("image", "label"):
        if schema.names.count(column) != 1:
            found = ", ".join(schema.names[:10])
            raise InputError(f"{file} has the columns {found}: rename one to {column}, as Hugging Face calls it.")
    image, label = schema.field("image").type, schema.field("label").type
    if not pa.types.is_integer(label):
        raise InputError(f"The column label of {file} is {label}, but a class id is a whole number: convert it.")
    inner = _fields(image) if pa.types.is_struct(image) else {}
    text = (pa.string(), pa.large_string())
    if inner.get("bytes") not in (pa.binary(), pa.large_binary()) or inner.get("path", text[0]) not in text:
        raise InputError(
            f"The column image of {file} is {str(image)[:80]}, but it must be a struct of bytes (binary) and path "
            "(string), with the encoded images in it."
        )


def _fields(struct: Any) -> dict[str, Any]:
    return {struct.field(number).name: struct.field(number).type for number in range(struct.num_fields)}


def _class_names(schema: Any) -> list[str] | None:
    """The names of the classes that Hugging Face's entry in the schema gives, None without."""
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return [str(name) for name in names] if isinstance(names, list) and names else None


# -- the Arrow copy of Parquet files -----------------------------------------------------------------------------------


def _arrow_copies(files: list[Path]) -> list[Path]:
    """The Arrow files of the rows of Parquet files: those of an earlier call, or new ones."""
    copies: list[Path] = []
    with Progress("copying Parquet to memory-mapped Arrow files, once", len(files), unit="file") as progress:
        for file in files:
            candidates = places([file], file.with_name(f".{file.stem}.arrow"))
            with locked(file.parent):
                copy = next((place for place in candidates if place.exists()), None)
                if copy is None:
                    copy = write_derived(candidates, partial(_write_copy, file))
                    progress.update(len(copies) + 1)
            if copy is None:
                raise InputError(
                    f"Reading the rows of {file} in any order takes an Arrow copy of it, for which there is no room at "
                    f"{' or '.join(map(str, candidates))}: set XDG_CACHE_HOME to a folder with more space."
                )
            copies.append(copy)
    return copies


def _write_copy(file: Path, target: BinaryIO) -> None:
    batches = (rows.batch for rows in read_rows(file))
    if (first := next(batches, None)) is None:
        raise InputError(f"{file} holds no rows: get a fresh copy of it, or remove it.")
    with import_pyarrow().ipc.new_file(target, first.schema) as writer:
        for batch in chain([first], batches):
            writer.write_batch(batch)
