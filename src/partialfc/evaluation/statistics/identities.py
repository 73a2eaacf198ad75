"""Who is in a pair: identities in compact numbers, and identities made of genuine pairs where none are named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]

_TABLE = 1 << 24  # identities below it are looked up in a table; larger ones are sorted


@dataclass(frozen=True)
class Identities:
    """The identities of all pairs, numbered from 0.

    Attributes:
        count: the number of identities, I.
        genuine: int64 (M,).
        impostor: int64 (K, 2).
        failures: int64 (F,); a failure without a known identity has one of its own.
        impostor_pairs: float64 (I,), in how many impostor pairs an identity takes part, kept or not.
        source: how `impostor_pairs` is known: "closed form" from the images of each identity where all pairs were
            scanned, "counted" where all pairs are there, or "equal share" as an approximation.
    """

    count: int
    genuine: Ids
    impostor: Ids
    failures: Ids
    impostor_pairs: Floats
    source: str


def number_identities(
    genuine: Ids, impostor: Ids, impostors: int, failures: int | Ids = 0, scanned: tuple[Ids, Ids] | None = None
) -> Identities:
    """Compact numbers for the identities of the pairs; see `Scores` for the arguments.

    Args:
        failures: the identities of the failures, or how many there are.
    """
    named = np.empty(0, dtype=np.int64) if isinstance(failures, int) else failures
    count, (own, pairs, failed, left, right) = _compact([genuine, impostor, named, *(scanned or (named, named))])
    known = count
    if isinstance(failures, int):
        failed = np.arange(known, known + failures)
        count += failures
    if scanned is not None:
        lefts, rights = np.bincount(left, minlength=count), np.bincount(right, minlength=count)
        per_identity = lefts * (rights.sum() - rights).astype(np.float64) + rights * (lefts.sum() - lefts)
        source = "closed form"
    elif len(impostor) == impostors:
        per_identity, source = np.bincount(pairs.ravel(), minlength=count).astype(np.float64), "counted"
    else:
        per_identity, source = np.where(np.arange(count) < known, 1.0, 0.0), "equal share"
    # Ordered pairs are counted twice: a pair has two ends.
    per_identity *= 2 * impostors / max(per_identity.sum(), 1.0)
    return Identities(count, own, pairs, failed, per_identity, source)


def components(pairs: ArrayLike, is_same: ArrayLike) -> Ids:
    """Identities where none are named: what genuine pairs connect, directly or through others, is one person.

    This is an approximation: a person whose templates no chain of genuine pairs connects counts as several.

    Args:
        pairs: (P, 2), numbers of the two compared templates.
        is_same: bool (P,).

    Returns:
        int64 (P, 2), the identity of each side of each pair.
    """
    nodes, (codes,) = _compact([np.asarray(pairs, dtype=np.int64)])
    left, right = codes[np.asarray(is_same, dtype=bool)].T
    root = np.arange(nodes)
    while True:
        ends = root[left], root[right]
        low, high = np.minimum(*ends), np.maximum(*ends)
        if (low == high).all():
            return root[codes]
        np.minimum.at(root, high, low)  # the larger root is linked to the smallest of its neighbours
        while (root != root[root]).any():
            root = root[root]


def _compact(arrays: Sequence[Ids]) -> tuple[int, list[Ids]]:
    """The number of distinct values, and each array with the ranks of its values in place of them."""
    bounds = [bound for array in arrays if array.size for bound in (array.min(), array.max())]
    if bounds and (min(bounds) < 0 or max(bounds) >= _TABLE):
        values = np.unique(np.concatenate([np.unique(array) for array in arrays]))
        return len(values), [np.searchsorted(values, array) for array in arrays]
    present = np.zeros(max(bounds, default=-1) + 1, dtype=bool)
    for array in arrays:
        present[array] = True
    ranks = np.cumsum(present) - 1
    return int(np.count_nonzero(present)), [ranks[array] for array in arrays]
