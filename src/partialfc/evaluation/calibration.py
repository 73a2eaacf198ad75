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

Floats = NDArray[np.float64]

_PENALTY = 1e-6  # of half the squared scale, for scores of deviation 1, beside a mean loss that is at most log 2
_STEPS = 100


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
    genuine, impostor = _both(genuine, impostor)
    return _cost(genuine, np.ones(len(genuine)), impostor, np.ones(len(impostor)))


def min_cllr(genuine: ArrayLike, impostor: ArrayLike) -> float:
    """The least Cllr of any map from score to LR that never falls: of the scores' separation alone, in bits.

    The map is found by pool-adjacent-violators; equal scores get one LR. Cllr less min Cllr is the cost of calibration.

    Args:
        genuine, impostor: scores (M,) and (N,).
    """
    genuine, impostor = _both(genuine, impostor)
    values, places = np.unique(np.concatenate([genuine, impostor]), return_inverse=True)
    hits = np.bincount(places[: len(genuine)], minlength=len(values)).astype(np.float64)
    others = np.bincount(places[len(genuine) :], minlength=len(values)).astype(np.float64)
    share = pool_adjacent_violators(hits / (hits + others), hits + others)
    with np.errstate(divide="ignore"):
        ratios = np.log(share) - np.log1p(-share) - math.log(len(genuine) / len(impostor))
    return _cost(ratios, hits, ratios, others)


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


def _cost(genuine: Floats, genuine_counts: Floats, impostor: Floats, impostor_counts: Floats) -> float:
    """Cllr of log-likelihood ratios, each given as often as it counts."""
    used, others = genuine_counts > 0, impostor_counts > 0  # a ratio of 0 has no genuine pair, and costs nothing
    misses = genuine_counts[used] @ np.logaddexp(0.0, -genuine[used]) / genuine_counts.sum()
    accepts = impostor_counts[others] @ np.logaddexp(0.0, impostor[others]) / impostor_counts.sum()
    return float(misses + accepts) / (2.0 * math.log(2.0))
