"""Verification of every image against every other: the protocol of MFR (Deng et al. 2021, Masked Face Recognition
Challenge: The InsightFace Track Report), for features and a list of who is who.

The scores of impostor pairs are never stored: their number is known from the images of each identity, and TAR at FAR
needs the largest of them only.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from partialfc.core.errors import InputError
from partialfc.evaluation.statistics.figures import Figure, Result, rate_name
from partialfc.evaluation.statistics.groups import cross_group_fmr
from partialfc.evaluation.statistics.intervals import interval_facts, tar_figure
from partialfc.evaluation.statistics.metrics import Scores, allowed_false_accepts
from partialfc.evaluation.verification import failure_to_enrol, with_groups
from partialfc.similarity import Rows, check_units, count_pairs, largest_pairs, pair_dots

FARS = (1e-6,)
HARD_FARS = (1e-4,)  # of masked and of children's images
MASK, CHILDREN = "mask", "children"
_COLUMNS = ("path", "identity", "group", "mask")
_QUALITY = "quality"  # a column that may be there too
_MASK_VALUES = {"": False, "0": False, "false": False, "no": False, "1": True, "true": True, "yes": True}
_ALL_KEPT = 1 << 21  # impostor scores of a small set, which are all kept whatever the FAR
_MOST_KEPT = 1 << 22  # of a large one: a FAR that needs more is of no interest there
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
        qualities: float64 (N,), higher is better; None if the list has none.
    """

    paths: list[str]
    identities: list[str]
    groups: list[str]
    masked: NDArray[np.bool_]
    qualities: Floats | None = None


def read_list(path: str | Path) -> ImageList:
    """Read a CSV file with the columns path, identity, group, mask and perhaps quality; group and mask may be empty.

    Raises:
        InputError: the file cannot be read, or lacks a column, rows, an identity, a known value of mask, or a finite
            quality.
    """
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise InputError(f"{path} has no column {missing[0]!r}: its first line must be {','.join(_COLUMNS)}.")
            columns = [*_COLUMNS, *([_QUALITY] if _QUALITY in (reader.fieldnames or ()) else [])]
            rows = [_read_row(row, columns, f"Line {reader.line_num} of {path}") for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a CSV file in UTF-8: {error}.") from error
    if not rows:
        raise InputError(f"{path} names no images: give a line for each row of the features.")
    paths, identities, groups, masks, *quality = (list(column) for column in zip(*rows, strict=True))
    qualities = np.array(quality[0], dtype=np.float64) if quality else None
    return ImageList(paths, identities, groups, np.array([_MASK_VALUES[mask] for mask in masks]), qualities)


def _read_row(row: dict[Any, Any], columns: Sequence[str], where: str) -> tuple[str, ...]:
    """The values of the columns in one row."""
    if None in row or None in row.values():
        raise InputError(f"{where} has too {'many' if None in row else 'few'} values: give one for each column.")
    path, identity, group, mask, *quality = (row[column].strip() for column in columns)
    if not identity:
        raise InputError(f"{where} names no identity: give every image one.")
    if mask.lower() not in _MASK_VALUES:
        raise InputError(f"{where} has the mask value {mask!r}: write 1 with a mask, and 0 or nothing without.")
    try:
        finite = all(math.isfinite(float(value)) for value in quality)
    except ValueError:
        finite = False
    if not finite:
        raise InputError(f"{where} has the quality {quality[0]!r}: write a finite number, higher for better.")
    return path, identity, group, mask.lower(), *quality


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
    measured: dict[str, Scores] = {}
    of_image, is_masked = group_names(groups, len(ids)), _flags(masked, len(ids), "masked")
    for part in _parts(of_image, is_masked, fars):
        counts[part.name], scores = _compare(units, ids, part, unusable, progress)
        if not part.name:
            if isinstance(scores, str):
                raise InputError(scores)
            facts = {"images": len(ids), "identities": len(names), **interval_facts(scores)}
        if isinstance(scores, Scores):
            measured[part.name] = scores
        for far in part.fars:
            figure = Figure(None, reason=scores) if isinstance(scores, str) else tar_figure(scores, far)
            figures[_figure_name(part.name, far)] = figure
    mask, whole = (figures.get(_figure_name(*of)) for of in ((MASK, HARD_FARS[0]), ("", FARS[0])))
    if mask is not None and whole is not None:
        figures["mfr-score"] = _mfr_score(mask, whole)
    facts |= {**counts.pop(""), "failures": int(unusable.sum()), "parts": counts}
    result = Result("all-pairs", figures | failure_to_enrol(unusable), facts, measured)
    return _with_groups(result, np.where(is_masked | unusable, "", of_image), ids)


def _with_groups(result: Result, of_image: NDArray[np.str_], ids: Ids) -> Result:
    """The result with figures of its groups, and in the fact `groups_at` the FMR between every two of them.

    Args:
        of_image: (N,), the group of each image, "" for one that was not compared.
        ids: (N,).
    """
    within = {name: scores for name, scores in result.scores.items() if name not in ("", MASK)}
    result = with_groups(result, within)
    if (at := result.facts.get("groups_at")) is not None:
        numbers = np.full(len(ids), -1)
        for number, name in enumerate(within):
            numbers[of_image == name] = number
        rows, scores = result.scores[""].impostor_rows, result.scores[""].impostor
        assert rows is not None
        fmr = cross_group_fmr(rows[scores >= at["cosine"]], numbers, ids, len(within)).tolist()
        at |= {"groups": list(within), "cross_fmr": [[None if math.isnan(one) else one for one in row] for row in fmr]}
    return result


def _mfr_score(mask: Figure, whole: Figure) -> Figure:
    """0.25 · mask + 0.75 · all. The interval takes the errors of both as fully dependent, so it is not too narrow."""
    ends = [(mask.value, whole.value), (mask.low, whole.low), (mask.high, whole.high)]
    if any(end is None for pair in ends for end in pair):
        return Figure(None, reason="The score of MFR needs the figures of masked images and of all others.")
    return Figure(*(np.array(ends, dtype=np.float64) @ [0.25, 0.75]).tolist())


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


def group_names(groups: Sequence[str] | None, images: int) -> NDArray[np.str_]:
    """The groups (N,), lower-case and without spaces, as figures are named after them; "" for none.

    Raises:
        InputError: not one for each image, or a name that no figure can have.
    """
    if groups is None:
        return np.full(images, "")
    if len(groups) != images:
        raise InputError(f"There are {len(groups)} groups for {images} images: give one for each, or ''.")
    names = np.array(["-".join(group.lower().split()) for group in groups])
    for name in np.unique(names).tolist():
        if "/" in name or name == MASK:
            raise InputError(f"A group cannot be called {name!r}, as figures are named after it: rename it.")
    return names


def _parts(groups: NDArray[np.str_], masked: NDArray[np.bool_], fars: Sequence[float]) -> list[_Part]:
    plain = np.flatnonzero(~masked)
    parts = [_Part("", fars, plain)]
    parts += [
        _Part(name, fars if name != CHILDREN else HARD_FARS, plain[groups[plain] == name])
        for name in np.unique(groups[groups != ""]).tolist()
    ]
    if masked.any():
        parts.append(_Part(MASK, HARD_FARS, np.flatnonzero(masked), plain))
    return parts


def _compare(
    units: Tensor, ids: Ids, part: _Part, failed: NDArray[np.bool_], progress: Progress | None
) -> tuple[dict[str, int], Scores | str]:
    """The numbers of pairs of a part, and its scores, or why there are none."""
    genuine, genuine_rows, failure_ids = _genuine_scores(units, ids, part, failed)
    sides = [side[~failed[side]] for side in (part.left, part.right) if side is not None]
    labels = [torch.from_numpy(ids[side]).to(units.device) for side in sides]
    impostors = count_pairs(*labels)[1]
    counts = {"genuine_pairs": len(genuine) + len(failure_ids), "impostor_pairs": impostors}
    if not all(counts.values()):
        kind = "the same identity" if impostors else "different identities"
        of_part = f" of the part {part.name!r}" if part.name else ""
        return counts, f"No two images{of_part} are of {kind}, but both kinds of pairs are needed."
    kept = min(2 * allowed_false_accepts(max(part.fars), impostors) + _MARGIN, _MOST_KEPT)
    kept = impostors if impostors <= _ALL_KEPT else min(kept, impostors)
    chosen = (units if len(side) == len(ids) else units[torch.from_numpy(side).to(units.device)] for side in sides)
    (left, right), (left_labels, right_labels) = [*map(Rows.of, chosen), None][:2], [*labels, None][:2]
    assert left is not None
    assert left_labels is not None
    tail, *rows = largest_pairs(left, right, left_labels, right_labels, kept, progress)
    impostor_rows = np.stack(
        [side[of.cpu().numpy()] for side, of in zip((sides[0], sides[-1]), rows, strict=True)], axis=1
    )
    return counts, Scores(
        genuine=genuine,
        impostor=tail.cpu().double().numpy(),
        impostors=impostors,
        genuine_ids=ids[genuine_rows[:, 0]],
        impostor_ids=ids[impostor_rows],
        failures=len(failure_ids),
        failure_ids=failure_ids,
        genuine_rows=genuine_rows,
        impostor_rows=impostor_rows,
        scanned=(ids[sides[0]], ids[sides[-1]]),
    )


def _genuine_scores(units: Tensor, ids: Ids, part: _Part, failed: NDArray[np.bool_]) -> tuple[Floats, Ids, Ids]:
    """The scores (M,) of a part's genuine pairs, their rows (M, 2), and the identities of those with a failed image."""
    scores, rows, failures = [np.empty(0)], [np.empty((0, 2), np.int64)], [np.empty(0, np.int64)]
    for left, right in _same_identity(ids, part.left, part.right):
        fine = ~(failed[left] | failed[right])
        failures.append(ids[left[~fine]])
        rows.append(np.stack([left[fine], right[fine]], axis=1))
        pairs = torch.from_numpy(rows[-1]).to(units.device)
        scores.append(pair_dots(units, units, *pairs.T).cpu().double().numpy())
    return np.concatenate(scores), np.concatenate(rows), np.concatenate(failures)


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
