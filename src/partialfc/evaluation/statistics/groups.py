"""Whether a common threshold serves all groups: FMR and FNMR of each, and figures of their differences.

A rate of zero says that a group has too few pairs to show an error, not that its errors are infinitely rarer than
another's: each function says what it makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from partialfc.core.errors import InputError
from partialfc.evaluation.statistics.figures import Figure
from partialfc.evaluation.statistics.intervals import fmr_at, fnmr_at
from partialfc.evaluation.statistics.metrics import Scores

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
    values = values / values.max()  # G has no scale; tiny rates would underflow below
    differences = np.abs(values[:, None] - values).sum()
    return float(count / (count - 1) * differences / (2 * count**2 * values.mean()))


def cross_group_fmr(
    accepted: NDArray[np.int64], groups: NDArray[np.int64], identities: NDArray[np.int64], count: int
) -> NDArray[np.float64]:
    """FMR between every two groups, and within each, where all pairs of the images were compared.

    Args:
        accepted: (A, 2), the images of each impostor pair at or above the threshold.
        groups: (N,), the group of each image, from 0 to `count` - 1; an image with -1 is left out.
        identities: (N,), from 0.
        count: G, the number of groups.

    Returns:
        float64 (G, G), symmetric; NaN where no pair was compared.
    """
    known = groups >= 0
    images = np.bincount(groups[known], minlength=count)
    # Pairs of one identity are no impostors, even if its images belong to different groups.
    cells, sizes = np.unique(identities[known] * count + groups[known], return_counts=True)
    of_identity = np.zeros((int(identities.max()) + 1, count), np.int64)
    of_identity[cells // count, cells % count] = sizes
    pairs = np.outer(images, images) - of_identity.T @ of_identity
    ends = np.sort(groups[accepted], axis=1)
    ends = ends[ends[:, 0] >= 0]
    errors = np.bincount(ends @ [count, 1], minlength=count * count).reshape(count, count)
    errors = errors + errors.T  # within a group, ordered pairs, as in `pairs`
    return np.where(pairs > 0, errors / np.maximum(pairs, 1), np.nan)
