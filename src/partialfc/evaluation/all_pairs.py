"""Verification of every image against every other: the protocol of MFR (Deng et al. 2021, Masked Face Recognition
Challenge: The InsightFace Track Report), for features and a list of who is who.

The scores of impostor pairs are never stored: their number is known from the images of each identity, and TAR at FAR
needs the largest of them only.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from partialfc.core.errors import InputError
from partialfc.evaluation.figures import Figure, Result, rate_name
from partialfc.evaluation.intervals import interval_facts, tar_figure
from partialfc.evaluation.metrics import Scores, allowed_false_accepts
from partialfc.similarity import Rows, check_units, count_pairs, largest_pairs, pair_dots

FARS = (1e-6,)
HARD_FARS = (1e-4,)  # of masked and of children's images
MASK, CHILDREN = "mask", "children"
_COLUMNS = ("path", "identity", "group", "mask")
_MASK_VALUES = {"": False, "0": False, "false": False, "no": False, "1": True, "true": True, "yes": True}
_MOST_KEPT = 1 << 25  # impostor scores
_MARGIN = 100  # impostor scores beyond twice the needed ones, for the interval

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ImageList:
    """Who is who, in the order of the features.

    Attributes:
        paths, identities: (N,) text.
        groups: (N,) text, "" where none is named.
        masked: bool (N,), whether the face wears a mask.
    """

    paths: list[str]
    identities: list[str]
    groups: list[str]
    masked: NDArray[np.bool_]


def read_list(path: str | Path) -> ImageList:
    """Read a CSV file with the columns path, identity, group and mask; group and mask may be empty.

    Raises:
        InputError: the file cannot be read, or lacks a column, rows, an identity or a known value of mask.
    """
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise InputError(f"{path} has no column {missing[0]!r}: its first line must be {','.join(_COLUMNS)}.")
            rows = [_read_row(row, f"Line {reader.line_num} of {path}") for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a CSV file in UTF-8: {error}.") from error
    if not rows:
        raise InputError(f"{path} names no images: give a line for each row of the features.")
    paths, identities, groups, masks = (list(column) for column in zip(*rows, strict=True))
    return ImageList(paths, identities, groups, np.array([_MASK_VALUES[mask] for mask in masks]))


def _read_row(row: dict[Any, Any], where: str) -> tuple[str, ...]:
    """The values of `_COLUMNS` in one row."""
    if None in row or None in row.values():
        raise InputError(f"{where} has too {'many' if None in row else 'few'} values: give one for each column.")
    path, identity, group, mask = (row[column].strip() for column in _COLUMNS)
    if not identity:
        raise InputError(f"{where} names no identity: give every image one.")
    if mask.lower() not in _MASK_VALUES:
        raise InputError(f"{where} has the mask value {mask!r}: write 1 with a mask, and 0 or nothing without.")
    return path, identity, group, mask.lower()


def evaluate_all_pairs(
    units: Tensor,
    identities: ArrayLike,
    groups: Sequence[str] | None = None,
    masked: ArrayLike | None = None,
    fars: Sequence[float] = FARS,
    *,
    failed: ArrayLike | None = None,
    progress: Progress | None = None,
) -> Result:
    """TAR at FAR over all pairs, which all ranks scan together; every rank returns the same result.

    Figures without a prefix are of all unordered pairs of unmasked images, those of a group of the pairs within it.
    "mask" compares each masked image with each unmasked one, at a FAR of 1e-4, which also holds for a group named
    "children". With masked images, "mfr-score" is 0.25 · mask + 0.75 · all.

    Args:
        units: (N, D) float32, unit rows, the same on all ranks; the scans run on their device.
        identities: (N,) of each image, text or numbers.
        groups: (N,), "" for images without a group.
        masked: bool (N,).
        fars: at least one.
        failed: bool (N,), images that could not be used: their genuine pairs count as rejected, their rows are ignored.
        progress: called regularly with the amount done and the whole of the scan that runs.

    Raises:
        InputError: another number of images than of features, rows that are not of norm 1, a name of a group that no
            figure can have, or unmasked images of which no two are of different identities or none of the same.
    """
    names, ids = np.unique(np.asarray(identities), return_inverse=True)
    if len(units) != len(ids):
        raise InputError(f"There are {len(units)} features but {len(ids)} images are listed: give one for each.")
    unusable = _flags(failed, len(ids), "failed")
    if unusable.any():
        units = torch.where(torch.from_numpy(unusable).to(units.device)[:, None], 0.0, units)
    check_units(units)
    figures: dict[str, Figure] = {}
    counts: dict[str, dict[str, int]] = {}
    for part in _parts(groups, _flags(masked, len(ids), "masked"), fars):
        counts[part.name], scores = _compare(units, ids, part, unusable, progress)
        if not part.name:
            if isinstance(scores, str):
                raise InputError(scores)
            facts = {"images": len(ids), "identities": len(names), **interval_facts(scores)}
        for far in part.fars:
            figure = Figure(None, reason=scores) if isinstance(scores, str) else tar_figure(scores, far)
            figures[_figure_name(part.name, far)] = figure
    mask, whole = (figures.get(_figure_name(*of)) for of in ((MASK, HARD_FARS[0]), ("", FARS[0])))
    if mask is not None and whole is not None and mask.value is not None and whole.value is not None:
        figures["mfr-score"] = Figure(0.25 * mask.value + 0.75 * whole.value)
    return Result("all-pairs", figures, {**facts, **counts.pop(""), "parts": counts})


def _figure_name(part: str, far: float) -> str:
    return f"{part}/tar@far={rate_name(far)}" if part else f"tar@far={rate_name(far)}"


def _flags(values: ArrayLike | None, images: int, name: str) -> NDArray[np.bool_]:
    flags = np.zeros(images, dtype=bool) if values is None else np.asarray(values, dtype=bool)
    if flags.shape != (images,):
        raise InputError(f"{name!r} has the shape {flags.shape} for {images} images: give one value for each.")
    return flags


@dataclass(frozen=True)
class _Part:
    """Images to compare with each other, or with those of a second side, by their rows."""

    name: str
    fars: Sequence[float]
    left: Ids
    right: Ids | None = None


def _parts(groups: Sequence[str] | None, masked: NDArray[np.bool_], fars: Sequence[float]) -> list[_Part]:
    plain = np.flatnonzero(~masked)
    parts = [_Part("", fars, plain)]
    if groups is not None:
        if len(groups) != len(masked):
            raise InputError(f"There are {len(groups)} groups for {len(masked)} images: give one for each, or ''.")
        of_image = np.array(["-".join(group.lower().split()) for group in groups])
        for name in np.unique(of_image[of_image != ""]).tolist():
            if "/" in name or name == MASK:
                raise InputError(f"A group cannot be called {name!r}, as figures are named after it: rename it.")
            own = fars if name != CHILDREN else HARD_FARS
            parts.append(_Part(name, own, plain[of_image[plain] == name]))
    if masked.any():
        parts.append(_Part(MASK, HARD_FARS, np.flatnonzero(masked), plain))
    return parts


def _compare(
    units: Tensor, ids: Ids, part: _Part, failed: NDArray[np.bool_], progress: Progress | None
) -> tuple[dict[str, int], Scores | str]:
    """The numbers of pairs of a part, and its scores, or why there are none."""
    genuine, genuine_ids, failure_ids = _genuine_scores(units, ids, part, failed)
    sides = [side[~failed[side]] for side in (part.left, part.right) if side is not None]
    labels = [torch.from_numpy(ids[side]).to(units.device) for side in sides]
    impostors = count_pairs(*labels)[1]
    counts = {"genuine_pairs": len(genuine) + len(failure_ids), "impostor_pairs": impostors}
    if not all(counts.values()):
        kind = "the same identity" if impostors else "different identities"
        of_part = f" of the part {part.name!r}" if part.name else ""
        return counts, f"No two images{of_part} are of {kind}, but both kinds of pairs are needed."
    kept = min(2 * allowed_false_accepts(max(part.fars), impostors) + _MARGIN, _MOST_KEPT)
    chosen = (units if len(side) == len(ids) else units[torch.from_numpy(side).to(units.device)] for side in sides)
    (left, right), (left_labels, right_labels) = [*map(Rows.of, chosen), None][:2], [*labels, None][:2]
    assert left is not None
    assert left_labels is not None
    tail, *rows = largest_pairs(left, right, left_labels, right_labels, kept, progress)
    people = [ids[side][of.cpu().numpy()] for side, of in zip((sides[0], sides[-1]), rows, strict=True)]
    return counts, Scores(
        genuine=genuine,
        impostor=tail.cpu().double().numpy(),
        impostors=impostors,
        genuine_ids=genuine_ids,
        impostor_ids=np.stack(people, axis=1),
        failures=len(failure_ids),
        failure_ids=failure_ids,
        scanned=(ids[sides[0]], ids[sides[-1]]),
    )


def _genuine_scores(units: Tensor, ids: Ids, part: _Part, failed: NDArray[np.bool_]) -> tuple[Floats, Ids, Ids]:
    """The scores of a part's genuine pairs, their identities, and those of pairs with an image that failed."""
    scores: list[Floats] = [np.empty(0)]
    found: list[Ids] = [np.empty(0, dtype=np.int64)]
    failures = list(found)
    for left, right in _same_identity(ids, part.left, part.right):
        fine = ~(failed[left] | failed[right])
        failures.append(ids[left[~fine]])
        pairs = (torch.from_numpy(side[fine]).to(units.device) for side in (left, right))
        scores.append(pair_dots(units, units, *pairs).cpu().double().numpy())
        found.append(ids[left[fine]])
    return np.concatenate(scores), np.concatenate(found), np.concatenate(failures)


def _same_identity(ids: Ids, left: Ids, right: Ids | None) -> Iterator[tuple[Ids, Ids]]:
    """All pairs of one identity, by their rows: the n-th pair of every image, for n = 1, 2, …"""
    side = left if right is None else right
    side = side[np.argsort(ids[side], kind="stable")]
    left = side if right is None else left
    after = np.arange(len(side)) + 1 if right is None else np.searchsorted(ids[side], ids[left], "left")
    stop = np.searchsorted(ids[side], ids[left], "right")
    while (more := after < stop).any():
        left, after, stop = left[more], after[more], stop[more]
        yield left, side[after]
        after = after + 1
