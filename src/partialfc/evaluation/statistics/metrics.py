"""Threshold metrics: pure functions of scores, in float64.

A score is a similarity: a pair is accepted as "same" if its score is at or above the threshold. `genuine` holds the
scores of pairs of one person, `impostor` those of two. TAR (true accept rate) is the accepted share of genuine pairs,
FAR (false accept rate) that of impostor pairs. Equal scores are accepted or rejected together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from partialfc.core.errors import InputError
from partialfc.evaluation.statistics.identities import Identities, number_identities

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]

FOLDS = 10
# Squared distances of unit vectors lie in [0, 4].
DISTANCE_THRESHOLDS: Floats = np.arange(0, 4, 0.01)


def _scores(values: ArrayLike, name: str, *, may_be_empty: bool = False) -> Floats:
    """One-dimensional, finite, not empty, float64; InputError otherwise."""
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or not (len(scores) or may_be_empty):
        raise InputError(f"The {name} scores must be a list with at least one score: both kinds of pairs are needed.")
    if not np.isfinite(scores).all():
        raise InputError(f"The {name} scores hold NaN or infinity: look for non-finite embeddings.")
    return scores


def _ids(values: ArrayLike | None, name: str, shape: tuple[int, ...]) -> Ids | None:
    """int64 of the given shape, or None; InputError otherwise."""
    if values is None:
        return None
    ids = np.asarray(values, dtype=np.int64)
    if ids.shape != shape:
        raise InputError(f"The {name} have the shape {ids.shape}, but must have {shape}: give one row a score.")
    return ids


@dataclass(frozen=True)
class Scores:
    """The scores that a protocol has measured. Of the impostors, the upper tail is enough.

    Attributes:
        genuine: float64 (M,).
        impostor: float64 (K,), the K largest impostor scores in any order: all of them if K equals `impostors`.
        impostors: the number of impostor pairs that were compared.
        genuine_ids: int64 (M,), the identity of each genuine pair.
        impostor_ids: int64 (K, 2), the two identities of each kept impostor pair.
        failures: genuine pairs with an image that could not be used. They count as rejected at every threshold.
        failure_ids: int64 (failures,), their identities.
        genuine_rows: int64 (M, 2), the rows of the features of each genuine pair.
        impostor_rows: int64 (K, 2), likewise of each kept impostor pair.
        scanned: where all pairs were scanned, the identity of every image, int64, on the left and on the right side:
            the same array twice if all images were compared with each other.

    Raises:
        InputError: no genuine or no impostor pair, scores that are not finite, fewer impostor pairs than scores, or
            identities or rows that do not fit the scores.
    """

    genuine: Floats
    impostor: Floats
    impostors: int
    genuine_ids: Ids | None = None
    impostor_ids: Ids | None = None
    failures: int = 0
    failure_ids: Ids | None = None
    genuine_rows: Ids | None = None
    impostor_rows: Ids | None = None
    scanned: tuple[Ids, Ids] | None = None

    def __post_init__(self) -> None:
        genuine = _scores(self.genuine, "genuine", may_be_empty=self.failures > 0)
        impostor = _scores(self.impostor, "impostor")
        if self.impostors < len(impostor):
            raise InputError(f"There are {len(impostor)} scores of {self.impostors} impostor pairs: count all pairs.")
        if self.failures < 0:
            raise InputError(f"The number of failures, {self.failures}, must not be negative.")
        if (self.genuine_ids is None) != (self.impostor_ids is None):
            raise InputError("Identities are given for one kind of pairs only: give them for both kinds, or for none.")
        values = {
            "genuine": genuine,
            "impostor": impostor,
            "genuine_ids": _ids(self.genuine_ids, "identities of the genuine pairs", genuine.shape),
            "impostor_ids": _ids(self.impostor_ids, "identities of the impostor pairs", (len(impostor), 2)),
            "genuine_rows": _ids(self.genuine_rows, "rows of the genuine pairs", (len(genuine), 2)),
            "impostor_rows": _ids(self.impostor_rows, "rows of the impostor pairs", (len(impostor), 2)),
            "failure_ids": _ids(self.failure_ids, "identities of the failures", (self.failures,)),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def complete(self) -> bool:
        """Whether the scores of all impostor pairs are there."""
        return len(self.impostor) == self.impostors

    @property
    def genuine_pairs(self) -> int:
        """The number of genuine pairs, failures included."""
        return len(self.genuine) + self.failures

    @cached_property
    def sorted_genuine(self) -> Floats:
        """(M,), ascending."""
        return np.sort(self.genuine)

    @cached_property
    def sorted_impostor(self) -> Floats:
        """(K,), ascending."""
        return np.sort(self.impostor)

    @cached_property
    def identities(self) -> Identities | None:
        """The identities in compact numbers; None where they are not known."""
        if self.genuine_ids is None or self.impostor_ids is None:
            return None
        failures = self.failures if self.failure_ids is None else self.failure_ids
        return number_identities(self.genuine_ids, self.impostor_ids, self.impostors, failures, self.scanned)

    def tar(self, threshold: float) -> float:
        """The accepted share of genuine pairs."""
        return float(_at_or_above(self.sorted_genuine, np.float64(threshold)) / self.genuine_pairs)

    def false_accepts(self, threshold: float) -> int:
        """The accepted number of impostor pairs.

        Raises:
            InputError: the threshold lies below the kept tail.
        """
        if not self.complete and threshold <= self.sorted_impostor[0]:
            raise InputError(
                f"The threshold {threshold:.4g} does not lie above the lowest of the {len(self.impostor)} kept "
                "impostor scores: keep more of them."
            )
        return int(_at_or_above(self.sorted_impostor, np.float64(threshold)))


def allowed_false_accepts(far: float, impostors: int) -> int:
    """The largest count whose share of `impostors` does not exceed `far`, both as float64 numbers.

    The product `far * impostors` would be rounded: 0.29 of 100 is 28.999999999999996.

    Raises:
        InputError: `far` lies outside [0, 1].
    """
    if not 0.0 <= far <= 1.0:
        raise InputError(f"The false accept rate {far} must lie in [0, 1].")
    count = math.floor(far * impostors)
    while count and count / impostors > far:
        count -= 1
    while count < impostors and (count + 1) / impostors <= far:
        count += 1
    return count


def is_resolvable(far: float, impostors: int) -> bool:
    """Whether `far` allows at least one of the impostor pairs."""
    return allowed_false_accepts(far, impostors) >= 1


def threshold_at_far(scores: Scores, far: float) -> float:
    """The threshold with the highest TAR of those whose FAR does not exceed `far`.

    With K allowed false accepts, the scores above the (K + 1)-th largest impostor score are accepted. The threshold is
    the smallest accepted score of either kind, or the next number above that impostor score if none is accepted.

    Raises:
        InputError: `far` lies outside [0, 1], or allows as many false accepts as impostor scores were kept.
    """
    allowed = allowed_false_accepts(far, scores.impostors)
    genuine, impostor = scores.sorted_genuine, scores.sorted_impostor
    if scores.complete and allowed >= len(impostor):
        return float(min([impostor[0], *genuine[:1]]))
    if allowed >= len(impostor):
        raise InputError(
            f"A false accept rate of {far:g} allows {allowed} false accepts, but only the {len(impostor)} largest of "
            f"{scores.impostors} impostor scores were kept: keep at least {allowed + 1}."
        )
    rejected = impostor[-1 - allowed]
    accepted = [kind[np.searchsorted(kind, rejected, side="right") :] for kind in (genuine, impostor)]
    return float(min([kind[0] for kind in accepted if len(kind)], default=np.nextafter(rejected, np.inf)))


def _at_or_above(ascending: Floats, thresholds: Floats | np.float64) -> NDArray[np.int64]:
    """The number of scores that each threshold accepts."""
    return len(ascending) - np.searchsorted(ascending, thresholds, side="left")


@dataclass(frozen=True)
class Roc:
    """The operating points of a score, from "accept nothing" (threshold infinity) to "accept all".

    Attributes:
        thresholds: (K,) descending: infinity, then every distinct score; of a tail, those above its lowest score.
        far, tar: (K,) rates at or above each threshold, from 0 to 1.
        limit: the curve is not known for this FAR and those above, because only a tail was kept.
    """

    thresholds: Floats
    far: Floats
    tar: Floats
    limit: float = math.inf

    @property
    def auc(self) -> float:
        """Area under the curve: the chance that a genuine pair scores above an impostor pair, ties counting half.

        Raises:
            InputError: only a tail of the impostor scores was kept.
        """
        if self.limit <= 1.0:
            raise InputError("The area under the curve needs all impostor scores, but only the largest were kept.")
        return float(np.sum(np.diff(self.far) * (self.tar[1:] + self.tar[:-1]) / 2))

    @property
    def equal_error_rate(self) -> float:
        """The rate at which FAR equals 1 - TAR, on the straight lines between the operating points.

        Raises:
            InputError: the kept tail of the impostor scores ends above it.
        """
        gap = self.far - (1.0 - self.tar)  # rises from -1 to 1
        if gap[-1] < 0:
            raise InputError("The equal error rate lies below the kept impostor scores: keep more of them.")
        after = int(np.argmax(gap >= 0))
        share = -gap[after - 1] / (gap[after] - gap[after - 1])
        return float(self.far[after - 1] + share * (self.far[after] - self.far[after - 1]))

    def tar_at(self, far: float) -> float:
        """The highest TAR over all thresholds whose FAR does not exceed `far`.

        The public reference reads its curve at the nearest FAR instead, which may exceed the target.

        Raises:
            InputError: `far` lies outside [0, 1], or not below `limit`.
        """
        if not 0.0 <= far <= 1.0:
            raise InputError(f"The false accept rate {far} must lie in [0, 1].")
        if far >= self.limit:
            raise InputError(f"A false accept rate of {far:g} needs more impostor scores than were kept: keep more.")
        return float(self.tar[np.searchsorted(self.far, far, side="right") - 1])


def roc(genuine: ArrayLike, impostor: ArrayLike) -> Roc:
    """Every operating point of the scores `genuine` (M,) and `impostor` (N,).

    Raises:
        InputError: either is empty or holds a value that is not finite.
    """
    rejected = _scores(impostor, "impostor")
    return roc_of(Scores(np.asarray(genuine, dtype=np.float64), rejected, len(rejected)))


def roc_of(scores: Scores) -> Roc:
    """Every operating point that the scores determine; failures are rejected at each."""
    genuine, impostor = scores.sorted_genuine, scores.sorted_impostor
    distinct = np.unique(np.concatenate([genuine, impostor]))[::-1]
    if not scores.complete:  # the lowest kept score may have equals that were not kept
        distinct = distinct[distinct > impostor[0]]
    thresholds: Floats = np.concatenate([[np.inf], distinct])
    return Roc(
        thresholds,
        far=_at_or_above(impostor, thresholds) / scores.impostors,
        tar=_at_or_above(genuine, thresholds) / scores.genuine_pairs,
        limit=math.inf if scores.complete else len(impostor) / scores.impostors,
    )


def fold_accuracy(squared_distances: ArrayLike, is_same: ArrayLike) -> tuple[Floats, Floats]:
    """The protocol of LFW (Huang et al. 2007) as it is used for LFW, CFP-FP, AgeDB-30, CALFW, CPLFW and RFW.

    The pairs, in their given order, are cut into 10 folds whose sizes differ by at most one, the larger first. For
    each, the threshold is the first of 0, 0.01, ... 3.99 with the best accuracy on all other folds; a pair is "same" if
    its distance lies below it.

    Args:
        squared_distances: (P,) between the unit embeddings of each pair.
        is_same: (P,) truth.

    Returns:
        The accuracy on each fold, and the squared distance chosen on the others: (10,) each.

    Raises:
        InputError: fewer pairs than folds, or a distance that is not finite.
    """
    distances = np.asarray(squared_distances, dtype=np.float64)
    same = np.asarray(is_same, dtype=bool)
    if distances.shape != same.shape or distances.ndim != 1:
        raise InputError(f"There are {distances.size} distances but {same.size} answers: give one of each a pair.")
    if len(distances) < FOLDS:
        raise InputError(f"{len(distances)} pairs cannot be cut into {FOLDS} folds: give at least {FOLDS} pairs.")
    if not np.isfinite(distances).all():
        raise InputError("The distances hold NaN or infinity: look for non-finite embeddings.")
    parts = np.array_split(np.arange(len(distances)), FOLDS)
    correct = np.stack([_correct(distances[part], same[part]) for part in parts])  # (folds, thresholds)
    best = np.argmax(correct.sum(axis=0) - correct, axis=1)
    accuracies = correct[np.arange(FOLDS), best] / np.array([len(part) for part in parts])
    return accuracies, DISTANCE_THRESHOLDS[best]


def _correct(distances: Floats, same: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The number of pairs that each of DISTANCE_THRESHOLDS classifies correctly: (thresholds,)."""
    accepted = np.searchsorted(np.sort(distances[same]), DISTANCE_THRESHOLDS, side="left")
    false_accepted = np.searchsorted(np.sort(distances[~same]), DISTANCE_THRESHOLDS, side="left")
    return accepted + np.count_nonzero(~same) - false_accepted
