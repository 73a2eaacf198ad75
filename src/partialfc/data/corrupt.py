"""Controlled damage for studies of robustness, with the truth beside it.

Conflicts (identities cut into several classes), flipped labels and long tails are overlays on the set, so that it is
stored once; duplicates are a new set. What is drawn is a pure function of (labels, fraction, seed), and with the same
seed a smaller fraction draws a subset of what a larger one draws.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from partialfc.core import keyed_random
from partialfc.core.console import Progress
from partialfc.core.errors import InputError
from partialfc.core.files import atomic_folder, output_errors
from partialfc.core.keyed_random import derive_key
from partialfc.data.images import UnreadableImage, decode_image, encode_jpeg
from partialfc.data.sources import open_source
from partialfc.data.sources.base import Source, describe_copy
from partialfc.data.sources.overlay import DROPPED, decide, write_overlay
from partialfc.data.sources.recordio import RecordWriter

Kind = Literal["conflict", "flip", "long-tail", "duplicates"]

SCHEMA_VERSION = 1
# Those of the published sets: WebFace12M-Conflict cuts 200,000 of its 617,970 identities in three, the smallest of the
# four Flip sets has 10 % of its labels replaced, a long tail leaves a tenth of the identities whole.
FRACTIONS: dict[Kind, float] = {"conflict": 200_000 / 617_970, "flip": 0.1, "long-tail": 0.1, "duplicates": 0.1}
TAIL = (2, 4)  # images left of the other identities, fewest and most
COPIES = ("exact", "re-encoded", "mirrored")
QUALITIES = (50, 95)

# Indices of records, their new labels, and the truth: arrays by name. "classes" in it are new class ids.
Damage = tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]


def corrupt(
    path: str | Path,
    out: str | Path,
    kind: Kind,
    *,
    fraction: float | None = None,
    parts: int = 3,
    seed: int = 0,
    quiet: bool = True,
) -> dict[str, Any]:
    """Damage a training set.

    Writes the folder `out` with `data.overlay`, or with a RecordIO set for duplicates; with `truth.npz`, arrays that
    docs/data-formats.md describes; and with `summary.json`, which is also returned.

    Args:
        path: as `open_source` takes it.
        out: the folder to make.
        kind: "conflict" cuts this fraction of the identities into `parts` classes; "flip" replaces this fraction of the
            labels by those of other classes, uniformly; "long-tail" leaves this fraction of the identities whole and 2
            to 4 images of each other; "duplicates" appends copies of this fraction of the images, a third of them
            exact, re-encoded and mirrored each, half of each under another identity.
        fraction: by default that of `FRACTIONS`.
        parts: classes that a cut identity becomes.
        seed: decides which.
        quiet: show no progress.

    Raises:
        InputError: there is no set at `path`, it cannot be damaged that much, or `out` exists or cannot be written.
    """
    out = Path(out)
    fraction = FRACTIONS[kind] if fraction is None else fraction
    if not 0 < fraction <= 1:
        raise InputError(f"fraction is {fraction:g}: give a number above 0, up to 1.")
    if parts < 2:
        raise InputError(f"parts is {parts}: an identity is cut into at least 2 classes.")
    if out.exists():
        raise InputError(f"{out} exists already: remove it, or write somewhere else.")
    source = open_source(path)
    facts = {"schema_version": SCHEMA_VERSION, "kind": kind, "fraction": fraction, "seed": seed}
    with output_errors(out), atomic_folder(out) as folder:
        if kind == "duplicates":
            truth = _write_duplicates(source, folder, fraction, seed, quiet)
            describe_copy(source, folder)
            result = open_source(folder)
        else:
            records, labels, truth = _damage(kind, source, fraction, parts, seed)
            decisions = decide(source, records, labels)
            if "classes" in truth:
                truth["classes"] = decisions.new_labels()[truth["classes"]]
            write_overlay(folder / "data.overlay", decisions)
            result = open_source(path, overlay=folder / "data.overlay")
        facts |= {"images": len(result), "classes": result.num_classes}
        facts |= {name: len(values) for name, values in truth.items() if name in ("identities", "records")}
        with (folder / "truth.npz").open("wb") as file:
            np.savez(file, allow_pickle=False, schema_version=np.array(SCHEMA_VERSION), **truth)
        (folder / "summary.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def _damage(kind: Kind, source: Source, fraction: float, parts: int, seed: int) -> Damage:
    labels = source.labels()
    if kind == "conflict":
        return cut_identities(labels, source.num_classes, fraction, parts, seed)
    return flip_labels(labels, fraction, seed) if kind == "flip" else cut_tail(labels, fraction, seed)


def cut_identities(labels: np.ndarray, num_classes: int, fraction: float, parts: int, seed: int) -> Damage:
    """Cut a fraction of the identities into `parts` classes with equal shares of their images, up to one.

    The first part keeps the class id; the others are new classes from `num_classes` on.

    Args:
        labels: int64 (N,), -1 for unreadable records.

    Returns:
        The damage; in the truth `identities` (K,) and their `classes` (K, parts).

    Raises:
        InputError: too few identities have an image for each part.
    """
    identities, counts = np.unique(labels[labels >= 0], return_counts=True)
    count, able = round(fraction * len(identities)), identities[counts >= parts]
    if len(able) < count:
        raise InputError(f"{count:,} identities cannot be cut: only {len(able):,} have {parts} images; take fewer.")
    cut = _draw(able, count, derive_key(seed, "cut identities"))
    new = num_classes + np.arange(count * (parts - 1)).reshape(count, parts - 1)
    classes = np.concatenate([cut[:, None], new], axis=1)
    row = np.full(num_classes, -1, np.int64)
    row[cut] = np.arange(count)
    records = np.flatnonzero((labels >= 0) & (row[labels] >= 0))
    part = _ranks(labels[records], records, derive_key(seed, "parts")) % parts
    records, part = records[part > 0], part[part > 0]
    return records, classes[row[labels[records]], part], {"identities": cut, "classes": classes}


def flip_labels(labels: np.ndarray, fraction: float, seed: int) -> Damage:
    """Replace a fraction of the labels by another class with images, each alike.

    Args:
        labels: int64 (N,), -1 for unreadable records.

    Returns:
        The damage; in the truth `records` (K,), their `true_labels` and `classes`.

    Raises:
        InputError: there is only one class.
    """
    readable = np.flatnonzero(labels >= 0)
    records = _draw(readable, round(fraction * len(readable)), derive_key(seed, "flipped labels"))
    flipped = _other_labels(labels, records, derive_key(seed, "new labels"))
    return records, flipped, {"records": records, "true_labels": labels[records], "classes": flipped}


def cut_tail(labels: np.ndarray, fraction: float, seed: int) -> Damage:
    """Leave a fraction of the identities whole, and 2 to 4 images of each other.

    Args:
        labels: int64 (N,), -1 for unreadable records.

    Returns:
        The damage; in the truth the whole `identities` and the dropped `records`.
    """
    identities = np.unique(labels[labels >= 0])
    whole = _draw(identities, round(fraction * len(identities)), derive_key(seed, "whole identities"))
    low, high = TAIL
    ids = np.arange(int(labels.max(initial=-1)) + 1)
    left = low + (_uniform(derive_key(seed, "images left"), ids) * (high - low + 1)).astype(np.int64)
    left[whole] = len(labels)
    readable = np.flatnonzero(labels >= 0)
    ranks = _ranks(labels[readable], readable, derive_key(seed, "images of the tail"))
    dropped = readable[ranks >= left[labels[readable]]]
    return dropped, np.full(len(dropped), DROPPED), {"identities": whole, "records": dropped}


def _write_duplicates(source: Source, folder: Path, fraction: float, seed: int, quiet: bool) -> dict[str, np.ndarray]:
    """Write the images of a set, then copies; the truth is `records`, their `originals`, and `kinds` (of `COPIES`)."""
    labels = source.labels()
    originals = _draw(np.flatnonzero(labels >= 0), round(fraction * len(labels)), derive_key(seed, "duplicates"))
    numbers = np.arange(len(originals))
    kinds = numbers % len(COPIES)
    moved = numbers // len(COPIES) % 2 == 1
    new_labels = labels[originals]
    if moved.any():
        new_labels[moved] = _other_labels(labels, originals[moved], derive_key(seed, "identities of duplicates"))
    low, high = QUALITIES
    qualities = low + (_uniform(derive_key(seed, "qualities"), numbers) * (high - low + 1)).astype(np.int64)
    jobs = zip(originals.tolist(), new_labels.tolist(), kinds.tolist(), qualities.tolist(), strict=True)
    total = len(source) + len(originals)
    with (
        RecordWriter(folder / "train.rec", header=False, num_classes=source.num_classes) as writer,
        Progress("writing", total, quiet=quiet) as progress,
    ):
        try:
            for index in range(len(source)):
                sample = source.read(index)
                writer.write(sample.encoded, sample.label)
                progress.update(index + 1)
            for number, (index, label, kind, quality) in enumerate(jobs, len(source) + 1):
                writer.write(_copy(source.read(index).encoded, COPIES[kind], quality), label)
                progress.update(number)
        except UnreadableImage as error:
            raise InputError(f"Duplicates need a set whose images can all be read, and {error}: remove it.") from error
    return {"records": len(source) + numbers, "originals": originals, "kinds": kinds}


def _copy(encoded: bytes, kind: str, quality: int) -> bytes:
    if kind == "exact":
        return encoded
    image = decode_image(encoded)
    return encode_jpeg(image[:, ::-1] if kind == "mirrored" else image, quality)


# -- keyed draws in NumPy ----------------------------------------------------------------------------------------------


def _uniform(key: int, counters: np.ndarray) -> np.ndarray:
    return keyed_random.uniform(key, torch.from_numpy(counters)).numpy()


def _draw(values: np.ndarray, count: int, key: int) -> np.ndarray:
    """`count` of `values`, each subset alike, in their order."""
    if not count:
        return values[:0]
    drawn = keyed_random.bits(key, torch.from_numpy(values)).numpy()
    return np.sort(values[np.argpartition(drawn, count - 1)[:count]])


def _ranks(labels: np.ndarray, records: np.ndarray, key: int) -> np.ndarray:
    """The rank of each record among those of its label, in a keyed order: int64 (N,)."""
    order = np.lexsort((keyed_random.bits(key, torch.from_numpy(records)).numpy(), labels))
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - np.repeat(starts, counts)
    return ranks


def _other_labels(labels: np.ndarray, records: np.ndarray, key: int) -> np.ndarray:
    """For each of `records` the label of another class that has images, each alike."""
    classes = np.unique(labels[labels >= 0])
    if len(classes) < 2:
        raise InputError("There is only one identity, so that no image can get the label of another one.")
    shift = 1 + (_uniform(key, records) * (len(classes) - 1)).astype(np.int64)
    return classes[(np.searchsorted(classes, labels[records]) + shift) % len(classes)]
