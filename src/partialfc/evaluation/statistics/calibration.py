"""From scores to log-likelihood ratios, and what their calibration costs.

Cllr, its minimum and logistic-regression calibration: Brümmer and du Preez 2006, Application-independent evaluation of
speaker detection, Computer Speech & Language 20. A log-likelihood ratio here is natural: log p(score | genuine) -
log p(score | impostor).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from partialfc.core.errors import InputError
from partialfc.evaluation.statistics.figures import Figure
from partialfc.evaluation.statistics.intervals import Z, variance_of_means
from partialfc.evaluation.statistics.metrics import Scores

Floats = NDArray[np.float64]

_PENALTY = 1e-6  # of half the squared scale, for scores of deviation 1, beside a mean loss that is at most log 2
_STEPS = 100
_TWICE_LOG_2 = 2.0 * math.log(2.0)


@dataclass(frozen=True)
class Calibration:
    """The affine map from score to natural log-likelihood ratio: scale · score + offset."""

    scale: float
    offset: float

    def __call__(self, scores: ArrayLike) -> Floats:
        """Log-likelihood ratios of the scores, of their shape."""
        return self.scale * np.asarray(scores, dtype=np.float64) + self.offset


def calibrate(genuine: ArrayLike, impostor: ArrayLike) -> Calibration:
    """The map with the least Cllr: logistic regression in which both kinds of pairs weigh one half.

    Newton's method on standardised scores. Where the scores separate the two kinds, the best scale is infinite; a
    penalty of 1e-6 / 2 times its square, for scores of standard deviation 1, keeps it finite.

    Args:
        genuine, impostor: scores (M,) and (N,): all of them, not a tail.

    Raises:
        InputError: either is empty or not finite.
    """
    groups = _both(genuine, impostor)
    weights = np.concatenate([np.full(len(group), 0.5 / len(group)) for group in groups])
    signs = np.concatenate([np.ones(len(groups[0])), -np.ones(len(groups[1]))])
    scores = np.concatenate(groups)
    mean = float(weights @ scores)
    deviation = math.sqrt(float(weights @ np.square(scores - mean))) or 1.0
    design = np.stack([(scores - mean) / deviation, np.ones(len(scores))], axis=1)
    penalty = np.diag([_PENALTY, 0.0])

    def loss_of(point: Floats) -> float:
        return float(weights @ np.logaddexp(0.0, -signs * (design @ point)) + point @ penalty @ point / 2)

    point = np.zeros(2)
    loss = loss_of(point)
    for _ in range(_STEPS):
        wrong = np.exp(-np.logaddexp(0.0, signs * (design @ point)))  # the probability of the other kind
        gradient = penalty @ point - design.T @ (weights * signs * wrong)
        curvature = (design.T * (weights * wrong * (1.0 - wrong))) @ design + penalty
        step = np.linalg.solve(curvature + 1e-12 * np.eye(2), gradient)
        while (found := loss_of(point - step)) > loss and np.abs(step).max() > 1e-12:
            step /= 2
        point, loss = point - step, min(found, loss)
        if np.abs(step).max() <= 1e-10 * max(1.0, float(np.abs(point).max())):
            break
    return Calibration(float(point[0] / deviation), float(point[1] - point[0] * mean / deviation))


def cllr(genuine: ArrayLike, impostor: ArrayLike) -> float:
    """The cost of log-likelihood ratios in bits: ½ [mean log2(1 + 1/LR) of genuine + mean log2(1 + LR) of impostors].

    0 is perfect; a system that always says LR = 1 has 1.

    Args:
        genuine, impostor: natural log-likelihood ratios (M,) and (N,).
    """
    genuine, impostor = np.asarray(genuine, dtype=np.float64), np.asarray(impostor, dtype=np.float64)
    return float(np.logaddexp(0.0, -genuine).mean() + np.logaddexp(0.0, impostor).mean()) / _TWICE_LOG_2


def min_cllr(genuine: ArrayLike, impostor: ArrayLike) -> float:
    """The least Cllr of any map from score to LR that never falls: of the scores' separation alone, in bits.

    The map is found by pool-adjacent-violators; equal scores get one LR. Cllr less min Cllr is the cost of calibration.

    Args:
        genuine, impostor: scores (M,) and (N,).
    """
    return cllr(*_isotonic_ratios(*_both(genuine, impostor)))


def _isotonic_ratios(genuine: Floats, impostor: Floats) -> tuple[Floats, Floats]:
    """The log-likelihood ratios of the best map that never falls; they may be infinite where they cost nothing."""
    values, places = np.unique(np.concatenate([genuine, impostor]), return_inverse=True)
    hits = np.bincount(places[: len(genuine)], minlength=len(values)).astype(np.float64)
    pairs = np.bincount(places, minlength=len(values)).astype(np.float64)
    share = pool_adjacent_violators(hits / pairs, pairs)
    with np.errstate(divide="ignore"):
        ratios = np.log(share) - np.log1p(-share) - math.log(len(genuine) / len(impostor))
    return ratios[places[: len(genuine)]], ratios[places[len(genuine) :]]


def cllr_figures(scores: Scores, calibration: Calibration | None = None) -> dict[str, Figure]:
    """`cllr` and `min-cllr` with normal intervals, in which the map to ratios is held.

    Both are null where only a tail of the impostor scores was kept. Failures have no score and are left out.

    Args:
        calibration: made elsewhere; None fits it to the same scores, which shows what an affine map cannot mend.
    """
    if not scores.complete or not len(scores.genuine):
        unknown = Figure(None, reason="Cllr needs all scores of both kinds of pairs.")
        return {"cllr": unknown, "min-cllr": unknown}
    apply = calibration or calibrate(scores.genuine, scores.impostor)
    ratios = {
        "cllr": (apply(scores.genuine), apply(scores.impostor)),
        "min-cllr": _isotonic_ratios(scores.genuine, scores.impostor),
    }
    figures = {}
    for name, (genuine, impostor) in ratios.items():
        costs = np.logaddexp(0.0, -genuine) / _TWICE_LOG_2, np.logaddexp(0.0, impostor) / _TWICE_LOG_2
        value = float(costs[0].mean() + costs[1].mean())
        reach = Z * math.sqrt(variance_of_means(scores, *costs))
        figures[name] = Figure(value, max(value - reach, 0.0), value + reach)
    return figures


def pool_adjacent_violators(values: Floats, weights: Floats) -> Floats:
    """The non-decreasing sequence nearest to `values` (N,) by squares weighted with positive `weights` (N,).

    Barlow et al. 1972, Statistical inference under order restrictions. Blocks that fall are merged in rounds of all
    runs at once, then one by one once few are left.
    """
    totals, sizes, lengths = values * weights, weights.astype(np.float64), np.ones(len(values), dtype=np.int64)
    for _ in range(64):
        # Consecutive blocks of which each is at or below the one before end up in one block.
        starts = np.flatnonzero(np.append(True, totals[1:] * sizes[:-1] > totals[:-1] * sizes[1:]))
        if len(starts) == len(totals):
            break
        totals, sizes = np.add.reduceat(totals, starts), np.add.reduceat(sizes, starts)
        lengths = np.add.reduceat(lengths, starts)
    blocks: list[tuple[float, float, int]] = []
    for total, size, length in zip(totals.tolist(), sizes.tolist(), lengths.tolist(), strict=True):
        while blocks and total * blocks[-1][1] <= blocks[-1][0] * size:
            below, below_size, below_length = blocks.pop()
            total, size, length = total + below, size + below_size, length + below_length
        blocks.append((total, size, length))
    merged = np.array(blocks)
    return np.repeat(merged[:, 0] / merged[:, 1], merged[:, 2].astype(np.int64))


def _both(genuine: ArrayLike, impostor: ArrayLike) -> tuple[Floats, Floats]:
    groups = np.asarray(genuine, dtype=np.float64), np.asarray(impostor, dtype=np.float64)
    for group, name in zip(groups, ("genuine", "impostor"), strict=True):
        if group.ndim != 1 or not len(group) or not np.isfinite(group).all():
            raise InputError(f"The {name} scores must be a list of at least one finite number.")
    return groups
