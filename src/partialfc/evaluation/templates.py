"""IJB-B and IJB-C 1:1: features of faces are joined to those of templates, and pairs of templates are compared."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from partialfc.core.errors import InputError
from partialfc.data.ijb_files import FACES, FaceList, Integers, Members, TemplatePairs
from partialfc.evaluation.statistics.figures import Figure, Result, rate_name
from partialfc.evaluation.statistics.identities import components
from partialfc.evaluation.statistics.intervals import interval_facts, tar_figure
from partialfc.evaluation.statistics.metrics import Scores, allowed_false_accepts

FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_FACES_AT_A_TIME = 512
_TEMPLATES_AT_A_TIME = 512
_TABLE = 1 << 24  # numbers of templates below it are looked up, larger ones are searched
_TAIL = 1.2  # kept impostors over those that the largest FAR accepts: resamples may accept more


def template_features(
    features: NDArray[np.floating], faces: FaceList, members: Members
) -> tuple[Integers, NDArray[np.float32]]:
    """One unit vector for each template, from one feature for each face.

    A feature, f(x) + f(flip x) and not normalised, is multiplied by the detector score of its face; the mean is taken
    within each media of a template, the sum over the media, and the sum is scaled to length 1 (a sum of zero stays).
    Sums are in float64.

    Args:
        features: (N, D) in the order of `faces`; a memory map is read in blocks.
        faces: the N faces.
        members: which face belongs to which template and media.

    Returns:
        The numbers of the T templates, ascending, and float32 (T, D).

    Raises:
        InputError: there are not N features, or one of them is not finite.
    """
    if features.ndim != 2 or len(features) != len(faces.names):
        raise InputError(
            f"The features have the shape {features.shape}, but {FACES} lists {len(faces.names):,} images: give a row "
            f"for each, in the same order."
        )
    templates, of_face = np.unique(members.templates, return_inverse=True)
    media, media_of_face = np.unique(members.media, return_inverse=True)
    _, group, sizes = np.unique(of_face * len(media) + media_of_face, return_inverse=True, return_counts=True)
    weights = faces.detector_scores[members.faces] / sizes[group]  # a mean within a media is a weighted sum
    order = np.argsort(of_face, kind="stable")
    sums = np.zeros((len(templates), features.shape[1]))
    for start in range(0, len(order), _FACES_AT_A_TIME):
        lines = order[start : start + _FACES_AT_A_TIME]
        block = features[members.faces[lines]] * weights[lines, None]
        first = np.flatnonzero(np.diff(of_face[lines], prepend=-1))
        sums[of_face[lines[first]]] += np.add.reduceat(block, first, axis=0)
    if not np.isfinite(sums).all():
        raise _not_finite(features, faces, members)
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    return templates, (sums / np.where(norms > 0, norms, 1.0)).astype(np.float32)


def _not_finite(features: NDArray[np.floating], faces: FaceList, members: Members) -> InputError:
    used = np.unique(members.faces)
    bad = [row for row in used if not np.isfinite(features[row]).all()]
    return InputError(
        f"{len(bad)} of {len(features):,} features hold NaN or infinity, first that of image {faces.names[bad[0]]}: "
        f"embed the faces again, with a model that has not diverged."
    )


def rows_of(templates: Integers, wanted: NDArray[np.integer], source: str) -> Integers:
    """The rows of the templates numbered `wanted` in `templates`, ascending.

    Raises:
        InputError: a wanted template has no faces; `source` says what names it.
    """
    if templates[-1] < _TABLE and wanted.min() >= 0:  # a table is ten times faster than a search
        table = np.zeros(_TABLE, np.int32)
        table[templates] = np.arange(len(templates))
        rows = table[np.minimum(wanted, _TABLE - 1)]
    else:
        rows = np.minimum(np.searchsorted(templates, wanted), len(templates) - 1)
    unknown = templates[rows] != wanted
    if unknown.any():
        raise InputError(
            f"{source} names template {wanted[np.argmax(unknown)]}, of which there is no image: its file belongs to "
            f"another set, or lines of *_face_tid_mid.txt are missing."
        )
    return rows


def pair_scores(units: NDArray[np.float32], left: Integers, right: Integers) -> NDArray[np.float32]:
    """The similarity of pairs of rows: the dot product in float64, rounded to float32.

    Blocks of rows are multiplied by all their partners, and the pairs are picked from the products. With many pairs for
    each row, as in IJB, this is several times faster than fetching two rows for each pair.

    Args:
        units: (T, D) unit rows.
        left, right: (P,) rows of each pair.

    Returns:
        float32 (P,).
    """
    scores = np.empty(len(left), np.float32)
    distinct = [np.count_nonzero(np.bincount(side)) for side in (left, right)]
    if 2 * distinct[0] * distinct[1] > len(units) ** 2:  # then half of all products is less
        left, right = np.minimum(left, right), np.maximum(left, right)
    rows, left = _distinct(left, len(units))
    blocks = left // _TEMPLATES_AT_A_TIME
    order = np.argsort(blocks.astype(np.min_scalar_type(len(units))), kind="stable")
    ends = np.cumsum(np.bincount(blocks, minlength=1))
    for block, (start, stop) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        pairs = order[start:stop]
        first = block * _TEMPLATES_AT_A_TIME
        partners, position = _distinct(right[pairs], len(units))
        products = units[rows[first : first + _TEMPLATES_AT_A_TIME]].astype(np.float64) @ units[partners].T.astype(
            float
        )
        scores[pairs] = products[left[pairs] - first, position]
    return scores


def _distinct(rows: Integers, count: int) -> tuple[Integers, Integers]:
    """The distinct of `rows`, all below `count`, and the position of each row among them; without sorting."""
    seen = np.zeros(count, bool)
    seen[rows] = True
    return np.flatnonzero(seen), (np.cumsum(seen) - 1)[rows]


def verify_templates(
    templates: Integers, units: NDArray[np.float32], pairs: TemplatePairs, *, compat: bool = False
) -> Result:
    """IJB-B and IJB-C 1:1: TAR at FAR 1e-6 to 1e-1.

    Args:
        templates: (T,) numbers of the templates, ascending.
        units: (T, D) of `template_features`.
        pairs: the pairs to compare.
        compat: read the curve at the nearest FAR, which may exceed the target, as the public script of insightface
            does; these figures have no intervals. Otherwise the highest TAR whose FAR does not exceed the target.

    Raises:
        InputError: a pair names an unknown template, or all pairs are of one kind.
    """
    left, right = (rows_of(templates, side, "A pair") for side in (pairs.left, pairs.right))
    same = pairs.is_same
    genuine = int(np.count_nonzero(same))
    if genuine in (0, len(same)):
        raise InputError(f"All {len(same):,} pairs are of one kind: give pairs of the same person and of two persons.")
    scores = pair_scores(units, left, right)
    facts: dict[str, Any] = {
        "templates": len(templates),
        "pairs": len(same),
        "genuine": genuine,
        "impostors": len(same) - genuine,
    }
    if compat:
        figures, read = nearest_far(scores, same)
        return Result("ijb-1:1", figures, {**facts, "reading": "nearest FAR, as insightface", "far_read": read})
    measured = _scores(scores, left, right, same)
    figures = {f"tar@far={rate_name(far)}": tar_figure(measured, far) for far in FARS}
    facts["reading"] = "highest TAR whose FAR does not exceed the target"
    return Result("ijb-1:1", figures, facts | interval_facts(measured), {"": measured})


def _scores(scores: NDArray[np.float32], left: Integers, right: Integers, is_same: NDArray[np.bool_]) -> Scores:
    """The genuine scores and the upper tail of the impostors, with identities made of the genuine pairs."""
    impostors = np.flatnonzero(~is_same)
    kept = min(len(impostors), int(_TAIL * allowed_false_accepts(max(FARS), len(impostors))) + 1)
    tail = impostors[np.argpartition(scores[impostors], len(impostors) - kept)[-kept:]]
    genuine = np.flatnonzero(is_same)
    pairs = np.concatenate([genuine, tail])
    identities = components(np.stack([left[pairs], right[pairs]], axis=1), is_same[pairs])
    return Scores(
        scores[genuine].astype(np.float64),
        scores[tail].astype(np.float64),
        len(impostors),
        identities[: len(genuine), 0],
        identities[len(genuine) :],
    )


def nearest_far(scores: NDArray[np.floating], is_same: NDArray[np.bool_]) -> tuple[dict[str, Figure], dict[str, float]]:
    """TAR at the FAR nearest to each target: what the public script of insightface reads.

    The points are those of scikit-learn's roc_curve, which leaves out points on straight lines; of two FARs equally
    near the larger is taken, of equal FARs the highest TAR.

    Args:
        scores: (P,).
        is_same: (P,), with both kinds of pairs.

    Returns:
        The figures, and the FAR at which each was read, by the name of the target.
    """
    descending = np.sort(scores)[::-1]
    last = np.append(np.flatnonzero(descending[1:] != descending[:-1]), len(scores) - 1)  # of each run of equal scores
    level = np.searchsorted(-descending[last], -scores[is_same])
    true = np.cumsum(np.bincount(level, minlength=len(last)))
    false = last + 1 - true
    if len(last) > 2:
        bends = (np.diff(true, 2) != 0) | (np.diff(false, 2) != 0)
        corners = np.flatnonzero(np.concatenate([[True], bends, [True]]))
        true, false = true[corners], false[corners]
    far = np.append(0, false)[::-1] / false[-1]
    tar = np.append(0, true)[::-1] / true[-1]
    points = {rate_name(target): int(np.argmin(np.abs(far - target))) for target in FARS}
    figures = {f"tar@far={name}": Figure(float(tar[point])) for name, point in points.items()}
    return figures, {name: float(far[point]) for name, point in points.items()}
