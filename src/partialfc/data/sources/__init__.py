"""Training sets in every storage format, behind one protocol.

`base` holds the protocol, `Source`, and knows no format. Each format has a file of its own with a function that opens
a path or returns None for a path of another format; `open_source` tries them in order. `subset` and `overlay` stand on
any source, `mixture` on several.

RecordIO, the largest format, takes three files: `record_index` finds where in a `.rec` the records are, `recordio`
reads and writes single records, and `record_source` interprets them as a training set (header, class ids, class count).
"""

from __future__ import annotations

from pathlib import Path

from partialfc.core.errors import InputError
from partialfc.data.sources.base import Source
from partialfc.data.sources.folder import open_folder
from partialfc.data.sources.mixture import SUFFIXES, open_mixture
from partialfc.data.sources.overlay import Overlay, read_overlay
from partialfc.data.sources.record_source import open_recordio

# The first that recognises a path opens it.
_FORMATS = (open_recordio, open_folder)


def open_source(path: str | Path, *, num_classes: int | None = None, overlay: str | Path | None = None) -> Source:
    """Open a training set of any format: a `.rec` file, a folder with one, or a folder of identity folders.

    Args:
        path: the file or folder, or a `.yaml` that describes a mixture of several.
        num_classes: the number of classes; by default what the data says.
        overlay: a file of decisions about the set, which are applied on reading.

    Raises:
        InputError: there is no training set at `path`, or the overlay is damaged or was made for another set.
    """
    if overlay is not None:
        return Overlay(open_source(path, num_classes=num_classes), read_overlay(overlay), overlay)
    path = Path(path)
    if num_classes is not None and num_classes < 1:
        raise InputError(f"num_classes is {num_classes}, but a training set has at least one class.")
    if not path.exists():
        raise InputError(f"{path} does not exist: give a .rec file, a folder that holds one, or an image folder.")
    try:
        if path.suffix in SUFFIXES:
            if num_classes is not None:
                raise InputError(f"{path} is a mixture, whose sources count its classes: leave num_classes out.")
            return open_mixture(path, open_source)
        for open_format in _FORMATS:
            if (source := open_format(path, num_classes)) is not None:
                return source
    except OSError as error:
        raise InputError(f"Cannot read {error.filename or path}: {error.strerror}.") from error
    raise InputError(f"No .rec and no identity folders with images in {path}: give the folder that holds them.")
