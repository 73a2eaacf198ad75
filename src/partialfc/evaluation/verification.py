"""1:1 verification: the figures of any set of genuine and impostor scores, and those of a list of pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from partialfc.core.errors import InputError
from partialfc.evaluation.calibration import calibrate, cllr, min_cllr
from partialfc.evaluation.figures import Figure, Result, rate_name
from partialfc.evaluation.identities import components
from partialfc.evaluation.intervals import auc_figure, eer_figure, interval_facts, tar_figure, wilson
from partialfc.evaluation.metrics import Scores
from partialfc.model.features import Features

FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def verification_figures(scores: Scores) -> dict[str, Figure]:
    """TAR at FAR 1e-6 to 1e-1, and where all scores are known EER, AUC, Cllr and min Cllr.

    Cllr is that of the affine calibration on the same pairs, the least that any affine map has.
    """
    figures = {f"tar@far={rate_name(far)}": tar_figure(scores, far) for far in FARS}
    if scores.complete and len(scores.genuine):
        calibration = calibrate(scores.genuine, scores.impostor)
        figures |= {
            "eer": eer_figure(scores),
            "auc": auc_figure(scores),
            "cllr": Figure(cllr(calibration(scores.genuine), calibration(scores.impostor))),
            "min-cllr": Figure(min_cllr(scores.genuine, scores.impostor)),
        }
    return figures


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
    )
    figures = verification_figures(scores) | failure_to_enrol(features.failed)
    return Result("pairs", figures, verification_facts(scores), {"": scores})
