"""Genuine and impostor pairs of a set of labelled images, written as a verification file."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from partialfc.core.errors import InputError
from partialfc.core.files import output_errors, write_file
from partialfc.data.images import UnreadableImage
from partialfc.data.pair_files import write_pairs
from partialfc.data.sources.base import Source, read_image


def choose_pairs(labels: NDArray[np.integer], count: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Random pairs of images, genuine and impostor in turn, each pair once.

    Every identity with two images gives one genuine pair before any gives a second one, so that identities with many
    images do not dominate. Impostors are two random images of different identities.

    Args:
        labels: (N,) identity of each image.
        count: pairs in all, even.

    Returns:
        (count, 2) numbers of images, and bool (count,), whether a pair is genuine.

    Raises:
        InputError: there are not as many pairs of either kind.
    """
    half, generator = count // 2, np.random.default_rng(seed % 2**64)
    if count < 2 or count % 2:
        raise InputError(f"{count} pairs cannot be half genuine: give an even number.")
    if len(labels) and labels.min() < 0:
        raise InputError(f"The label of image {int(np.argmin(labels))} cannot be read: repair the set first.")
    order = np.argsort(labels, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    genuine = [_some_pairs(generator.permutation(group), half) for group in groups if len(group) > 1]
    rounds = np.concatenate([np.arange(len(pairs)) for pairs in genuine] or [np.empty(0, np.int64)])
    if len(rounds) < half:
        raise InputError(
            f"There are {len(rounds)} genuine pairs, fewer than {half}: ask for {2 * len(rounds)} at most."
        )
    first = np.lexsort((generator.random(len(rounds)), rounds))[:half]
    impostors = (len(labels) ** 2 - sum(len(group) ** 2 for group in groups)) // 2
    if impostors < half:
        raise InputError(f"There are {impostors} impostor pairs, fewer than {half}: ask for {2 * impostors} at most.")
    pairs = np.empty((count, 2), np.int64)
    pairs[0::2] = np.concatenate(genuine)[first]
    pairs[1::2] = _impostors(labels, half, impostors, generator)
    return pairs, np.arange(count) % 2 == 0


def _some_pairs(images: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """(n, 2) pairs of the images, all of them or `most`; the first ones share no image."""
    size = len(images)
    left, right = np.triu_indices(size, k=1)
    # By distance, and even places first: (0, 1), (2, 3), … before (1, 2), …
    distance = right - left
    order = np.lexsort((left, left // distance % 2, distance))[:most]
    return np.stack([images[left[order]], images[right[order]]], axis=1)


def _impostors(
    labels: NDArray[np.integer], count: int, available: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """(count, 2) distinct pairs of images of different identities."""
    if 2 * count > available:  # few images: all pairs are listed
        left, right = np.triu_indices(len(labels), k=1)
        different = np.flatnonzero(labels[left] != labels[right])
        chosen = generator.permutation(different)[:count]
        return np.stack([left[chosen], right[chosen]], axis=1)
    found = np.empty(0, np.int64)
    while len(found) < count:
        drawn = np.sort(generator.integers(len(labels), size=(2 * count, 2)), axis=1)
        drawn = drawn[labels[drawn[:, 0]] != labels[drawn[:, 1]]]
        codes = np.concatenate([found, drawn[:, 0] * len(labels) + drawn[:, 1]])
        found = codes[np.sort(np.unique(codes, return_index=True)[1])][:count]
    return np.stack(np.divmod(found, len(labels)), axis=1)


def _encoded(source: Source, index: int) -> bytes:
    try:
        return read_image(source, index)[0].encoded  # decoded to see whether it can be
    except UnreadableImage as error:
        raise InputError(f"{error}: repair the image, or remove it.") from error


def write_chosen_pairs(source: Source, path: Path, count: int, seed: int) -> dict[str, int]:
    """Write pairs of a source: a `.bin` file with the encoded images, or a `.csv` file with their paths.

    Raises:
        InputError: the suffix is another one, a `.csv` is asked for images that are no files, there are too few pairs,
            or the file cannot be written.
    """
    if path.suffix not in (".bin", ".csv"):
        raise InputError(f"{path} has neither the suffix .bin nor .csv: choose one of them.")
    if path.suffix == ".csv" and source.format != "folder":
        raise InputError(f"The images of {source.path} are no files that a .csv could name: write a .bin file.")
    labels = source.labels()
    pairs, is_same = choose_pairs(labels, count, seed)
    if path.suffix == ".bin":
        write_pairs(path, [_encoded(source, row) for row in pairs.ravel().tolist()], is_same.tolist())
    else:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["left", "right", "is_same"])
        for row, same in zip(pairs.tolist(), is_same.tolist(), strict=True):
            writer.writerow([*(os.path.relpath(source.name(one), path.parent) for one in row), int(same)])
        with output_errors(path):
            write_file(path, text.getvalue())
    used = len(np.unique(pairs))
    return {"pairs": count, "genuine": count // 2, "images": used, "identities": len(np.unique(labels[pairs]))}
