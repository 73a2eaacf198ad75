"""`.lst` files, in which im2rec lists loose images: lines `key TAB label TAB path`, perhaps with more labels."""

from __future__ import annotations

import os
from array import array
from mmap import mmap
from operator import itemgetter
from pathlib import Path

import numpy as np

from partialfc.core.errors import InputError
from partialfc.data.sources.base import Sample, read_file, skip_byte_order_mark
from partialfc.data.sources.names import pack

_PROBES = 16  # images tried to find out what the paths are relative to
_LINE = 1 << 16  # bytes; a longer line belongs to another kind of file


def open_list(path: Path, num_classes: int | None) -> ListSource | None:
    """The `.lst` file at `path`, None for another path.

    Raises:
        InputError: a line is not of the form, or its label is no class id; the message names it.
    """
    return ListSource(path, num_classes) if path.suffix.lower() == ".lst" and path.is_file() else None


class ListSource:
    """The images that a `.lst` lists, in its order; paths are relative to its folder, or to the parent of that."""

    format = "list"
    identities: list[str] | None = None

    def __init__(self, path: Path, num_classes: int | None = None) -> None:
        self.path = path
        labels, files = array("q"), []
        with path.open("rb") as lines:
            number = 0
            skip_byte_order_mark(lines)
            while line := lines.readline(_LINE):
                number += 1
                if line.strip():
                    label, file = _parse(line, f"line {number} of {path}")
                    labels.append(label)
                    files.append(file)
        if not files:
            raise InputError(f"{path} lists no images: is it the right file?")
        probes = files[:: max(1, len(files) // _PROBES)]
        if any("\\" in probe for probe in probes) and not _found(path, probes)[0]:  # a list written on Windows
            files, probes = ([name.replace("\\", "/") for name in names] for names in (files, probes))
        self._folder = _found(path, probes)[1]
        self._files, self._labels = pack(files), np.array(labels, np.int64)
        self.num_classes: int = num_classes or int(self._labels.max()) + 1

    def __len__(self) -> int:
        return len(self._files)

    def labels(self) -> np.ndarray:
        """As `Source.labels`."""
        return self._labels

    def name(self, index: int) -> str:
        """As `Source.name`: the path of the file."""
        return os.path.join(self._folder, self._files[index])

    def file_name(self, index: int) -> str:
        """The path as the list gives it."""
        return self._files[index]

    def read(self, index: int) -> Sample:
        """As `Source.read`."""
        path = self.name(index)
        return Sample(read_file(path), int(self._labels[index]), path)

    def order(self) -> list[bytes | mmap]:
        """What tells the samples apart: the names of the files, and the labels."""
        return [self._files.block, self._labels.tobytes()]


def _found(path: Path, probes: list[str]) -> tuple[int, Path]:
    """How many of the images exist relative to the folder of the list or its parent, whichever has more, and which."""
    folders = (path.parent, path.parent / os.pardir)
    return max(((sum((folder / probe).is_file() for probe in probes), folder) for folder in folders), key=itemgetter(0))


def _parse(line: bytes, name: str) -> tuple[int, str]:
    """The class id and the path in a line."""
    fields = line.rstrip(b"\r\n").split(b"\t")
    if len(fields) < 3 or not fields[-1] or b"\0" in line:
        raise InputError(f"{name} is {_shown(line)}, but an image is listed as 'key TAB label TAB path': correct it.")
    text = fields[1].strip()
    try:
        label = int(text) if text.isdigit() else float(text)
    except ValueError:
        label = -1
    if not (0 <= label < 1 << 53 and label == int(label)):
        raise InputError(f"The label in {name} is {_shown(text)}, but a class id is a whole number from 0: correct it.")
    return int(label), os.fsdecode(fields[-1])


def _shown(text: bytes) -> str:
    return repr(text[:60].decode(errors="replace"))
