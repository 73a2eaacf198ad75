"""The section of a report about one benchmark of pairs: scores, operating points, and the hardest pairs."""

from __future__ import annotations

from html import escape

import numpy as np
from numpy.typing import NDArray

from partialfc.core.errors import InputError
from partialfc.data.images import data_uri
from partialfc.data.pair_files import PairSet
from partialfc.evaluation.pairs import PairResult
from partialfc.evaluation.statistics.metrics import roc
from partialfc.pages.axes import value_format
from partialfc.pages.plots import histogram, roc_chart
from partialfc.pages.template import definition_list

SHOWN_PAIRS = 6


def benchmark_section(name: str, result: PairResult, pairs: PairSet | None) -> str:
    """Histogram, ROC, figures, and the hardest of the `pairs`, if they are given.

    Raises:
        InputError: `pairs` are not those that were evaluated.
    """
    genuine, impostor = result.scores[result.is_same], result.scores[~result.is_same]
    curve = roc(genuine, impostor)
    threshold = result.cosine_threshold
    shown_rates = [rate for rate in result.tar_at_far if rate * len(impostor) >= 1]
    parts = [
        f"<h2>Benchmark: {escape(name)}</h2>",
        '<div class="grid wide">',
        '<figure class="card"><figcaption><b>Scores</b><span><i class="key genuine"></i>genuine'
        '<i class="key impostor"></i>impostor</span></figcaption>',
        histogram(genuine, impostor, threshold),
        '<div class="hint">How similar the model finds the two pictures of a pair: genuine pairs show one person, '
        "impostors two. The less the areas overlap, the better. Above the threshold, a pair is called "
        "&ldquo;same&rdquo;.</div></figure>",
        '<figure class="card"><figcaption><b>True accept rate (ROC)</b>'
        f"<span>area {result.auc:.4f}</span></figcaption>",
        roc_chart(curve.far, curve.tar, len(impostor), shown_rates),
        '<div class="hint">Share of genuine pairs that are accepted, when so many impostors may be accepted in error. '
        f"{len(impostor):,} impostor pairs measure no rate below 1 in {len(impostor):,}; dashed: chance."
        "</div></figure></div>",
        _figures(result, genuine, impostor),
    ]
    if pairs is not None:
        if len(pairs.is_same) != len(result.is_same) or not np.array_equal(pairs.is_same, result.is_same):
            raise InputError(
                f"The pictures given for {name} are not the pairs that were evaluated: give the same file for both."
            )
        parts.append(_hardest_pairs(result, pairs))
    return "\n".join(parts)


def hardest(result: PairResult, *, same: bool, count: int = SHOWN_PAIRS) -> NDArray[np.intp]:
    """Numbers of the pairs with the most misleading scores, the hardest first.

    Args:
        same: the least similar genuine pairs; otherwise the most similar impostors.
    """
    order = np.argsort(result.scores if same else -result.scores, kind="stable")
    return order[result.is_same[order] == same][:count]


def _figures(result: PairResult, genuine: NDArray[np.float64], impostor: NDArray[np.float64]) -> str:
    """The single numbers."""
    threshold = result.cosine_threshold
    missed, admitted = np.count_nonzero(genuine <= threshold), np.count_nonzero(impostor > threshold)
    facts = [
        ("Accuracy", f"{result.accuracy:.2%} ± {result.accuracy_std:.2%}"),
        ("Equal error rate", f"{result.equal_error_rate:.2%}"),
        *[(f"TAR at FAR {value_format(far)}", f"{tar:.2%}") for far, tar in result.tar_at_far.items()],
        ("Genuine pairs rejected", f"{missed:,} of {len(genuine):,}"),
        ("Impostors accepted", f"{admitted:,} of {len(impostor):,}"),
        ("Threshold (cosine)", f"{threshold:.3f}"),
    ]
    return f'<div class="card figures">{definition_list(facts)}</div>'


def _hardest_pairs(result: PairResult, pairs: PairSet) -> str:
    parts = []
    for same, title, mistake in (
        (False, "Most similar impostors (two people)", "accepted"),
        (True, "Least similar genuine pairs (one person)", "rejected"),
    ):
        parts.append(f'<h3>{title}</h3><div class="faces">')
        for number in hardest(result, same=same):
            score = float(result.scores[number])
            wrong = (score > result.cosine_threshold) != same
            decision = f'<span class="wrong">wrongly {mistake}</span>' if wrong else "decided rightly"
            images = "".join(
                f'<img src="{data_uri(pairs.images[2 * number + side])}" alt="pair {number}, {which} picture">'
                for side, which in enumerate(("first", "second"))
            )
            parts.append(
                f'<figure><div class="two">{images}</div>cosine {score:.3f}, {decision}<br>'
                f'<span class="soft">pair {number}</span></figure>'
            )
        parts.append("</div>")
    return "".join(parts)
