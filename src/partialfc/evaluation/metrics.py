"""Threshold metrics: pure functions of scores, in float64.

A score is a similarity: a pair is accepted as "same" if its score is at or above the threshold. `genuine` holds the
scores of pairs of one person, `impostor` those of two. TAR (true accept rate) is the accepted share of genuine pairs,
FAR (false accept rate) that of impostor pairs. Equal scores are accepted or rejected together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from partialfc.core.errors import InputError

Floats = NDArray[np.float64]

FOLDS = 10
# Squared distances of unit vectors lie in [0, 4].
DISTANCE_THRESHOLDS: Floats = np.arange(0, 4, 0.01)


def _scores(values: ArrayLike, name: str) -> Floats:
    """One-dimensional, finite, not empty, float64; InputError otherwise."""
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or not len(scores):
        raise InputError(f"The {name} scores must be a list with at least one score: both kinds of pairs are needed.")
    if not np.isfinite(scores).all():
        raise InputError(f"The {name} scores hold NaN or infinity: look for non-finite embeddings.")
    return scores


@dataclass(frozen=True)
class Roc:
    """The operating points of a score, from "accept nothing" (threshold infinity) to "accept all".

    Args:
        thresholds: (K,) descending: infinity, then every distinct score.
        far, tar: (K,) rates at or above each threshold, from 0 to 1.
    """

    thresholds: Floats
    far: Floats
    tar: Floats

    @property
    def auc(self) -> float:
        """Area under the curve: the chance that a genuine pair scores above an impostor pair, ties counting half."""
        return float(np.sum(np.diff(self.far) * (self.tar[1:] + self.tar[:-1]) / 2))

    @property
    def equal_error_rate(self) -> float:
        """The rate at which FAR equals 1 - TAR, on the straight lines between the operating points."""
        gap = self.far - (1.0 - self.tar)  # rises from -1 to 1
        after = int(np.argmax(gap >= 0))
        share = -gap[after - 1] / (gap[after] - gap[after - 1])
        return float(self.far[after - 1] + share * (self.far[after] - self.far[after - 1]))


def roc(genuine: ArrayLike, impostor: ArrayLike) -> Roc:
    """Every operating point of the scores `genuine` (M,) and `impostor` (N,).

    Raises:
        InputError: either is empty or holds a value that is not finite.
    """
    accepted, rejected = np.sort(_scores(genuine, "genuine")), np.sort(_scores(impostor, "impostor"))
    distinct = np.unique(np.concatenate([accepted, rejected]))[::-1]
    thresholds: Floats = np.concatenate([[np.inf], distinct])
    return Roc(
        thresholds,
        far=(len(rejected) - np.searchsorted(rejected, thresholds, side="left")) / len(rejected),
        tar=(len(accepted) - np.searchsorted(accepted, thresholds, side="left")) / len(accepted),
    )


def tar_at_far(genuine: ArrayLike, impostor: ArrayLike, far: float) -> float:
    """The highest TAR over all thresholds whose FAR does not exceed `far`.

    The public reference reads its curve at the nearest FAR instead, which may exceed the target.

    Args:
        genuine, impostor: scores (M,) and (N,).
        far: in [0, 1].

    Raises:
        InputError: scores empty or not finite, or `far` outside [0, 1].
    """
    accepted, rejected = _scores(genuine, "genuine"), _scores(impostor, "impostor")
    if not 0.0 <= far <= 1.0:
        raise InputError(f"The false accept rate {far} must lie in [0, 1].")
    count = len(rejected)
    allowed = min(int(far * count) + 1, count)
    while allowed / count > far:
        allowed -= 1
    if allowed == count:
        return 1.0
    # The threshold lies just above the highest impostor score that must be rejected.
    blocked = np.partition(rejected, count - 1 - allowed)[count - 1 - allowed]
    return float(np.mean(accepted > blocked))


@dataclass(frozen=True)
class FoldAccuracy:
    """Accuracy by cross-validation.

    Args:
        mean, std: of the test folds' accuracies; the population's standard deviation.
        accuracies: (folds,), one a test fold.
        thresholds: (folds,), the squared distance chosen on the other folds.
    """

    mean: float
    std: float
    accuracies: Floats
    thresholds: Floats


def fold_accuracy(squared_distances: ArrayLike, is_same: ArrayLike, *, folds: int = FOLDS) -> FoldAccuracy:
    """The protocol of LFW (Huang et al. 2007) as it is used for LFW, CFP-FP, AgeDB-30, CALFW, CPLFW and RFW.

    The pairs, in their given order, are cut into `folds` folds whose sizes differ by at most one, the larger first. For
    each, the threshold is the first of 0, 0.01, ... 3.99 with the best accuracy on all other folds; a pair is "same" if
    its distance lies below it.

    Args:
        squared_distances: (P,) between the unit embeddings of each pair.
        is_same: (P,) truth.
        folds: at least 2.

    Raises:
        InputError: fewer pairs than folds, or a distance that is not finite.
    """
    distances = np.asarray(squared_distances, dtype=np.float64)
    same = np.asarray(is_same, dtype=bool)
    if distances.shape != same.shape or distances.ndim != 1:
        raise InputError(f"There are {distances.size} distances but {same.size} answers: give one of each a pair.")
    if len(distances) < folds:
        raise InputError(f"{len(distances)} pairs cannot be cut into {folds} folds: give at least {folds} pairs.")
    if not np.isfinite(distances).all():
        raise InputError("The distances hold NaN or infinity: look for non-finite embeddings.")
    parts = np.array_split(np.arange(len(distances)), folds)
    correct = np.stack([_correct(distances[part], same[part]) for part in parts])  # (folds, thresholds)
    best = np.argmax(correct.sum(axis=0) - correct, axis=1)
    accuracies = correct[np.arange(folds), best] / np.array([len(part) for part in parts])
    return FoldAccuracy(float(accuracies.mean()), float(accuracies.std()), accuracies, DISTANCE_THRESHOLDS[best])


def _correct(distances: Floats, same: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The number of pairs that each of DISTANCE_THRESHOLDS classifies correctly: (thresholds,)."""
    accepted = np.searchsorted(np.sort(distances[same]), DISTANCE_THRESHOLDS, side="left")
    false_accepted = np.searchsorted(np.sort(distances[~same]), DISTANCE_THRESHOLDS, side="left")
    return accepted + np.count_nonzero(~same) - false_accepted
