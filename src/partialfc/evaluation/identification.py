"""1:N: probes are searched in a gallery, closed set (ranks) and open set (TPIR at FPIR).

A probe is mated if its identity is in the gallery. FPIR is the share of the non-mated probes of which some candidate
scores at or above the threshold; TPIR is the share of the mated probes whose own identity is the best candidate, at or
above the threshold. As everywhere, TPIR at a FPIR is the highest over all thresholds whose FPIR does not exceed it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from partialfc.core.errors import InputError
from partialfc.data.ijb_files import Integers
from partialfc.evaluation.statistics.figures import Figure, Result, rate_name
from partialfc.evaluation.statistics.intervals import fnmr_at, tar_figure
from partialfc.evaluation.statistics.metrics import Scores, is_resolvable
from partialfc.evaluation.templates import rows_of
from partialfc.evaluation.verification import failure_to_enrol
from partialfc.model.features import Features

RANKS = (1, 5, 10)
FPIRS = (0.01, 0.1)
_ROWS_AT_A_TIME = 2048  # of probes and of gallery: 32 MiB of products
_MISS = -2.0  # below every cosine
_INTERVAL = "identities; of an average, the galleries are taken as independent"
_NO_MATES = "No probe shows a person of the gallery."


def identify(
    gallery_units: NDArray[np.float32],
    gallery_ids: Integers,
    probe_units: NDArray[np.float32],
    probe_ids: Integers,
    failures: int = 0,
) -> dict[str, Figure]:
    """rank-1, rank-5, rank-10, tpir@fpir=0.01 and tpir@fpir=0.1 of one gallery.

    Distractors, as those of MegaFace, are rows of the gallery with identities that no probe has.

    Args:
        gallery_units: (G, D) unit rows; an identity with several counts with the best of them.
        gallery_ids: (G,) identity of each row.
        probe_units: (Q, D) unit rows.
        probe_ids: (Q,) identity of each probe; one that the gallery lacks makes the probe non-mated.
        failures: mated probes beyond the Q that could not be enrolled, or whose person could not be enrolled in the
            gallery: misses without candidates.

    Returns:
        The figures by name; those of ranks are null without mated probes, those of FPIR too few non-mated probes.

    Raises:
        InputError: the gallery is empty.
    """
    if not len(gallery_ids):
        raise InputError("The gallery is empty: give at least one person to find.")
    ranks, best = search(gallery_units, gallery_ids, probe_units, probe_ids)
    mated, others = ranks > 0, int(np.count_nonzero(ranks == 0))
    found = ranks[mated], probe_ids[mated], failures
    figures = {f"rank-{k}": _share_within(*found, k) for k in RANKS}
    for fpir in FPIRS:
        name = f"tpir@fpir={rate_name(fpir)}"
        if not len(found[0]) + failures:
            figures[name] = Figure(None, reason=_NO_MATES)
        elif not is_resolvable(fpir, others):
            figures[name] = Figure(
                None, reason=f"{others:,} non-mated probes cannot resolve a rate of {rate_name(fpir)}."
            )
        else:
            figures[name] = tar_figure(_open_set(ranks, best, probe_ids, failures), fpir)
    return figures


def _share_within(ranks: Integers, ids: Integers, failures: int, k: int) -> Figure:
    """The share of the mated probes that are found at rank k or better: with the score -rank, those accepted at -k."""
    if not len(ranks) + failures:
        return Figure(None, reason=_NO_MATES)
    unused = np.array([-1])  # Scores has an impostor, which the misses at a given threshold do not depend on
    scores = Scores(
        -ranks.astype(np.float64), unused.astype(np.float64), 1, ids, unused[:, None].repeat(2, 1), failures
    )
    misses = fnmr_at(scores, -k)
    assert misses.value is not None
    assert misses.low is not None
    assert misses.high is not None
    return Figure(1.0 - misses.value, 1.0 - misses.high, 1.0 - misses.low)


def _open_set(ranks: Integers, best: NDArray[np.float32], ids: Integers, failures: int) -> Scores:
    """Scores whose TAR at FAR is TPIR at FPIR: the best candidates', and of mated probes only where it is right."""
    mated = ranks > 0
    return Scores(
        np.where(ranks == 1, best, _MISS)[mated].astype(np.float64),
        best[~mated].astype(np.float64),
        int(np.count_nonzero(~mated)),
        ids[mated],
        ids[~mated, None].repeat(2, axis=1),
        failures,
    )


def search(
    gallery_units: NDArray[np.float32], gallery_ids: Integers, probe_units: NDArray[np.float32], probe_ids: Integers
) -> tuple[Integers, NDArray[np.float32]]:
    """The rank of each probe's own identity, and the score of its best candidate.

    An identity scores as its best row. The rank counts the other identities that score as much or more, so that equal
    scores never help. Similarities are dot products in float64, rounded to float32; only blocks of them are in memory.

    Args:
        gallery_units, gallery_ids, probe_units, probe_ids: see `identify`.

    Returns:
        int64 (Q,), from 1, and 0 for a non-mated probe; float32 (Q,).
    """
    order = np.argsort(gallery_ids, kind="stable")
    identities, starts = np.unique(gallery_ids[order], return_index=True)
    own = np.minimum(np.searchsorted(identities, probe_ids), len(identities) - 1)
    mated = identities[own] == probe_ids
    ranks, best = mated.astype(np.int64), np.full(len(probe_ids), -np.inf, np.float32)
    bounds = np.append(starts, len(order))
    cuts = np.searchsorted(starts, np.arange(0, len(order), _ROWS_AT_A_TIME))  # between two identities
    cuts = np.unique(np.append(cuts, len(identities)))
    for first in range(0, len(probe_ids), _ROWS_AT_A_TIME):
        rows = slice(first, first + _ROWS_AT_A_TIME)
        probes = probe_units[rows].astype(np.float64)
        own_scores = np.array(
            [
                (gallery_units[order[bounds[identity] : bounds[identity + 1]]].astype(np.float64) @ probe).max()
                for identity, probe in zip(own[rows], probes, strict=True)
            ],
            np.float32,
        )
        for start, stop in pairwise(cuts):
            gallery = gallery_units[order[bounds[start] : bounds[stop]]].astype(np.float64)
            products = (probes @ gallery.T).astype(np.float32)
            scores = np.maximum.reduceat(products, starts[start:stop] - starts[start], axis=1)
            ahead = scores >= own_scores[:, None]
            here = (own[rows] >= start) & (own[rows] < stop)
            ahead[here, own[rows][here] - start] = False
            ranks[rows] += mated[rows] * ahead.sum(axis=1)
            best[rows] = np.maximum(best[rows], scores.max(axis=1))
    return ranks, best


def identify_templates(
    templates: Integers,
    units: NDArray[np.float32],
    galleries: dict[str, dict[int, int]],
    probes: dict[int, int],
) -> Result:
    """IJB-B and IJB-C 1:N: each gallery is searched on its own, and the figures are the averages over the galleries.

    Args:
        templates: (T,) numbers of the templates, ascending.
        units: (T, D) of `template_features`.
        galleries: from template to subject, by the name of the gallery, see `read_galleries`.
        probes: from template to subject.

    Returns:
        The figures; the facts hold those of each gallery. The interval of an average takes the galleries as
        independent, since their persons are distinct.

    Raises:
        InputError: a gallery or the probes name an unknown template.
    """
    probe_units, probe_ids = _enrolled(templates, units, probes, "The list of probes")
    each: dict[str, dict[str, Figure]] = {}
    facts: dict[str, Any] = {}
    for name, gallery in galleries.items():
        gallery_units, gallery_ids = _enrolled(templates, units, gallery, f"Gallery {name}")
        each[name] = identify(gallery_units, gallery_ids, probe_units, probe_ids)
        facts[name] = {
            "templates": len(gallery),
            "mated": int(np.isin(probe_ids, gallery_ids).sum()),
            "non_mated": int(np.isin(probe_ids, gallery_ids, invert=True).sum()),
            "figures": {figure: value.to_dict() for figure, value in each[name].items()},
        }
    figures = {name: _average([of_gallery[name] for of_gallery in each.values()]) for name in next(iter(each.values()))}
    return Result("ijb-1:n", figures, {"probes": len(probes), "interval": _INTERVAL, "galleries": facts})


def _enrolled(
    templates: Integers, units: NDArray[np.float32], subjects: dict[int, int], source: str
) -> tuple[NDArray[np.float32], Integers]:
    """The unit rows and the subjects of the templates in a list."""
    numbers, ids = np.array(list(subjects.items()), dtype=np.int64).T
    return units[rows_of(templates, numbers, source)], ids


def _average(figures: Sequence[Figure]) -> Figure:
    """The mean of independent figures; the half-widths of their intervals add as the root of the sum of squares."""
    missing = next((figure for figure in figures if figure.value is None), None)
    if missing is not None:
        return missing
    values, lows, highs = np.array([(figure.value, figure.low, figure.high) for figure in figures], dtype=np.float64).T
    mean = float(values.mean())
    below, above = (float(np.linalg.norm(values - ends) / len(values)) for ends in (lows, highs))
    return Figure(mean, max(0.0, mean - below), min(1.0, mean + above))


def evaluate_gallery(features: Features, identities: Integers, in_gallery: NDArray[np.bool_]) -> Result:
    """1:N on one's own people.

    An image that could not be used is a failure to enrol. A probe is mated if its identity has images of the gallery,
    even if none of them could be used; it is then a miss without candidates, as is a mated probe that could not be
    used. A non-mated probe that could not be used was not searched and does not count.

    Args:
        identities: (N,) of each row of the features.
        in_gallery: bool (N,), whether a row belongs to the gallery; the others are probes.

    Raises:
        InputError: no image of the gallery could be used.
    """
    units, usable = features.units(), ~features.failed
    mated = np.isin(identities, identities[in_gallery]) & ~in_gallery
    gallery = in_gallery & usable
    if not gallery.any():
        raise InputError("None of the images of the gallery could be read: give images that Pillow reads.")
    findable = np.isin(identities, identities[gallery])
    searched = ~in_gallery & usable & (findable | ~mated)
    lost = mated & ~searched
    figures = identify(units[gallery], identities[gallery], units[searched], identities[searched], int(lost.sum()))
    facts = {
        "gallery": {"images": int(in_gallery.sum()), "identities": len(np.unique(identities[in_gallery]))},
        "mated": int(mated.sum()),
        "non_mated": int((~in_gallery & ~mated).sum()),
        "failures": int(features.failed.sum()),
    }
    return Result("1:n", figures | failure_to_enrol(features.failed), facts)
