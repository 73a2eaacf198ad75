"""Duplicates in a training set: exact, re-encoded and mirrored copies, also under other identities.

An image has a hash of 64 bits: the signs of the 64 strongest principal components of its thumbnail's cosine transform.
Aligned faces resemble each other so much that the cosine transform's own signs are far from independent; those of
principal components are not, which leaves few pairs to compare at tens of millions of images. Components are taken from
the horizontally even and odd frequencies apart, so that mirroring an image flips just the bits of the odd ones. Hashes
that differ in a few bits are found in sorted tables, and decided on by the images themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from PIL import Image

from partialfc.data.images import UnreadableImage
from partialfc.data.sources.base import Source, read_image

KINDS = ("exact", "re-encoded", "mirrored")
SIDE = 32  # of a thumbnail
RADIUS = 5  # bits in which hashes of near duplicates differ at most; JPEG quality 50 flips about one
_BANDS, _EQUAL_BANDS = 6, 3  # the tables hold any 3 of 6 bands, so that no pair with 3 different bits is missed
_FREQUENCIES = 14
_TAKEN = (38, 26)  # components of even and of odd frequencies
_PRIOR_IMAGES = 256  # the weight of natural images' spectrum against that of the sample
_SAMPLE = 2048
_TABLE_ROWS = 1 << 22  # hashes sorted at a time
_NEIGHBOURS = 64  # in a run of equal keys, each hash is compared to so many that follow
_SAME_PICTURE = 0.1  # root mean square difference of grey thumbnails, in standard deviations
_GROUPS_SHOWN = 20
_ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


def thumbnail(image: np.ndarray) -> np.ndarray:
    """The image at 32 x 32, each pixel a weighted mean (a box filter is not symmetric): uint8 (32, 32, 3)."""
    return np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def grey(thumbnails: np.ndarray) -> np.ndarray:
    """The luma of uint8 (..., 3): float32."""
    return thumbnails @ np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class Hasher:
    """Makes the hashes of a set's images.

    Attributes:
        projection: float32 (1024, 64), from a grey thumbnail to its components.
        thresholds: float32 (64,), above which a component sets its bit.
    """

    projection: np.ndarray
    thresholds: np.ndarray

    def __call__(self, thumbnails: np.ndarray) -> np.ndarray:
        """The hashes, uint64 (B,), of thumbnails, uint8 (B, 32, 32, 3)."""
        components = grey(thumbnails).reshape(len(thumbnails), -1) @ self.projection
        return np.packbits(components > self.thresholds, axis=1).view(np.uint64)[:, 0]


# The bits that mirroring flips, as `Hasher` packs them.
MIRRORED_BITS = np.packbits(np.arange(64) >= _TAKEN[0]).view(np.uint64)[0]


def fit_hasher(source: Source) -> Hasher:
    """The hasher for a set, from up to 2,048 images spread evenly over it."""
    thumbnails = [np.zeros((SIDE, SIDE, 3), np.uint8)]
    for index in np.linspace(0, len(source) - 1, min(len(source), _SAMPLE), dtype=np.int64).tolist():
        try:
            thumbnails.append(thumbnail(read_image(source, index)[1]))
        except UnreadableImage:
            continue
    steps = np.arange(SIDE)
    cosines = np.cos(np.pi * (2 * steps + 1) * steps[:_FREQUENCIES, None] / (2 * SIDE)) / SIDE
    down, across = np.divmod(np.arange(_FREQUENCIES**2), _FREQUENCIES)
    waves = (cosines[down, :, None] * cosines[across, None, :]).reshape(-1, SIDE * SIDE)
    spectrum = grey(np.stack(thumbnails)).reshape(len(thumbnails), -1).astype(np.float64) @ waves.T
    projections, thresholds = [], []
    for parity, count in enumerate(_TAKEN):
        rows = np.flatnonzero((across % 2 == parity) & (down + across > 0))
        values, sizes = spectrum[1:, rows], down[rows] ** 2 + across[rows] ** 2
        middle = np.median(values, axis=0) if parity == 0 and len(values) else np.zeros(len(rows))
        centred = values - middle
        # Natural images have a spectrum like this; it gives a small set directions enough.
        prior = np.diag(1.0 / sizes**2) * max(1e-6, float((centred**2).sum())) / max(1, len(values))
        covariance = centred.T @ centred + _PRIOR_IMAGES * prior / (1.0 / sizes**2).sum()
        directions = np.linalg.eigh(covariance)[1][:, ::-1][:, :count]
        projections.append(waves[rows].T @ directions)
        thresholds.append(np.median(values @ directions, axis=0) if parity == 0 and len(values) else np.zeros(count))
    return Hasher(np.hstack(projections).astype(np.float32), np.concatenate(thresholds).astype(np.float32))


def candidates(hashes: np.ndarray, progress: Callable[[int, int], None] | None = None) -> np.ndarray:
    """Pairs of images whose hashes, or the one's and the other's mirrored one, differ in at most `RADIUS` bits.

    Of images with equal hashes, each is paired with the first and the previous one. All pairs that differ in 3 bits are
    found, and most of those that differ in more.

    Args:
        hashes: uint64 (N,).
        progress: called regularly with (N, N), so that a display shows the time.

    Returns:
        int64 (P, 2), sorted, the smaller index first.
    """
    order = np.argsort(hashes, kind="stable")
    unique, starts, counts = np.unique(hashes[order], return_index=True, return_counts=True)
    firsts = order[np.repeat(starts, counts)]
    repeats = np.flatnonzero(firsts != order)
    found = [
        np.stack([firsts[repeats], order[repeats]], axis=1),
        np.stack([order[repeats - 1], order[repeats]], axis=1),
    ]
    both = np.concatenate([unique, unique ^ MIRRORED_BITS])
    images = np.tile(order[starts], 2)
    for rows in _tables(both):
        near = _distances(both[rows[:, 0]], both[rows[:, 1]]) <= RADIUS
        rows = rows[near & (rows.min(axis=1) < len(unique))]  # two mirrored ones are the pair of their originals
        found.append(images[rows])
        if progress is not None:
            progress(len(hashes), len(hashes))
    pairs = np.sort(np.concatenate(found), axis=1)
    return np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0)


def _tables(hashes: np.ndarray) -> Iterator[np.ndarray]:
    """Rows (P, 2) of hashes that agree in some bands, a part of a table at a time."""
    edges = np.linspace(0, 64, _BANDS + 1, dtype=np.int64).tolist()
    bands = [((1 << stop) - 1) ^ ((1 << start) - 1) for start, stop in pairwise(edges)]
    parts = 1 + len(hashes) // _TABLE_ROWS
    for chosen in combinations(bands, _EQUAL_BANDS):
        keys = hashes & np.uint64(sum(chosen))
        part_of = (keys * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)) % np.uint64(parts)
        for part in range(parts):
            rows = np.flatnonzero(part_of == part)
            rows = rows[np.argsort(keys[rows], kind="stable")]
            own = keys[rows]
            for distance in range(1, _NEIGHBOURS + 1):
                equal = np.flatnonzero(own[distance:] == own[:-distance])
                if not len(equal):
                    break
                yield np.stack([rows[equal], rows[equal + distance]], axis=1)


def _distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The number of bits in which hashes differ: (N,)."""
    return _ONES[(first ^ second).view(np.uint8).reshape(-1, 8)].sum(axis=1)


def compare(first: np.ndarray, second: np.ndarray) -> str | None:
    """Which of `KINDS` the second image, uint8 (H, W, 3), is of the first; None if it is another picture."""
    if first.shape != second.shape:
        return None
    if np.array_equal(first, second):
        return "exact"
    one, other = grey(thumbnail(first)), grey(thumbnail(second))
    limit = _SAME_PICTURE * float(one.std())
    for kind, candidate in (("re-encoded", other), ("mirrored", other[:, ::-1])):
        if float(np.sqrt(((one - candidate) ** 2).mean())) < limit:
            return kind
    return None


def find_duplicates(
    source: Source,
    records: np.ndarray,
    hashes: np.ndarray,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The duplicates among the images of a set.

    Args:
        source: the set.
        records: the indices of the images that have a hash: int64 (N,).
        hashes: uint64 (N,).
        progress: as for `candidates`.

    Returns:
        exact, re-encoded, mirrored: images that are such copies of an earlier one, each counted once;
        across_identities: those of them whose original has another label; groups: up to 20 of the largest groups of
        copies, each with the records, names and labels of its images, the original first, and the kinds of the copies.
    """
    pairs = records[candidates(hashes, progress)].tolist()

    def decide(pair: list[int]) -> tuple[str | None, list[int]]:
        try:
            (one, first), (other, second) = (read_image(source, index) for index in pair)
        except UnreadableImage:
            return None, []
        return compare(first, second), [one.label, other.label]

    groups: dict[int, list[int]] = {}
    root: dict[int, int] = {}
    kinds: dict[int, str] = {}
    labels: dict[int, int] = {}
    with ThreadPoolExecutor() as pool:
        # Pairs come by their first image, so that an image's root is known before its copies are.
        for (first, second), (kind, both) in zip(pairs, pool.map(decide, pairs), strict=True):
            if progress is not None:
                progress(len(records), len(records))
            if kind is None:
                continue
            labels |= dict(zip((first, second), both, strict=True))
            if second in kinds:
                if KINDS.index(kind) < KINDS.index(kinds[second]):
                    kinds[second] = kind
                continue
            root[second], kinds[second] = root.get(first, first), kind
            groups.setdefault(root[second], []).append(second)
    copies = list(kinds.values())
    return {
        **{kind: copies.count(kind) for kind in KINDS},
        "across_identities": sum(labels[copy] != labels[original] for copy, original in root.items()),
        "groups": _largest(source, groups, labels, kinds),
    }


def _largest(
    source: Source, groups: dict[int, list[int]], labels: dict[int, int], kinds: dict[int, str]
) -> list[dict[str, Any]]:
    """The largest groups, described; `groups` are the copies of each original."""
    originals = sorted(groups, key=lambda original: (-len(groups[original]), original))[:_GROUPS_SHOWN]
    return [
        {
            "records": [original, *groups[original]],
            "names": [source.name(index) for index in (original, *groups[original])],
            "labels": [labels[index] for index in (original, *groups[original])],
            "kinds": [kinds[index] for index in groups[original]],
        }
        for original in originals
    ]
