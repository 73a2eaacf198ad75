"""Overlays: small files of decisions about a training set, applied on reading. The images are never rewritten.

A record gets another label or is dropped; an identity is merged into another one or, by giving some of its records to
a new class, split. docs/data-formats.md describes the file.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from partialfc.core.errors import InputError
from partialfc.core.files import output_errors, write_file
from partialfc.core.schema import check_schema_version
from partialfc.data.images import UnreadableImage
from partialfc.data.sources.base import Sample, Source, check_label, check_labels, file_name, mapping_of

SCHEMA_VERSION = 1
DROPPED = -1
_SAMPLED = 256  # records that the fingerprint covers: a pass over all labels of a large set takes hours
_ARRAYS = ("records", "labels", "merges", "absent", "parents")


@dataclass(frozen=True)
class Decisions:
    """What an overlay file holds. Class ids below `classes` are those of the set, the ids from there on new classes.

    Attributes:
        images, classes: of the set that the decisions are about.
        fingerprint: of that set, see `fingerprint`.
        records: the records decided on, by their index in key order, increasing: int64 (R,).
        labels: the new class id of each, `DROPPED` for none: int64 (R,).
        merges: int64 (M, 2), a class id and the one into which it is merged, which is itself not merged.
        absent: class ids that no image has any more, increasing: int64 (A,).
        parents: for each new class the class id of its first record before, -1 if unknown: int64 (P,).
    """

    images: int
    classes: int
    fingerprint: str
    records: np.ndarray
    labels: np.ndarray
    merges: np.ndarray
    absent: np.ndarray
    parents: np.ndarray

    def new_labels(self) -> np.ndarray:
        """The class after renumbering of each class id, -1 for absent ones: int64 (classes + P,).

        The ids that images still have are numbered from 0 without gaps, in their order: first the set's own, then the
        new ones.
        """
        remaining = np.ones(self.classes + len(self.parents), bool)
        remaining[self.absent] = False
        numbers = np.where(remaining, np.cumsum(remaining) - 1, -1)
        numbers[self.merges[:, 0]] = numbers[self.merges[:, 1]]
        return numbers

    def digest(self) -> str:
        """Of everything in here, 16 hexadecimal digits."""
        facts = json.dumps([self.images, self.classes, self.fingerprint])
        content = hashlib.sha256(facts.encode())
        for name in _ARRAYS:
            content.update(hashlib.sha256(getattr(self, name).tobytes()).digest())
        return content.hexdigest()[:16]


def decide(source: Source, records: np.ndarray, labels: np.ndarray, merges: dict[int, int] | None = None) -> Decisions:
    """Decisions about a training set, checked and completed. Reads the labels of the whole set.

    Args:
        source: the set.
        records: indices of records, none twice: int64 (R,).
        labels: the new class id of each, `DROPPED` to leave it out: int64 (R,). Ids from `source.num_classes` on are
            new classes.
        merges: class ids and those into which they are merged, after the records have their labels.

    Raises:
        InputError: an index or a class id lies outside the set, a record is decided on twice, merges form a circle, or
            no image is left.
    """
    order = np.argsort(records, kind="stable")
    records, labels = (np.asarray(values, np.int64)[order] for values in (records, labels))
    old = source.labels()
    check_labels(source, old)
    ids = max(source.num_classes, int(labels.max(initial=-1)) + 1)
    _check_range(records, 0, len(source), "record", "index of a record")
    _check_range(labels, DROPPED, ids, "label", "class id")
    if len(twice := records[1:][records[1:] == records[:-1]]):
        raise InputError(f"{source.name(int(twice[0]))} is decided on twice: give each record one decision.")
    resolved = _resolve(merges or {}, ids)
    parents = np.full(ids - source.num_classes, -1, np.int64)
    split = labels >= source.num_classes
    parents[labels[split][::-1] - source.num_classes] = old[records[split]][::-1]  # the first record wins
    new = old.copy()
    new[records] = np.where(old[records] >= 0, labels, DROPPED)
    counts = np.bincount(new[new >= 0], minlength=ids)
    if not counts.any():
        raise InputError(f"These decisions leave no image of {source.path}: drop fewer.")
    np.add.at(counts, resolved[:, 1], counts[resolved[:, 0]])
    counts[resolved[:, 0]] = 0
    absent = np.flatnonzero(counts == 0)
    return Decisions(len(source), source.num_classes, fingerprint(source), records, labels, resolved, absent, parents)


def _resolve(merges: dict[int, int], ids: int) -> np.ndarray:
    """The merges as (M, 2), each into a class that is itself not merged."""
    pairs = np.array(sorted(merges.items()), np.int64).reshape(-1, 2)
    _check_range(pairs, 0, ids, "merged class", "class id")
    target = np.arange(ids)
    target[pairs[:, 0]] = pairs[:, 1]
    for _ in range(ids.bit_length() + 1):
        target = target[target]
    if len(circle := pairs[np.isin(target[pairs[:, 0]], pairs[:, 0])]):
        raise InputError(f"The merges lead from class {circle[0, 0]} back to a merged class: remove one of them.")
    return np.stack([pairs[:, 0], target[pairs[:, 0]]], axis=1)


def _check_range(values: np.ndarray, low: int, high: int, name: str, what: str) -> None:
    if len(wrong := values[(values < low) | (values >= high)]):
        raise InputError(f"The {name} {wrong[0]} of an overlay is no {what} in [{low}, {high}): correct it.")


def fingerprint(source: Source) -> str:
    """A digest of the labels and encoded images of 256 records that are spread evenly over the set."""
    content = hashlib.sha256()
    for index in np.linspace(0, len(source) - 1, min(_SAMPLED, len(source)), dtype=np.int64).tolist():
        try:
            sample = source.read(index)
            content.update(b"%d\n" % sample.label + hashlib.sha256(sample.encoded).digest())
        except UnreadableImage:
            content.update(b"unreadable\n")
    return content.hexdigest()[:16]


def write_overlay(path: str | Path, decisions: Decisions) -> None:
    """Write an overlay file; it appears whole or not at all.

    Raises:
        InputError: the file exists, or cannot be written.
    """
    if Path(path).exists():
        raise InputError(f"{path} exists already: remove it, or write somewhere else.")
    facts = {name: str(getattr(decisions, name)) for name in ("images", "classes", "fingerprint")}
    arrays = {name: np.ascontiguousarray(getattr(decisions, name)) for name in _ARRAYS}
    with output_errors(path):
        write_file(path, save(arrays, {"kind": "overlay", "schema_version": str(SCHEMA_VERSION), **facts}))


def read_overlay(path: str | Path) -> Decisions:
    """Read an overlay file.

    Raises:
        InputError: it cannot be read, is none, is damaged, or is of a newer version.
    """
    try:
        with safe_open(path, "numpy") as file:
            facts = file.metadata() or {}
            if facts.get("kind") != "overlay" or not facts.get("schema_version", "").isdecimal():
                raise InputError(f"{path} is no overlay file: give one that partialfc has written.")
            check_schema_version(path, {"schema_version": int(facts["schema_version"])}, SCHEMA_VERSION)
            arrays = {name: file.get_tensor(name) for name in _ARRAYS if file.get_slice(name).get_dtype() == "I64"}
        decisions = Decisions(int(facts["images"]), int(facts["classes"]), facts["fingerprint"], **arrays)
        _check(decisions)
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror or error}.") from error
    except InputError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"{path} is damaged or no overlay file ({error}): get a fresh copy.") from error
    return decisions


def _check(decisions: Decisions) -> None:
    """Raise a ValueError for decisions that `decide` does not make."""
    ids = decisions.classes + len(decisions.parents)
    shapes = {name: getattr(decisions, name).shape for name in _ARRAYS}
    rows, merges = shapes["records"], shapes["merges"]
    if decisions.classes < 1 or len(rows) != 1 or shapes["labels"] != rows or len(merges) != 2 or merges[1] != 2:
        raise ValueError("its arrays do not fit together")
    if len(shapes["absent"]) != 1 or len(shapes["parents"]) != 1:
        raise ValueError("its arrays do not fit together")
    for name, low, high in (
        ("records", 0, decisions.images),
        ("labels", DROPPED, ids),
        ("merges", 0, ids),
        ("absent", 0, ids),
        ("parents", -1, decisions.classes),
    ):
        values = getattr(decisions, name)
        if values.size and not low <= int(values.min()) <= int(values.max()) < high:
            raise ValueError(f"its {name} lie outside [{low}, {high})")
    if bool((np.diff(decisions.records) <= 0).any()):
        raise ValueError("its records are not in order")


class Overlay:
    """A training set with decisions applied. The order of the remaining images stays.

    An identity without a name is named by its old class id; a part that was split off by that of the identity with a
    number (`name#1`), or by its own id in sets without names.

    Args:
        source: the set that the decisions were made for.
        decisions: what `read_overlay` or `decide` returns.
        path: of the overlay file, for messages.

    Raises:
        InputError: the decisions were made for another set.
    """

    def __init__(self, source: Source, decisions: Decisions, path: str | Path = "the overlay") -> None:
        expected = (decisions.images, decisions.classes, decisions.fingerprint)
        # The sizes come first: the fingerprint reads images.
        found = (len(source), source.num_classes, "" if len(source) != decisions.images else fingerprint(source))
        if found != expected:
            own, other = (f"{images:,} images of {classes:,} identities" for images, classes, _ in (expected, found))
            other = "other labels or images" if own == other else other
            raise InputError(f"{path} was made for a set of {own}, but {source.path} has {other}: give its own set.")
        self.path, self.format = source.path, source.format
        self._source, self.parts, self._overlay_path = source, [source], path
        is_dropped = decisions.labels == DROPPED
        dropped = decisions.records[is_dropped]
        # The number of images that remain before each dropped one.
        self._dropped, self._remaining_before = dropped, dropped - np.arange(len(dropped))
        self._changed, self._changed_labels = decisions.records[~is_dropped], decisions.labels[~is_dropped]
        self._new_labels = decisions.new_labels()
        self.num_classes = int(self._new_labels.max()) + 1
        self.identities = _names(source.identities, decisions, self._new_labels)
        self.mapping: str | None = hashlib.sha256(f"{mapping_of(source)} {decisions.digest()}".encode()).hexdigest()[
            :16
        ]

    def __len__(self) -> int:
        return len(self._source) - len(self._dropped)

    def name(self, index: int) -> str:
        """As `Source.name`."""
        return self._source.name(self._record(index))

    def file_name(self, index: int) -> str:
        """The path of the image within its set."""
        return file_name(self._source, self._record(index))

    def labels(self) -> np.ndarray:
        """As `Source.labels`: the new class ids."""
        old = self._source.labels()
        check_labels(self._source, old)
        ids = old.copy()
        ids[self._changed] = np.where(old[self._changed] >= 0, self._changed_labels, -1)
        return np.where(ids >= 0, self._new_labels[ids], -1)[_all_but(self._dropped, len(ids))]

    def read(self, index: int) -> Sample:
        """As `Source.read`, with the new class id."""
        record = self._record(index)
        sample = self._source.read(record)
        check_label(sample, self._source.num_classes)
        row = int(np.searchsorted(self._changed, record))
        is_changed = row < len(self._changed) and self._changed[row] == record
        label = int(self._new_labels[self._changed_labels[row] if is_changed else sample.label])
        if label < 0:
            raise InputError(
                f"{sample.name} has label {sample.label}, of which no image is left by {self._overlay_path}: was it "
                "made for another set?"
            )
        return Sample(sample.encoded, label, sample.name)

    def _record(self, index: int) -> int:
        """The index in the set below of the image at `index`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return index + int(np.searchsorted(self._remaining_before, index, side="right"))


def _all_but(dropped: np.ndarray, size: int) -> np.ndarray:
    kept = np.ones(size, bool)
    kept[dropped] = False
    return kept


def _names(names: list[str] | None, decisions: Decisions, new_labels: np.ndarray) -> list[str] | None:
    """The names of the remaining identities in their new order; None for a set without names that keeps its numbers."""
    if names is None and not len(decisions.parents) and not len(decisions.absent):
        return None
    remaining = np.ones(len(new_labels), bool)
    remaining[decisions.absent] = False
    ids = np.flatnonzero(remaining).tolist()
    if names is None:
        return list(map(str, ids))
    every = names + [str(number) for number in range(len(names), decisions.classes)]  # num_classes may count more
    parts: dict[int, int] = {}
    for number, parent in enumerate(decisions.parents.tolist(), decisions.classes):
        parts[parent] = parts.get(parent, 0) + 1
        every.append(f"{names[parent]}#{parts[parent]}" if 0 <= parent < len(names) else str(number))
    return [every[number] for number in ids]
