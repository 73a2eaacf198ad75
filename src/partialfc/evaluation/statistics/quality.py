"""Error against the share of pairs discarded: whether a quality tells the pairs that will be missed.

Grother and Tabassi 2007, Performance of biometric quality measures, IEEE TPAMI 29; ISO/IEC 29794-1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from partialfc.core.errors import InputError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class DiscardCurve:
    """FNMR at a fixed threshold after the pairs of the lowest quality were discarded.

    Attributes:
        discarded: (K,) shares of the genuine pairs, ascending from 0; a step a distinct quality.
        fnmr: (K,) of the pairs that remain.
    """

    discarded: Floats
    fnmr: Floats

    def fnmr_without(self, share: float) -> float:
        """FNMR after at most this share, from 0 up to 1, of the pairs was discarded."""
        return float(self.fnmr[np.searchsorted(self.discarded, share, side="right") - 1])

    def area(self, share: float = 1.0) -> float:
        """The mean FNMR over discarded shares from 0 to `share`: lower is better, FNMR itself tells nothing.

        Shares between two steps keep the FNMR of the lower; so do those beyond the last.
        """
        edges = np.append(self.discarded[self.discarded < share], share)
        return float(np.diff(edges) @ self.fnmr[: len(edges) - 1] / share)


def discard_curve(genuine: ArrayLike, qualities: ArrayLike, threshold: float) -> DiscardCurve:
    """The error-discard curve of genuine pairs.

    Args:
        genuine: scores (M,).
        qualities: (M, 2) of both images of each pair, higher is better: the pair has the lower of the two.
        threshold: a pair is matched if its score is at or above it.

    Raises:
        InputError: no pairs, or values that are not finite or do not fit each other.
    """
    scores, both = np.asarray(genuine, dtype=np.float64), np.asarray(qualities, dtype=np.float64)
    if scores.ndim != 1 or not len(scores) or both.shape != (len(scores), 2):
        raise InputError(f"The qualities have the shape {both.shape}: give two for each of {scores.size} pairs.")
    if not (np.isfinite(scores).all() and np.isfinite(both).all()):
        raise InputError("The scores or qualities hold NaN or infinity: leave such pairs out.")
    levels, places = np.unique(both.min(axis=1), return_inverse=True)
    pairs = np.bincount(places, minlength=len(levels))
    errors = np.bincount(places, scores < threshold, minlength=len(levels))
    remaining = pairs[::-1].cumsum()[::-1]
    return DiscardCurve(1.0 - remaining / len(scores), errors[::-1].cumsum()[::-1] / remaining)
