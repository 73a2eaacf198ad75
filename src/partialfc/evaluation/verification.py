"""1:1 verification: the figures of any genuine and impostor scores, of groups and qualities, and of a list of pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from partialfc.core.errors import InputError
from partialfc.evaluation.statistics.calibration import cllr_figures
from partialfc.evaluation.statistics.figures import Figure, Result, rate_name
from partialfc.evaluation.statistics.groups import group_figures
from partialfc.evaluation.statistics.identities import components
from partialfc.evaluation.statistics.intervals import (
    auc_figure,
    eer_figure,
    fnmr_figure,
    interval_facts,
    tar_figure,
    why_unresolvable,
    wilson,
)
from partialfc.evaluation.statistics.metrics import Scores, allowed_false_accepts, threshold_at_far
from partialfc.evaluation.statistics.quality import discard_curve
from partialfc.model.features import Features

FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
FMR = 1e-3  # of the figure fnmr@fmr
SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)  # of the pairs, discarded by their quality
_FALSE_ACCEPTS = 10  # that a common threshold needs


def verification_figures(scores: Scores) -> dict[str, Figure]:
    """TAR at FAR 1e-6 to 1e-1, FNMR at FMR 1e-3, and where all scores are known EER, AUC, Cllr and min Cllr.

    Cllr is that of the affine calibration on the same pairs, the least that any affine map has.
    """
    figures = {f"tar@far={rate_name(far)}": tar_figure(scores, far) for far in FARS}
    figures[f"fnmr@fmr={rate_name(FMR)}"] = fnmr_figure(scores, FMR)
    if scores.complete and len(scores.genuine):
        figures |= {"eer": eer_figure(scores), "auc": auc_figure(scores)} | cllr_figures(scores)
    return figures


def common_threshold(scores: Scores) -> tuple[float, float] | None:
    """The smallest FMR of 1e-6 to 1e-1 that allows ten of the false accepts, and its threshold; None if none does."""
    for far in FARS:
        if allowed_false_accepts(far, scores.impostors) >= _FALSE_ACCEPTS and why_unresolvable(scores, far) is None:
            return far, threshold_at_far(scores, far)
    return None


def with_groups(result: Result, groups: Mapping[str, Scores]) -> Result:
    """The result, with the figures of its groups at the common threshold of all pairs, see `group_figures`."""
    point = common_threshold(result.scores[""])
    if len(groups) < 2 or point is None:
        return result
    note = f"fmr and fnmr of groups are at the threshold {point[1]:.4f}, set for FMR {rate_name(point[0])} over all."
    facts = {"groups_at": {"fmr": point[0], "cosine": point[1]}, "notes": [*result.facts.get("notes", ()), note]}
    return replace(result, figures=result.figures | group_figures(groups, point[1]), facts=result.facts | facts)


def with_quality(result: Result, features: Features, qualities: NDArray[np.float64] | None = None) -> Result:
    """The result, with the FNMR at the common threshold after the pairs of the lowest quality were discarded.

    The fact `quality` holds the curve. Without `qualities` (N,), higher is better, the norm of an embedding is its
    quality; embeddings that were stored with norm 1 have none.
    """
    scores, by = result.scores[""], "column" if qualities is not None else "norm"
    point = common_threshold(scores)
    if point is None or scores.genuine_rows is None or not len(scores.genuine):
        return result
    values = (features.norms() if qualities is None else qualities)[scores.genuine_rows]
    if by == "norm" and np.ptp(values) < 1e-3 * values.max():
        return result
    curve = discard_curve(scores.genuine, values, point[1])
    fnmr = [curve.fnmr_without(share) for share in SHARES]
    note = (
        f"Quality by {'the column quality' if by == 'column' else 'norm'}: without the worst 10% of the genuine pairs, "
        f"the FNMR at FMR {rate_name(point[0])} is {fnmr[SHARES.index(0.1)]:.2%} instead of {fnmr[0]:.2%}."
    )
    quality = {"by": by, "fmr": point[0], "cosine": point[1], "discarded": list(SHARES), "fnmr": fnmr}
    return replace(result, facts=result.facts | {"quality": quality, "notes": [*result.facts.get("notes", ()), note]})


def verification_facts(scores: Scores) -> dict[str, Any]:
    """Counts of the pairs, and how the intervals were made."""
    counts = {"genuine_pairs": scores.genuine_pairs, "impostor_pairs": scores.impostors, "failures": scores.failures}
    return counts | interval_facts(scores)


def failure_to_enrol(failed: NDArray[np.bool_]) -> dict[str, Figure]:
    """The share of images (N,) that could not be used, "fte"; without a failure, nothing."""
    return {"fte": wilson(float(failed.mean()), len(failed))} if failed.any() else {}


def verify_listed_pairs(features: Features, pairs: NDArray[np.int64], is_same: NDArray[np.bool_]) -> Result:
    """1:1 on pairs (P, 2) of rows of the features, and whether each shows one person, bool (P,).

    A genuine pair with an image that could not be used is a non-match. An impostor pair with one was not compared and
    does not count, so that failures never lower a FAR.

    Raises:
        InputError: all pairs are of one kind, or no impostor pair could be compared.
    """
    if is_same.all() or not is_same.any():
        raise InputError(f"All {len(is_same)} pairs are of one kind: give pairs of the same person and of two persons.")
    units = features.units().astype(np.float64)
    usable = ~features.failed[pairs].any(axis=1)
    values = np.einsum("ij,ij->i", units[pairs[:, 0]], units[pairs[:, 1]])
    identities = components(pairs, is_same)
    genuine, impostor, lost = is_same & usable, ~is_same & usable, is_same & ~usable
    scores = Scores(
        values[genuine],
        values[impostor],
        int(impostor.sum()),
        identities[genuine, 0],
        identities[impostor],
        failures=int(lost.sum()),
        failure_ids=identities[lost, 0],
        genuine_rows=pairs[genuine],
        impostor_rows=pairs[impostor],
    )
    figures = verification_figures(scores) | failure_to_enrol(features.failed)
    return with_quality(Result("pairs", figures, verification_facts(scores), {"": scores}), features)
