"""Files derived from data and kept for the next time: indexes, and memory-mapped copies.

They stand beside the data, or in `$XDG_CACHE_HOME/partialfc` where nothing can be written there. Each holds the names,
sizes and modification times of the files that it was made from, so that a changed file makes a new one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from partialfc.core.files import atomic_file

SCHEMA_VERSION = 1
_MAX_HEADER = 1 << 28  # bytes; a shard takes about 50


def fingerprint(files: Sequence[Path]) -> dict[str, Any]:
    """What tells whether these files have changed since something was derived from them, as JSON can hold it."""
    states = [(file, file.stat()) for file in files]
    return {
        "schema_version": SCHEMA_VERSION,
        "files": [[file.name, state.st_size, state.st_mtime_ns] for file, state in states],
    }


def places(beside: Path) -> list[Path]:
    """Where a derived file may stand: at `beside`, or in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(os.fsencode(beside.absolute())).hexdigest()[:16]
    return [beside, cache / "partialfc" / f"{digest}{beside.name}"]


def write_derived(beside: Path, write: Callable[[BinaryIO], None]) -> Path | None:
    """Write a file by `write` at the first of `places` that can be written; where it stands, None if nowhere."""
    for place in places(beside):
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(place) as file:
                write(file)
            return place
    return None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time into the block, of those on this machine that name the same folder.

    Of the ranks of a job, one derives the file and the others find it. Where a file system has no locks, all derive it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def derived_rows(files: Sequence[Path], beside: Path, build: Callable[[], np.ndarray]) -> np.ndarray:
    """The rows that `build` makes of the files, kept at `beside` and memory-mapped from there.

    Args:
        files: what the rows are derived from.
        beside: where the file of rows stands if it can be written: a line of JSON, then the rows as they are in memory.
        build: makes the rows, an array (N,) of any dtype without objects.
    """
    source = fingerprint(files)
    with locked(beside.parent):
        for place in places(beside):
            if (rows := _read_rows(place, source)) is not None:
                return rows
        rows = build()
        header = {**source, "dtype": np.lib.format.dtype_to_descr(rows.dtype), "rows": len(rows)}

        def write(file: BinaryIO) -> None:
            file.write(json.dumps(header).encode() + b"\n")
            file.write(memoryview(rows).cast("B") if len(rows) else b"")

        place = write_derived(beside, write)
        kept = None if place is None else _read_rows(place, source)
        return rows if kept is None else kept


def _read_rows(place: Path, source: dict[str, Any]) -> np.ndarray | None:
    """The rows in a derived file, None if there is none or it was derived from other files."""
    try:
        with place.open("rb") as file:
            header = json.loads(file.readline(_MAX_HEADER))
            if {key: header[key] for key in source} != source:
                return None
            descr = header["dtype"]
            dtype = np.dtype(descr if isinstance(descr, str) else [(str(name), str(code)) for name, code in descr])
            if not header["rows"] or dtype.hasobject:
                return None
            return np.memmap(file, dtype, "r", file.tell(), (int(header["rows"]),))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
