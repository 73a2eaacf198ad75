"""What draws the scores of a benchmark: points of the ROC with 95 % bands, histograms, the calibration, hard pairs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from partialfc.evaluation.statistics.calibration import calibrate
from partialfc.evaluation.statistics.intervals import resampled_rates
from partialfc.evaluation.statistics.metrics import Scores

_POINTS = 64  # of a curve
_BINS = 48
_HARDEST = 6  # pairs of each kind


def curve_facts(scores: Scores) -> dict[str, Any]:
    """The curves of scores, as values that JSON can hold.

    Returns:
        "roc": "far", "tar", "low" and "high", lists of one length by ascending FAR; TAR is that of a threshold which
        accepts as many impostor pairs, and the ends are those of its 95 % interval at this FAR. "histogram": "edges",
        and the number of "genuine" and "impostor" pairs in each bin. "kept": the impostor pairs whose scores were kept,
        the largest. "calibration": "scale" and "offset" from score to natural log-likelihood ratio, None where scores
        of impostors are missing.
    """
    genuine, impostor = scores.sorted_genuine, scores.sorted_impostor
    ends = min([impostor[0], *genuine[:1]]), max([impostor[-1], *genuine[-1:]])
    edges = np.linspace(*(ends if ends[0] < ends[1] else (ends[0] - 0.01, ends[1] + 0.01)), _BINS + 1)
    counts = {name: np.histogram(kind, edges)[0] for name, kind in (("genuine", genuine), ("impostor", impostor))}
    is_calibrated = scores.complete and len(genuine) > 0
    return {
        "roc": {name: values.tolist() for name, values in _roc_points(scores).items()},
        "histogram": {"edges": edges.tolist()} | {name: count.tolist() for name, count in counts.items()},
        "kept": len(impostor),
        "calibration": asdict(calibrate(genuine, impostor)) if is_calibrated else None,
    }


def _roc_points(scores: Scores) -> dict[str, NDArray[np.float64]]:
    """The points of `curve_facts`, (K,) each."""
    impostor = scores.sorted_impostor
    last = len(impostor) if scores.complete else len(impostor) - 1
    accepts = np.unique(np.geomspace(1, max(last, 1), _POINTS).round().astype(np.int64))
    accepts = np.concatenate([[0], accepts[accepts <= last]])
    below = len(impostor) - 1 - accepts  # the largest impostor score that is rejected
    thresholds = np.where(below < 0, -np.inf, np.nextafter(impostor[np.maximum(below, 0)], np.inf))
    thresholds = np.unique(thresholds)[::-1]  # equal scores are accepted together
    far = np.array([scores.false_accepts(threshold) for threshold in thresholds]) / scores.impostors
    tar = np.array([scores.tar(threshold) for threshold in thresholds])
    fars, tars = resampled_rates(scores, thresholds)
    shown = far > 0
    resampled = np.array([np.interp(far[shown], one, of) for one, of in zip(fars, tars, strict=True)])
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    tar = tar[shown]
    return {"far": far[shown], "tar": tar, "low": np.minimum(low, tar), "high": np.maximum(high, tar)}


def hardest_pairs(scores: Scores) -> dict[str, list[dict[str, Any]]]:
    """The most similar pairs of two people, "impostor", and the least similar of one person, "genuine".

    Returns:
        "score" and "rows" of the features, of each pair, the hardest first; nothing where the rows are not known.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for name, values, rows, sign in (
        ("impostor", scores.impostor, scores.impostor_rows, -1),
        ("genuine", scores.genuine, scores.genuine_rows, 1),
    ):
        if rows is not None:
            order = np.argsort(sign * values, kind="stable")[:_HARDEST]
            found[name] = [{"score": float(values[at]), "rows": rows[at].tolist()} for at in order]
    return found
