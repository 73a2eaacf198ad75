"""Whether a common threshold serves all groups: FMR and FNMR of each, and figures of their differences.

A rate of zero says that a group has too few pairs to show an error, not that its errors are infinitely rarer than
another's: each function says what it makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from partialfc.core.errors import InputError
from partialfc.evaluation.figures import Figure
from partialfc.evaluation.intervals import fmr_at, fnmr_at
from partialfc.evaluation.metrics import Scores

ALPHA = 0.5  # the weight of FMR beside FNMR in FDR and GARBE


def group_figures(groups: Mapping[str, Scores], threshold: float) -> dict[str, Figure]:
    """FMR and FNMR of each group at one threshold, and the figures of their inequality.

    Args:
        groups: the scores of the pairs within each group, by its name.
        threshold: common to all.

    Returns:
        `GROUP/fmr` and `GROUP/fnmr` with intervals; with two groups or more also `fmr-max-min`, `fmr-max-mean`,
        `fnmr-max-min`, `fnmr-max-mean` (`max_min_ratio`, `max_mean_ratio`), `fdr` and `garbe`.
    """
    figures: dict[str, Figure] = {}
    for group, scores in groups.items():
        figures[f"{group}/fmr"], figures[f"{group}/fnmr"] = fmr_at(scores, threshold), fnmr_at(scores, threshold)
    rates = {name: [figures[f"{group}/{name}"].value for group in groups] for name in ("fmr", "fnmr")}
    known = {name: [rate for rate in of_groups if rate is not None] for name, of_groups in rates.items()}
    if len(groups) < 2:
        return figures
    if len(known["fmr"]) < len(groups):
        unknown = Figure(None, reason="The FMR of a group is not known at the common threshold.")
        return {**figures, "fmr-max-min": unknown, "fmr-max-mean": unknown, "fdr": unknown, "garbe": unknown}
    for name, of_groups in known.items():
        figures[f"{name}-max-min"] = max_min_ratio(of_groups)
        figures[f"{name}-max-mean"] = max_mean_ratio(of_groups)
    figures["fdr"] = Figure(fairness_discrepancy_rate(known["fmr"], known["fnmr"]))
    figures["garbe"] = Figure(garbe(known["fmr"], known["fnmr"]))
    return figures


def max_min_ratio(rates: Sequence[float]) -> Figure:
    """The largest rate of a group over the smallest (NIST IR 8429). Null if a rate is zero."""
    if min(rates) <= 0.0:
        return Figure(None, reason="A group without errors has no ratio to the others.")
    return Figure(max(rates) / min(rates))


def max_mean_ratio(rates: Sequence[float]) -> Figure:
    """The largest rate of a group over the geometric mean of all (NIST IR 8429). Null if a rate is zero."""
    if min(rates) <= 0.0:
        return Figure(None, reason="A group without errors has no ratio to the others.")
    return Figure(max(rates) / float(np.exp(np.mean(np.log(rates)))))


def fairness_discrepancy_rate(fmr: Sequence[float], fnmr: Sequence[float], alpha: float = ALPHA) -> float:
    """FDR = 1 - (α max |FMR_i - FMR_j| + (1 - α) max |FNMR_i - FNMR_j|): 1 if all groups are alike.

    De Freitas Pereira and Marcel 2021, Fairness in biometrics. A rate of zero is a rate like any other. Differences are
    absolute: at low FMR the figure hardly sees it.
    """
    return 1.0 - (alpha * (max(fmr) - min(fmr)) + (1.0 - alpha) * (max(fnmr) - min(fnmr)))


def garbe(fmr: Sequence[float], fnmr: Sequence[float], alpha: float = ALPHA) -> float:
    """GARBE = α G(FMR) + (1 - α) G(FNMR) with the Gini coefficient G: 0 if all groups are alike, at most 1.

    Howard et al. 2022, Evaluating proposed fairness models for face recognition algorithms. A rate of zero is a rate
    like any other; if all are zero, G is 0.
    """
    return alpha * gini(fmr) + (1.0 - alpha) * gini(fnmr)


def gini(rates: Sequence[float]) -> float:
    """G(x) = n / (n - 1) · Σ_i Σ_j |x_i - x_j| / (2 n² mean(x)), of at least two rates; 0 if all are zero.

    Raises:
        InputError: fewer than two rates.
    """
    values, count = np.asarray(rates, dtype=np.float64), len(rates)
    if count < 2:
        raise InputError(f"{count} group has no inequality: give at least two groups.")
    if not values.any():
        return 0.0
    differences = np.abs(values[:, None] - values).sum()
    return float(count / (count - 1) * differences / (2 * count**2 * values.mean()))


def cross_group_fmr(impostor: ArrayLike, groups: ArrayLike, pairs: ArrayLike, threshold: float) -> NDArray[np.float64]:
    """FMR of the impostor pairs between every two groups, and within each, at one threshold.

    Args:
        impostor: scores (K,), all or a tail that reaches below the threshold.
        groups: int (K, 2), the groups, from 0 to G - 1, of the two images of each pair.
        pairs: int (G, G), symmetric: how many impostor pairs were compared of any two groups.
        threshold: common to all.

    Returns:
        float64 (G, G), symmetric; NaN where no pair was compared.

    Raises:
        InputError: more false accepts of two groups than pairs, or `pairs` is not symmetric.
    """
    totals = np.asarray(pairs, dtype=np.int64)
    if totals.ndim != 2 or not np.array_equal(totals, totals.T):
        raise InputError("The numbers of pairs of any two groups must be a symmetric matrix: count both orders as one.")
    accepted = np.sort(np.asarray(groups, dtype=np.int64)[np.asarray(impostor, dtype=np.float64) >= threshold], axis=1)
    upper = np.bincount(accepted @ [len(totals), 1], minlength=totals.size).reshape(totals.shape)
    counts = upper + np.triu(upper, 1).T
    if (counts > totals).any():
        raise InputError("Two groups have more false accepts than impostor pairs: count all pairs that were compared.")
    return np.where(totals > 0, counts / np.maximum(totals, 1), np.nan)
