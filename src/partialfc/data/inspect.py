"""Health and counts of a training set, and a hash of its content that is the same in every storage format."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from partialfc.data.images import UnreadableImage
from partialfc.data.sources import open_source
from partialfc.data.sources.base import Source, check_label, read_image

_CHUNK = 1024  # images between two calls of `progress`
_NAMED = 20  # unreadable records in the result


def inspect(
    path: str | Path, *, num_classes: int | None = None, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Read and decode every image of a training set.

    Args:
        path: as `open_source` takes it.
        num_classes: the number of classes; by default what the data says.
        progress: called regularly with (images done, images in all).

    Returns:
        format, images (number of readable ones), classes, unreadable (their number), min_per_class and max_per_class
        (0 for a class without images), sha256_of_decoded, and unreadable_records (the reasons of the first 20). An
        image's SHA-256 covers its label in decimal, a newline, and the RGB pixels, uint8, row by row;
        sha256_of_decoded is that of the images' SHA-256s in hexadecimal, sorted and joined by newlines.

    Raises:
        InputError: there is no training set at `path`, or a label lies outside [0, num_classes).
    """
    source = open_source(path, num_classes=num_classes)
    counts = np.zeros(source.num_classes, np.int64)
    digests = bytearray()
    unreadable: list[str] = []
    total = len(source)
    # Pillow and hashlib release the GIL.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, total, _CHUNK):
            stop = min(start + _CHUNK, total)
            for result in pool.map(lambda index: _examine(source, index), range(start, stop)):
                if isinstance(result, str):
                    unreadable.append(result)
                else:
                    counts[result[0]] += 1
                    digests += result[1]
            if progress is not None:
                progress(stop, total)
    return {
        "format": source.format,
        "images": total - len(unreadable),
        "classes": source.num_classes,
        "unreadable": len(unreadable),
        "min_per_class": int(counts.min()),
        "max_per_class": int(counts.max()),
        "sha256_of_decoded": _combine(digests),
        "unreadable_records": unreadable[:_NAMED],
    }


def _examine(source: Source, index: int) -> tuple[int, bytes] | str:
    """An image's label and digest, or why it is unreadable."""
    try:
        sample, image = read_image(source, index)
    except UnreadableImage as error:
        return str(error)
    check_label(sample, source.num_classes)
    return sample.label, hashlib.sha256(b"%d\n" % sample.label + image.tobytes()).digest()


def _combine(digests: bytearray) -> str:
    """SHA-256 of the digests (32 bytes each) in hexadecimal, sorted and joined by newlines."""
    total = hashlib.sha256()
    for number, row in enumerate(np.sort(np.frombuffer(digests, "V32"))):
        total.update((b"\n" if number else b"") + row.tobytes().hex().encode())
    return total.hexdigest()
