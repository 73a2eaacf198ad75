"""Files derived from data and kept for the next time: indexes, and memory-mapped copies.

They stand beside the data, or in `$XDG_CACHE_HOME/partialfc` where nothing can be written there. Their names hold a
digest of the names, sizes and modification times of the files that they were made from.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from partialfc.core.files import atomic_file

SCHEMA_VERSION = 1


def places(files: Sequence[Path], beside: Path) -> list[Path]:
    """Where a file derived from `files` may stand: beside the data, under the name of `beside` and a digest, or cached.

    Raises:
        OSError: one of the files is not there.
    """
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    name = f"{beside.stem}-{_digest(json.dumps([SCHEMA_VERSION, states]))}{beside.suffix}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "partialfc"
    return [beside.with_name(name), cache / f"{_digest(str(beside.absolute()))}{name}"]


def write_derived(candidates: Sequence[Path], write: Callable[[BinaryIO], None]) -> Path | None:
    """Write a file by `write` at the first of `places` that can be written; where it stands, None if nowhere."""
    for place in candidates:
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(place) as file:
                write(file)
            for older in place.parent.glob(f"{place.stem[:-16]}????????????????{place.suffix}"):
                if older != place:
                    older.unlink()
            return place
    return None


def derived_rows(files: Sequence[Path], beside: Path, build: Callable[[], np.ndarray]) -> np.ndarray:
    """What `build` makes of the files, memory-mapped from the `.npy` that this or an earlier call has written."""
    candidates = places(files, beside)
    with locked(beside.parent):
        for place in candidates:
            with suppress(OSError, ValueError, EOFError):  # of a file that is not there, or damaged
                return np.load(place, mmap_mode="r", allow_pickle=False)
        rows = build()
        written = write_derived(candidates, lambda file: np.save(file, rows, allow_pickle=False))
    return rows if written is None else np.load(written, mmap_mode="r", allow_pickle=False)


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


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]
