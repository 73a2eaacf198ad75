"""LMDB, in which synthetic sets are published: keys "0", "1", …, `__len__` and `__classnum__`, values in msgpack.

A value is an array of the encoded image and its class id. LMDB trusts its files: a truncated or damaged one kills the
process that reads it. Each file is therefore walked through once, record by record, in a process of its own, and only
opened here if that survives; the labels found are kept beside the file.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from partialfc.core.console import Progress
from partialfc.core.errors import InputError
from partialfc.data.images import UnreadableImage
from partialfc.data.sources.base import Sample, check_regular
from partialfc.data.sources.derived import derived_rows

_SECONDS = 120  # for a thousand records, until the process that reads them is taken for hanging
_RECORDS_AT_ONCE = 1024
_SCAN = "import sys; from partialfc.data.sources.lmdb import scan; scan(sys.argv[1])"
_MAX_RECORDS = 1 << 40


def open_lmdb(path: Path, num_classes: int | None) -> LmdbSource | None:
    """The LMDB file at `path` (`.lmdb` or `.mdb`), or the one in the folder `path`; None without.

    Raises:
        InputError: the folder holds several, the file is damaged or holds other values, or a package is not installed.
        OSError: the folder cannot be listed.
    """
    files = [path]
    if path.is_dir():
        files = [path / "data.mdb"] if (path / "data.mdb").exists() else sorted(path.glob("*.lmdb"))
        files = [file / "data.mdb" if file.is_dir() else file for file in files]
    files = check_regular(file for file in files if file.suffix.lower() in (".lmdb", ".mdb"))
    if len(files) > 1:
        raise InputError(f"{path} holds several .lmdb files ({files[0].name}, …): give the path of one of them.")
    return LmdbSource(files[0], num_classes) if files else None


class LmdbSource:
    """The records of an LMDB file, in the order of their numbers."""

    format = "lmdb"
    identities: list[str] | None = None

    def __init__(self, path: Path, num_classes: int | None = None) -> None:
        self.path, self._given = path, num_classes
        self._opened: _Opened | None = None
        if missing := [name for name in ("lmdb", "msgpack") if find_spec(name) is None]:
            raise InputError(f"LMDB files need {missing[0]}: pip install 'partialfc[formats]'.")
        rows = derived_rows([path], path.with_name(f".{path.stem}.npy"), lambda: _scan_apart(path))
        self._labels, classes = rows[1:], int(rows[0])
        self.num_classes: int = num_classes or classes or int(self._labels.max()) + 1

    def __reduce__(self) -> tuple[Any, ...]:
        return LmdbSource, (self.path, self._given)

    def __len__(self) -> int:
        return len(self._labels)

    def labels(self) -> np.ndarray:
        """As `Source.labels`."""
        return np.array(self._labels)

    def name(self, index: int) -> str:
        """As `Source.name`."""
        return f"record {index} of {self.path}"

    def read(self, index: int) -> Sample:
        """As `Source.read`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        with self._environment().begin() as transaction:
            value = transaction.get(b"%d" % index)
        try:
            return Sample(*_parse(value), self.name(index))
        except ValueError as error:
            raise UnreadableImage(f"{self.name(index)}: {error}") from error

    def _environment(self) -> Any:
        """The opened file. LMDB neither opens a file twice in a process nor can one be used in another after a fork."""
        if self._opened is None or self._opened.process != os.getpid():
            with _LOCK:
                key = os.path.realpath(self.path)
                opened = _OPENED.get(key)
                if opened is not None and opened.process != os.getpid():
                    opened.environment.close()
                    opened = None
                self._opened = _OPENED[key] = opened or _Opened(os.getpid(), _open(self.path))
        return self._opened.environment


@dataclass
class _Opened:
    process: int
    environment: Any


_LOCK = threading.Lock()
_OPENED: WeakValueDictionary[str, _Opened] = WeakValueDictionary()


def _open(path: Path) -> Any:
    import lmdb

    return lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False)


def _parse(value: bytes | memoryview | None) -> tuple[bytes, int]:
    """The encoded image and the class id in a value. A ValueError says what is wrong with it."""
    import msgpack

    if value is None:
        raise ValueError("its key is missing")
    try:
        image, label = msgpack.unpackb(value)
    except (ValueError, TypeError, msgpack.UnpackException):
        image, label = None, None
    if not isinstance(image, bytes) or type(label) is not int or not 0 <= label < 1 << 62:
        raise ValueError("its value is no array of image bytes and a class id in msgpack")
    return image, label


# -- the walk through the file, in another process ---------------------------------------------------------------------


def _scan_apart(path: Path) -> np.ndarray:
    """`__classnum__` (0 if unknown) and then the label of each record (−1 if it cannot be read), int64 (1 + N,).

    Raises:
        InputError: the file is no LMDB, or kills the process that reads it, or no record has the expected form.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command, found = [sys.executable, "-c", _SCAN, str(path)], bytearray()
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, env=environment) as child,
        Progress(f"checking {path.name}", unit="record") as progress,
    ):
        assert child.stdout is not None
        assert child.stderr is not None
        while block := child.stdout.read(1 << 16):
            found += block
            progress.update(len(found) // 8)
        said = child.stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
    if child.returncode == 0:
        return np.frombuffer(bytes(found), np.int64)
    if child.returncode < 0:
        said = f"reading it ends the process with {signal.Signals(-child.returncode).name}"
    raise InputError(f"{path} is no sound LMDB file ({said}): get a fresh copy of it.")


def scan(path: str) -> None:
    """Read all records of an LMDB file; see `_scan_apart`, which does this in a process of its own.

    Writes the numbers to standard output in binary, or a sentence to standard error.
    """
    try:
        with _open(Path(path)) as environment, environment.begin(buffers=True) as transaction:
            pages, entries = environment.info()["last_pgno"] + 1, environment.stat()["entries"]
            if pages * environment.stat()["psize"] > os.path.getsize(path):
                raise ValueError(f"it has {os.path.getsize(path)} bytes and counts {pages} pages")
            count = _number(transaction.get(b"__len__"), "__len__")
            if not 0 < count <= entries:
                raise ValueError(f"it has {entries} keys and __len__ is {count}")
            classes = transaction.get(b"__classnum__")
            numbers, readable = [0 if classes is None else _number(classes, "__classnum__")], 0
            for index in range(count):
                if index % _RECORDS_AT_ONCE == 0:
                    signal.alarm(_SECONDS)  # which ends the process
                label = -1
                with suppress(ValueError):
                    label = _parse(transaction.get(b"%d" % index))[1]
                numbers.append(label)
                readable += label >= 0
                if len(numbers) == _RECORDS_AT_ONCE or index == count - 1:
                    sys.stdout.buffer.write(np.array(numbers, np.int64).tobytes())
                    numbers = []
            sys.stdout.flush()
            if not readable:
                raise ValueError("no value is an array of image bytes and a class id in msgpack")
    except Exception as error:
        sys.exit(str(error) or type(error).__name__)


def _number(value: bytes | memoryview | None, key: str) -> int:
    import msgpack

    number = None if value is None else msgpack.unpackb(value)
    if not isinstance(number, int) or not 0 <= number < _MAX_RECORDS:
        raise ValueError(f"its {key} is no whole number in msgpack")
    return number
