"""Health and counts of a training set, and a hash of its content that is the same in every storage format."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from partialfc.core.console import counted
from partialfc.data.duplicates import find_duplicates, fit_hasher, grey, thumbnail
from partialfc.data.images import UnreadableImage
from partialfc.data.sources import open_source
from partialfc.data.sources.base import Source, check_label, passed_over, read_image, reading_notes

_CHUNK = 1024  # images between two calls of `progress`
_NAMED = 20  # unreadable records in the result, and sizes
_GREY_SPREAD = 8  # the most that the channels of a grey image differ by
_EXIF_ORIENTATION = 0x0112
_EXIF_WITHIN = 1 << 16  # bytes from the start of a file


class _Finding(NamedTuple):
    """What is found in one image."""

    label: int
    digest: bytes
    size: tuple[int, int]  # width and height
    is_upright: bool
    thumbnail: np.ndarray


def inspect(
    path: str | Path,
    *,
    num_classes: int | None = None,
    overlay: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Read and decode every image of a training set.

    Args:
        path: as `open_source` takes it.
        num_classes: the number of classes; by default what the data says.
        overlay: a file of decisions about the set, which are applied.
        progress: called regularly with (images done, images in all), while duplicates are looked for too.

    Returns:
        format, images (number of readable ones), classes, unreadable (their number), min_per_class and max_per_class
        (0 for a class without images), images_per_class (range of images -> classes), sizes (the 20 most frequent,
        "width x height" -> images), brightness (percentiles of the images' mean luma, 0 to 255), grey (images without
        colour), not_upright (images with an EXIF orientation other than upright, which training ignores), passed_over
        (files that are left out, kind -> their number), duplicates
        (see `find_duplicates`), sha256_of_decoded, advice (what to do next, in sentences), and unreadable_records (the
        reasons of the first 20). An image's SHA-256 covers its label in decimal, a newline, and the RGB pixels, uint8,
        row by row; sha256_of_decoded is that of the images' SHA-256s in hexadecimal, sorted and joined by newlines.

    Raises:
        InputError: there is no training set at `path`, the overlay is not one for it, or a label lies outside
            [0, num_classes).
    """
    source = open_source(path, num_classes=num_classes, overlay=overlay)
    total, tally = len(source), _Tally(source)
    # Pillow and hashlib release the GIL.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, total, _CHUNK):
            stop = min(start + _CHUNK, total)
            tally.add(start, list(pool.map(lambda index: _examine(source, index), range(start, stop))))
            if progress is not None:
                progress(stop, total)
    left_out = {kind: count for kind, (count, _) in passed_over(source).items()}
    facts = tally.facts(progress) | {"passed_over": left_out}
    options = f"{path}" + (f" --data.overlay {overlay}" if overlay is not None else "")
    advice = [f"{note}." for note in reading_notes(source)]
    return facts | {"advice": advice + _advice(facts, list(tally.sizes), tally.counts, options)}


class _Tally:
    """What is found in the images so far."""

    def __init__(self, source: Source) -> None:
        self.source, self.hasher = source, fit_hasher(source)
        self.counts, self.brightness = np.zeros(source.num_classes, np.int64), np.zeros(256, np.int64)
        self.hashes, self.is_readable = np.zeros(len(source), np.uint64), np.zeros(len(source), bool)
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.unreadable: list[str] = []
        self.digests = bytearray()
        self.grey = self.not_upright = 0

    def add(self, start: int, results: list[_Finding | str]) -> None:
        """Count the images from index `start` on."""
        self.unreadable += [result for result in results if isinstance(result, str)]
        found = [result for result in results if not isinstance(result, str)]
        if not found:
            return
        rows = start + np.flatnonzero([not isinstance(result, str) for result in results])
        thumbnails = np.stack([result.thumbnail for result in found])
        self.hashes[rows], self.is_readable[rows] = self.hasher(thumbnails), True
        np.add.at(self.counts, [result.label for result in found], 1)
        np.add.at(self.brightness, grey(thumbnails).mean((1, 2)).astype(int), 1)
        self.sizes.update(result.size for result in found)
        self.digests += b"".join(result.digest for result in found)
        self.grey += int((np.ptp(thumbnails, axis=3).max((1, 2)) <= _GREY_SPREAD).sum())
        self.not_upright += sum(not result.is_upright for result in found)

    def facts(self, progress: Callable[[int, int], None] | None) -> dict[str, Any]:
        """All but the advice of `inspect`."""
        records = np.flatnonzero(self.is_readable)
        sizes = self.sizes.most_common(_NAMED)
        return {
            "format": self.source.format,
            "images": len(records),
            "classes": self.source.num_classes,
            "unreadable": len(self.unreadable),
            "min_per_class": int(self.counts.min()),
            "max_per_class": int(self.counts.max()),
            "images_per_class": _histogram(self.counts),
            "sizes": {f"{width} x {height}": images for (width, height), images in sizes},
            "brightness": _percentiles(self.brightness),
            "grey": self.grey,
            "not_upright": self.not_upright,
            "duplicates": find_duplicates(self.source, records, self.hashes[records], progress),
            "sha256_of_decoded": _combine(self.digests),
            "unreadable_records": self.unreadable[:_NAMED],
        }


def _examine(source: Source, index: int) -> _Finding | str:
    """What an image shows, or why it is unreadable."""
    try:
        sample, image = read_image(source, index)
    except UnreadableImage as error:
        return str(error)
    check_label(sample, source.num_classes)
    digest = hashlib.sha256(b"%d\n" % sample.label + image.tobytes()).digest()
    return _Finding(sample.label, digest, image.shape[1::-1], _is_upright(sample.encoded), thumbnail(image))


def _is_upright(encoded: bytes) -> bool:
    """Whether an image's EXIF data, if it has any, say that it is stored upright."""
    head = encoded[:_EXIF_WITHIN]
    if b"Exif" in head or b"eXIf" in head or b"EXIF" in head:
        with contextlib.suppress(Exception), Image.open(io.BytesIO(encoded)) as image:  # as damaged as may be
            return bool(image.getexif().get(_EXIF_ORIENTATION, 1) in (0, 1))
    return True


def _combine(digests: bytearray) -> str:
    """SHA-256 of the digests (32 bytes each) in hexadecimal, sorted and joined by newlines."""
    total = hashlib.sha256()
    for number, row in enumerate(np.sort(np.frombuffer(digests, "V32"))):
        total.update((b"\n" if number else b"") + row.tobytes().hex().encode())
    return total.hexdigest()


def _histogram(counts: np.ndarray) -> dict[str, int]:
    """The number of classes with 0, 1, 2, 3-4, 5-8, ... images, up to the largest."""
    classes: dict[str, int] = {}
    low = high = 0
    while low <= int(counts.max()):
        classes[str(low) if low == high else f"{low}-{high}"] = int(((counts >= low) & (counts <= high)).sum())
        low, high = high + 1, max(1, 2 * high)
    return classes


def _percentiles(histogram: np.ndarray) -> dict[str, int]:
    """The 1st, 50th and 99th percentile of values counted in a histogram, empty without values."""
    below = np.cumsum(histogram)
    return {f"{n} %": int(np.searchsorted(below, n / 100 * below[-1])) for n in (1, 50, 99)} if below[-1] else {}


def _advice(facts: dict[str, Any], sizes: list[tuple[int, int]], counts: np.ndarray, options: str) -> list[str]:
    """What to do next, in sentences."""
    sentences = []
    if (counts > 0).sum() < 2:
        sentences.append("A training needs at least two identities: give the folder that holds all identity folders.")
    if len(sizes) > 1 or any(width != height for width, height in sizes):
        what = f"of {len(sizes)} sizes" if len(sizes) > 1 else "not square"
        sentences.append(f"The images are {what}, and training takes square ones of one size: align them first.")
    if facts["unreadable"]:
        what = counted(facts["unreadable"], "record")
        sentences.append(f"{what} cannot be read, and training takes others in place.")
    if facts["not_upright"]:
        what = counted(facts["not_upright"], "image")
        sentences.append(f"The EXIF orientation of {what} is ignored: turn what is not upright.")
    if empty := int((counts == 0).sum()):
        what = f"Without an image: {counted(empty, 'identity')}"
        sentences.append(f"{what}; --data.min-images 1 numbers the others without gaps.")
    if few := int((counts == 1).sum()):
        sentences.append(f"With one image: {counted(few, 'identity')}; --data.min-images 2 leaves them out.")
    if copies := facts["duplicates"]["across_identities"]:
        sentences.append(f"{copies:,} copies of images have another identity: an overlay can merge or drop them.")
    if not sentences:
        sentences.append(f"Nothing is in the way of a training: partialfc train {options} --out RUN")
    return sentences
