"""Training sets in every format that people have, opened by what is found at a path.

`base` holds the protocol and knows no format; each format has a file of its own; `subset` stands on top of any.
"""

from __future__ import annotations

import os
from pathlib import Path

from partialfc.core.errors import InputError
from partialfc.data.sources.base import Source
from partialfc.data.sources.folder import FolderSource
from partialfc.data.sources.record_source import RecordSource


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
