"""Names of images, packed, and of classes, in a file beside the formats that have no place for them."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from partialfc.core.errors import InputError
from partialfc.core.files import write_file
from partialfc.core.schema import check_schema_version

CLASSES = "partialfc-classes.json"
SCHEMA_VERSION = 1
_AT_ONCE = 1 << 24


class PackedStrings:
    """Strings in one block of bytes: workers would copy a list of strings as its reference counts change.

    Args:
        block: the strings without gaps, in the encoding of file names.
        stops: where each one ends in the block, int64 (N,).
    """

    def __init__(self, block: bytes | mmap.mmap, stops: np.ndarray) -> None:
        self.block, self._stops = block, stops

    def __len__(self) -> int:
        return len(self._stops)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self._stops):
            raise IndexError(index)
        start = int(self._stops[index - 1]) if index else 0
        return os.fsdecode(bytes(self.block[start : int(self._stops[index])]))


def pack(strings: Iterable[str]) -> PackedStrings:
    """The strings in one block."""
    encoded = [os.fsencode(string) for string in strings]
    return PackedStrings(b"".join(encoded), np.cumsum([len(string) for string in encoded], dtype=np.int64))


def pack_lines(path: Path) -> PackedStrings:
    """The lines of a file, with their ends, mapped into memory."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return pack([])
        block = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    data = np.frombuffer(block, np.uint8)
    starts = range(0, len(data), _AT_ONCE)
    stops = [np.flatnonzero(data[start : start + _AT_ONCE] == ord("\n")) + start + 1 for start in starts]
    return PackedStrings(block, np.concatenate(stops))


def read_classes(folder: Path) -> tuple[int, list[str] | None]:
    """The number of classes that the file of classes in a folder gives, 0 without, and their names, None without.

    Raises:
        InputError: the file is damaged, or of a newer version.
    """
    path = folder / CLASSES
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        check_schema_version(path, content, SCHEMA_VERSION)
        count, names = content["num_classes"], content["identities"]
        sound = type(count) is int and count >= 1 and (names is None or len(names) == count)
    except FileNotFoundError:
        return 0, None
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise InputError(f"{path} does not name the classes: remove it, and they are numbered.")
    return count, names and [str(name) for name in names]


def write_classes(folder: Path, num_classes: int, identities: list[str] | None) -> None:
    """Write the file of classes of a folder."""
    content = {"schema_version": SCHEMA_VERSION, "num_classes": num_classes, "identities": identities}
    write_file(folder / CLASSES, json.dumps(content) + "\n")
