"""Figures of scores with 95 % intervals, by resampling identities, or pairs where no identities are known.

The bootstrap draws as many identities as there are, with replacement; w[a] is how often identity a was drawn. A genuine
pair then counts w[a] times. An impostor pair of a and b would count w[a]·w[b] times, but this "pigeonhole" bootstrap
counts the noise of single pairs three times (Owen 2007, The pigeonhole bootstrap, Annals of Applied Statistics), and
false accepts are rare enough for that noise to prevail. So the change of FAR is taken to first order, Σ_a (w[a] - 1)
S[a] with S[a] the false accepts of a in excess of its share, and scaled to the variance of pairs that share ends, Σ_a
S[a]² less the false accepts (Fafchamps and Gubert 2007, The formation of risk sharing networks, Journal of Development
Economics), but not below that of independent pairs. Where a few identities carry the variance, Student's factor widens
it. This needs no pair beyond the threshold's neighbourhood, and products of small matrices make all resamples.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from partialfc.core.errors import InputError
from partialfc.evaluation.statistics.figures import Figure, rate_name
from partialfc.evaluation.statistics.metrics import (
    Scores,
    allowed_false_accepts,
    fold_accuracy,
    roc_of,
    threshold_at_far,
)

Floats = NDArray[np.float64]

RESAMPLES = 1000
_SEED = 20071
_GRID = 129  # thresholds at which the resampled curves are evaluated
_REACH = 5.0  # standard deviations to either side of the reported threshold
_CHUNK = 1 << 23  # weights at a time
_SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")
Z = 1.959963984540054  # the 97.5 % point of the normal distribution


def interval_facts(scores: Scores) -> dict[str, Any]:
    """How the intervals of these scores are made, for the facts of a result."""
    people = scores.identities
    if people is None:
        return {"interval": "pairs", "resamples": RESAMPLES}
    return {
        "interval": "identities",
        "resamples": RESAMPLES,
        "identities": people.count,
        "impostor_pairs_of_identities": people.source,
    }


def why_unresolvable(scores: Scores, far: float) -> str | None:
    """Why the scores do not determine the threshold at a FAR, as a sentence; None if they do."""
    allowed = allowed_false_accepts(far, scores.impostors)
    if allowed < 1:
        return f"{scores.impostors:,} impostor pairs cannot resolve a rate of {rate_name(far)}."
    if allowed >= len(scores.impostor) < scores.impostors:
        return f"Only {len(scores.impostor):,} impostor scores were kept, too few for a rate of {rate_name(far)}."
    return None


def tar_figure(scores: Scores, far: float) -> Figure:
    """The highest TAR at a FAR that does not exceed `far`, with its percentile interval.

    Every resample chooses its own threshold. One whose false accepts do not suffice within the kept tail counts with
    the TAR at the end of the tail for the lower end of the interval, and with 1 for the upper: the interval is never
    too narrow for it, and the reason says so.

    Raises:
        InputError: `far` lies outside [0, 1].
    """
    if (unresolvable := why_unresolvable(scores, far)) is not None:
        return Figure(None, reason=unresolvable)
    value = scores.tar(threshold_at_far(scores, far))
    low, high, reason = _resampled_tars(scores, far)
    return _rate_figure(value, _percentile(low, 2.5), _percentile(high, 97.5), _genuine_units(scores), reason)


def tar_change(before: Scores, after: Scores, far: float) -> Figure:
    """How much higher the TAR at a FAR is in `after`, with its percentile interval.

    Both are scores of the same pairs in the same order. Their identities are drawn alike in both, or the pairs where no
    identities are known, so that what makes some of them hard for both cancels out.

    Raises:
        InputError: `far` lies outside [0, 1].
    """
    for scores in (before, after):
        if (unresolvable := why_unresolvable(scores, far)) is not None:
            return Figure(None, reason=unresolvable)
        if scores.identities is None and not scores.complete:
            return Figure(
                None, reason="Pairs of people without names cannot be matched if impostor scores are left out."
            )
    before, after = _with_pairs_as_identities(before), _with_pairs_as_identities(after)
    old, new = (scores.tar(threshold_at_far(scores, far)) for scores in (before, after))
    (old_low, old_high, old_reason), (new_low, new_high, reason) = (
        _resampled_tars(scores, far) for scores in (before, after)
    )
    low, high = _percentile(new_low - old_high, 2.5), _percentile(new_high - old_low, 97.5)
    return Figure(new - old, min(low, new - old), max(high, new - old), old_reason or reason)


def _with_pairs_as_identities(scores: Scores) -> Scores:
    """Scores without identities as if nobody was in two pairs, so that a resample draws whole pairs."""
    if scores.identities is not None:
        return scores
    genuine, impostor = scores.genuine_pairs, len(scores.impostor)
    return replace(
        scores,
        genuine_ids=np.arange(len(scores.genuine)),
        failure_ids=np.arange(len(scores.genuine), genuine),
        impostor_ids=genuine + np.arange(2 * impostor).reshape(impostor, 2),
    )


def _resampled_tars(scores: Scores, far: float) -> tuple[Floats, Floats, str | None]:
    """The TAR of every resample at a FAR, at least and at most, (RESAMPLES,) each; and why these differ, if they do."""
    allowed = allowed_false_accepts(far, scores.impostors)
    deviation = math.sqrt(_false_accept_variance(scores, _above_rank(scores, np.array([allowed])))[0])
    reach = math.ceil(_REACH * max(deviation, 1.0))
    last = scores.impostors if scores.complete else len(scores.impostor) - 1
    ranks = np.linspace(max(allowed - reach, 0), min(allowed + reach, last), _GRID).round().astype(np.int64)
    grid = np.unique(_above_rank(scores, np.append(ranks, allowed)))[::-1]
    fars, tars = resampled_rates(scores, grid)
    exceeded: NDArray[np.bool_] = fars > far
    chosen = np.where(exceeded.any(axis=1), exceeded.argmax(axis=1), len(grid)) - 1
    low = tars[np.arange(len(tars)), np.maximum(chosen, 0)]
    beyond = ~exceeded.any(axis=1)
    if scores.complete or allowed + reach <= last or not beyond.any():
        return low, low, None
    return (
        low,
        np.where(beyond, 1.0, low),
        f"{np.count_nonzero(beyond):,} of {RESAMPLES:,} resamples need more than the {len(scores.impostor):,} kept "
        "impostor scores: the interval is widened to what they can be at most.",
    )


def fnmr_figure(scores: Scores, fmr: float) -> Figure:
    """FNMR, 1 - TAR, at an FMR that does not exceed `fmr`; failures count as non-matches."""
    tar = tar_figure(scores, fmr)
    if tar.value is None or tar.low is None or tar.high is None:
        return tar
    return Figure(1.0 - tar.value, 1.0 - tar.high, 1.0 - tar.low, tar.reason)


def eer_figure(scores: Scores) -> Figure:
    """The equal error rate with its percentile interval; failures count as rejected.

    It is null where only a tail of the impostor scores was kept that does not reach it.
    """
    curve = roc_of(scores)
    gap = curve.far - (1.0 - curve.tar)
    if gap[-1] < 0:
        return Figure(None, reason="The equal error rate lies below the kept impostor scores.")
    value = curve.equal_error_rate
    center = int(np.argmax(gap >= 0))
    fars, tars = resampled_rates(scores, curve.thresholds[center : center + 1])
    reach = _REACH * max(float((fars + tars).std()), 1.0 / scores.genuine_pairs)
    first, last = np.searchsorted(gap, [gap[center - 1] - reach, gap[center] + reach])
    chosen = np.linspace(max(first - 1, 0), min(last, len(gap) - 1), 2 * _GRID).round().astype(np.int64)
    chosen = np.unique(np.concatenate([chosen, [center - 1, center]]))
    fars, tars = resampled_rates(scores, curve.thresholds[chosen])
    gaps, rows = fars + tars - 1.0, np.arange(len(fars))
    after = np.clip(np.where((gaps >= 0).any(axis=1), (gaps >= 0).argmax(axis=1), len(chosen) - 1), 1, None)
    step = gaps[rows, after] - gaps[rows, after - 1]
    share = np.clip(-gaps[rows, after - 1] / np.where(step > 0, step, 1.0), 0.0, 1.0)
    rates = fars[rows, after - 1] + share * (fars[rows, after] - fars[rows, after - 1])
    return _rate_figure(value, _percentile(rates, 2.5), _percentile(rates, 97.5), _genuine_units(scores))


def auc_figure(scores: Scores) -> Figure:
    """The area under the ROC with the normal interval of its linear part (DeLong et al. 1988); failures are left out.

    It is null where only a tail of the impostor scores was kept.
    """
    if not scores.complete:
        return Figure(None, reason="The area under the ROC needs all impostor scores.")
    parts = []
    for values, others in (
        (scores.genuine, scores.sorted_impostor),
        (-scores.impostor, -scores.sorted_genuine[::-1]),
    ):
        below, not_above = (np.searchsorted(others, values, side=side) for side in _SIDES)
        parts.append((below + not_above) / (2.0 * len(others)))
    value = float(parts[0].mean())
    reach = Z * math.sqrt(variance_of_means(scores, *parts))
    return _rate_figure(value, max(value - reach, 0.0), min(value + reach, 1.0), _genuine_units(scores))


def variance_of_means(scores: Scores, genuine: Floats, impostor: Floats) -> float:
    """The variance of mean(genuine) + mean(impostor) of values (M,) and (N,) of all pairs, in this module's sense."""
    own, other = (genuine - genuine.mean()) / len(genuine), (impostor - impostor.mean()) / len(impostor)
    independent = float(own @ own + other @ other)
    people = scores.identities
    if people is None:
        return independent
    influence = np.bincount(people.genuine, own, minlength=people.count)
    influence += np.bincount(people.impostor.ravel(), np.repeat(other, 2), minlength=people.count)
    return max(float(influence @ influence - other @ other), independent)


def accuracy_figure(squared_distances: ArrayLike, is_same: ArrayLike) -> Figure:
    """Mean accuracy of the 10 folds (`fold_accuracy`); the interval resamples pairs and keeps the folds' thresholds."""
    accuracies, _ = fold_accuracy(squared_distances, is_same)
    pairs, value = np.size(is_same), float(accuracies.mean())
    resampled = np.random.default_rng(_SEED).binomial(pairs, value, RESAMPLES) / pairs
    return _rate_figure(value, _percentile(resampled, 2.5), _percentile(resampled, 97.5), pairs)


def fmr_at(scores: Scores, threshold: float) -> Figure:
    """FMR at a given threshold, with the interval of Wilson (1927) for the effective number of pairs.

    The effective number is that of independent pairs with the same variance (Korn and Graubard 1998); the variance is
    the limit of the bootstrap over identities. Unlike the bootstrap's, this interval also holds for no false accepts:
    as nothing tells then how alike the images of two people are, each pair of people counts once.
    The figure is null if the threshold lies below the kept tail.
    """
    if not scores.complete and threshold <= scores.sorted_impostor[0]:
        return Figure(None, reason=f"The {len(scores.impostor):,} kept impostor scores end above {threshold:.4g}.")
    count = scores.false_accepts(threshold)
    variance = float(_false_accept_variance(scores, np.array([threshold]))[0])
    effective = scores.impostors * min(1.0, count * (1.0 - count / scores.impostors) / variance) if variance else 0.0
    people = scores.identities
    alike = scores.impostors if people is None else min(scores.impostors, people.count * (people.count - 1) // 2)
    return wilson(count / scores.impostors, effective or max(alike, 1))


def fnmr_at(scores: Scores, threshold: float) -> Figure:
    """FNMR at a given threshold; the interval is that of `fmr_at`, and without errors that of as many identities."""
    value, pairs = 1.0 - scores.tar(threshold), scores.genuine_pairs
    people = scores.identities
    if people is None:
        return wilson(value, pairs)
    of_identity = np.concatenate([people.genuine, people.failures])
    errors = np.concatenate([scores.genuine < threshold, np.ones(len(people.failures))])
    excess = np.bincount(of_identity, errors - value, minlength=people.count)
    units = len(np.unique(of_identity))
    variance = float(excess @ excess) / pairs**2 * units / max(units - 1, 1)
    return wilson(value, min(value * (1.0 - value) / variance, pairs) if variance > 0 else units)


def wilson(rate: float, trials: float) -> Figure:
    """The score interval of a binomial rate (Wilson 1927, Journal of the American Statistical Association)."""
    center = (rate + Z**2 / (2 * trials)) / (1 + Z**2 / trials)
    half = Z * math.sqrt(rate * (1 - rate) / trials + Z**2 / (4 * trials**2)) / (1 + Z**2 / trials)
    return Figure(rate, min(max(center - half, 0.0), rate), max(min(center + half, 1.0), rate))


def resampled_rates(scores: Scores, thresholds: Floats) -> tuple[Floats, Floats]:
    """FAR and TAR of every resample at the thresholds (G,), which descend: float64 (RESAMPLES, G) each.

    Raises:
        InputError: a threshold lies below the kept tail.
    """
    if not scores.complete and thresholds[-1] <= scores.sorted_impostor[0]:
        raise InputError("A threshold does not lie above the lowest kept impostor score: keep more of them.")
    generator = np.random.default_rng(_SEED)
    people = scores.identities
    if people is None:
        rates = []
        for values, total in ((scores.impostor, scores.impostors), (scores.genuine, scores.genuine_pairs)):
            counts = np.bincount(_first_accepting(values, thresholds), minlength=len(thresholds) + 1)[:-1]
            shares = np.append(counts, total - counts.sum()) / total
            rates.append(generator.multinomial(total, shares, RESAMPLES)[:, :-1].cumsum(axis=1) / total)
        return rates[0], rates[1]
    excess, accepts = _excess_false_accepts(scores, thresholds)
    scale = _scale(excess, accepts, scores.impostors)
    accepted = _per_identity(people.genuine, scores.genuine, thresholds, people.count).cumsum(axis=1)
    genuine = np.bincount(np.concatenate([people.genuine, people.failures]), minlength=people.count).astype(np.float64)
    tar = accepted.sum(axis=0) / genuine.sum()
    widening = _student_factor(accepted - tar * genuine[:, None])
    changes: list[Floats] = []
    tars: list[Floats] = []
    for _ in range(0, RESAMPLES, rows := max(1, min(RESAMPLES, _CHUNK // people.count))):
        drawn = generator.integers(people.count, size=(min(rows, RESAMPLES - len(tars) * rows), people.count))
        drawn += np.arange(len(drawn))[:, None] * people.count
        weights = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)
        changes.append((weights - 1.0) @ excess)
        tars.append(weights @ accepted / np.maximum(weights @ genuine, 1.0)[:, None])
    # Relative changes of rare false accepts are taken as those of their logarithm: a rate stays positive.
    relative = np.concatenate(changes) * (scale / np.maximum(accepts, 1.0))
    fars = accepts / scores.impostors * np.exp(np.clip(relative, -9.0, 9.0))
    return np.minimum(fars, 1.0), np.clip(tar + widening * (np.concatenate(tars) - tar), 0.0, 1.0)


def _excess_false_accepts(scores: Scores, thresholds: Floats) -> tuple[Floats, Floats]:
    """Each identity's false accepts less its share of them, (I, G), and all false accepts (G,), at each threshold."""
    people = scores.identities
    assert people is not None
    kept = np.flatnonzero(scores.impostor >= thresholds[-1])
    values = np.repeat(scores.impostor[kept], 2)
    excess = _per_identity(people.impostor[kept].ravel(), values, thresholds, people.count)
    np.cumsum(excess, axis=1, out=excess)
    accepts = excess.sum(axis=0) / 2
    excess -= people.impostor_pairs[:, None] * (accepts / scores.impostors)
    return excess, accepts


def _false_accept_variance(scores: Scores, thresholds: Floats) -> Floats:
    """The variance of the number of false accepts at each threshold, (G,)."""
    if scores.identities is None:
        accepts = np.array([scores.false_accepts(threshold) for threshold in thresholds], dtype=np.float64)
        return accepts * (1.0 - accepts / scores.impostors)
    excess, accepts = _excess_false_accepts(scores, thresholds)
    return np.square(_scale(excess, accepts, scores.impostors)) * np.square(excess).sum(axis=0)


def _scale(excess: Floats, accepts: Floats, impostors: int) -> Floats:
    """The factor (G,) that gives first-order changes the variance for pairs that share ends, and Student's widening."""
    first_order = np.square(excess).sum(axis=0)
    independent = accepts * (1.0 - accepts / impostors)
    wanted = np.maximum(first_order - independent, independent)
    return np.sqrt(wanted / np.where(first_order > 0, first_order, 1.0)) * _student_factor(excess)


def _student_factor(excess: Floats) -> Floats:
    """How much wider an interval is because a few of the identities (I, G) carry most of the variance: (G,).

    It is the 97.5 % point of Student's distribution over that of the normal one, for the degrees of freedom of the
    variance's estimate (Satterthwaite 1946), at least 4.
    """
    squares = np.square(excess)
    total = squares.sum(axis=0)
    concentration = np.square(squares).sum(axis=0) / np.where(total > 0, total, 1.0) ** 2 - 1.0 / len(excess)
    inverse = np.clip(concentration / 2.0, 0.0, 0.25)  # of the degrees of freedom
    return 1.0 + inverse * ((Z**2 + 1) / 4 + inverse * (5 * Z**4 + 16 * Z**2 + 3) / 96)


def _per_identity(of_identity: NDArray[np.int64], values: Floats, thresholds: Floats, count: int) -> Floats:
    """How many of an identity's values each threshold accepts that the one before does not: float64 (count, G)."""
    width = len(thresholds) + 1
    cells = of_identity * width + _first_accepting(values, thresholds)
    return np.bincount(cells, minlength=count * width).reshape(count, width)[:, :-1].astype(np.float64)


def _first_accepting(values: Floats, thresholds: Floats) -> NDArray[np.intp]:
    """The place of the highest threshold, of those (G,) that descend, at or below each value; G if there is none."""
    return np.searchsorted(-thresholds, -values, side="left")


def _above_rank(scores: Scores, ranks: NDArray[np.int64]) -> Floats:
    """The lowest thresholds that reject the impostor scores after the first `ranks`, counted from the largest."""
    ascending = scores.sorted_impostor
    below = len(ascending) - 1 - ranks
    return np.where(below < 0, -np.inf, np.nextafter(ascending[np.maximum(below, 0)], np.inf))


def _genuine_units(scores: Scores) -> int:
    people = scores.identities
    if people is None:
        return scores.genuine_pairs
    return len(np.unique(np.concatenate([people.genuine, people.failures])))


def _percentile(values: Floats, percent: float) -> float:
    return float(np.percentile(values, percent))


def _rate_figure(value: float, low: float, high: float, units: int, reason: str | None = None) -> Figure:
    """A rate with its interval, which includes the rate.

    Resamples know no error where there was none: of n independent units without one, the rate of errors lies below
    1 - 0.05^(1/n) with 95 % confidence ("rule of three").
    """
    bound = 1.0 - 0.05 ** (1.0 / units)
    if low == value == 1.0:
        low = 1.0 - bound
    if high == value == 0.0:
        high = bound
    return Figure(value, min(low, value), max(high, value), reason)
