"""Training sets in every storage format, behind one protocol.

`base` holds the protocol, `Source`, and knows no format. Each format has a file of its own with a function that opens
a path or returns None for a path of another format; `open_source` tries them in order. `subset` and `overlay` stand on
any source, `mixture` on several.

RecordIO, the largest format, takes three files: `record_index` finds where in a `.rec` the records are, `recordio`
reads and writes single records, and `record_source` interprets them as a training set (header, class ids, class count).

What the formats share: `tar_members` reads `.tar` files, `derived` keeps indexes and copies that were made from data,
and `names` holds those of images and classes.
"""

from __future__ import annotations

import os
from pathlib import Path

from partialfc.core.errors import InputError
from partialfc.data.sources.base import NoTrainingSet, Source, check_labels, check_regular, describe_passed_over
from partialfc.data.sources.folder import FolderSource, open_folder
from partialfc.data.sources.list_file import open_list
from partialfc.data.sources.lmdb import open_lmdb
from partialfc.data.sources.mixture import SUFFIXES, open_mixture
from partialfc.data.sources.overlay import Overlay, read_overlay
from partialfc.data.sources.parquet import open_parquet
from partialfc.data.sources.record_source import RecordSource, open_recordio
from partialfc.data.sources.webdataset import open_webdataset, refuse_compressed

_MOST_CLASSES = 1 << 31  # larger labels are numbers of persons, not of classes
# The first that recognises a folder opens it. For a file they are tried from the last to the first, because any file of
# an unknown suffix may be RecordIO.
_FORMATS = (open_recordio, open_folder, open_webdataset, open_parquet, open_lmdb, open_list)


def open_source(path: str | Path, *, num_classes: int | None = None, overlay: str | Path | None = None) -> Source:
    """Open a training set of any format, as docs/data-formats.md lists them.

    Args:
        path: the file or folder, or a `.yaml` that describes a mixture of several.
        num_classes: the number of classes; by default what the data says.
        overlay: a file of decisions about the set, which are applied on reading.

    Raises:
        NoTrainingSet: there is none at `path`.
        InputError: the set or the overlay is damaged, or the overlay was made for another set.
    """
    if overlay is not None:
        return Overlay(open_source(path, num_classes=num_classes), read_overlay(overlay), overlay)
    path = Path(path)
    if num_classes is not None and num_classes < 1:
        raise InputError(f"num_classes is {num_classes}, but a training set has at least one class.")
    if not os.path.lexists(path):
        raise InputError(f"{path} does not exist: give the file or folder of a training set.")
    check_regular([path])
    try:
        if path.suffix in SUFFIXES:
            if num_classes is not None:
                raise InputError(f"{path} is a mixture, whose sources count its classes: leave num_classes out.")
            return open_mixture(path, open_source)
        for open_format in _FORMATS if path.is_dir() else _FORMATS[::-1]:
            if (source := open_format(path, num_classes)) is not None:
                if num_classes is None and source.num_classes > _MOST_CLASSES:
                    raise InputError(
                        f"{path} has {len(source):,} images, but labels up to {source.num_classes - 1:,}: number the "
                        "identities without gaps."
                    )
                if num_classes is not None and not isinstance(source, RecordSource):
                    check_labels(source, source.labels())  # those of RecordIO take a pass over the file
                return source
        if path.is_dir():
            refuse_compressed(path)
        hint = describe_passed_over(FolderSource(path).passed_over) if path.is_dir() else ""
    except OSError as error:
        raise InputError(f"Cannot read {error.filename or path}: {error.strerror}.") from error
    raise NoTrainingSet(
        f"{path} is no training set: give a .rec, .tar, .parquet, .arrow, .lmdb or .lst file, a folder with such "
        "files, or a folder of identity folders with images." + (f" Of it, {hint}." if hint else "")
    )
