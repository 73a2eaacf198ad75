"""Figures of groups against their definitions in loops, and at rates of zero."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partialfc.core.errors import InputError
from partialfc.evaluation.statistics.groups import (
    cross_group_fmr,
    fairness_discrepancy_rate,
    garbe,
    gini,
    group_figures,
    max_mean_ratio,
    max_min_ratio,
)
from partialfc.evaluation.statistics.metrics import Scores

rates = st.lists(st.floats(0, 1).map(lambda rate: round(rate, 9)), min_size=2, max_size=8)


def group(seed: int, shift: float = 0.0) -> Scores:
    generator = np.random.default_rng(seed)
    return Scores(generator.normal(2 + shift, 1, 200), generator.normal(shift, 1, 800), 800)


@given(fmr=rates, fnmr=rates)
@settings(max_examples=100, deadline=None)
def test_fdr_and_garbe_equal_their_definitions(fmr: list[float], fnmr: list[float]) -> None:
    def coefficient(values: list[float]) -> float:
        count, mean = len(values), sum(values) / len(values)
        total = sum(abs(a - b) for a in values for b in values)
        return count / (count - 1) * total / (2 * count**2 * mean) if mean else 0.0

    assert garbe(fmr, fnmr) == pytest.approx((coefficient(fmr) + coefficient(fnmr)) / 2, abs=1e-9)
    assert -1e-9 <= garbe(fmr, fnmr) <= 1 + 1e-9
    gaps = [max(abs(a - b) for a in values for b in values) for values in (fmr, fnmr)]
    assert fairness_discrepancy_rate(fmr, fnmr, 0.25) == pytest.approx(1 - 0.25 * gaps[0] - 0.75 * gaps[1])


def test_rates_of_zero() -> None:
    assert gini([0.0, 0.0]) == 0.0
    assert gini([0.0, 0.0, 0.3]) == pytest.approx(1.0)
    assert gini([0.0, 5e-324]) == pytest.approx(1.0)
    assert max_min_ratio([0.0, 0.1]).value is None
    assert max_mean_ratio([0.0, 0.1]).reason == "A group without errors has no ratio to the others."
    assert max_min_ratio([0.2, 0.1]).value == 2.0
    assert max_mean_ratio([0.4, 0.1]).value == pytest.approx(2.0)
    with pytest.raises(InputError, match="at least two groups"):
        gini([0.1])


def test_figures_of_groups_at_a_common_threshold() -> None:
    groups = {"a": group(0), "b": group(1, shift=0.5)}
    figures = group_figures(groups, 2.0)
    fmr = [float(np.mean(scores.impostor >= 2.0)) for scores in groups.values()]
    fnmr = [float(np.mean(scores.genuine < 2.0)) for scores in groups.values()]
    assert [figures[f"{name}/fmr"].value for name in groups] == pytest.approx(fmr)
    assert [figures[f"{name}/fnmr"].value for name in groups] == pytest.approx(fnmr)
    assert figures["fmr-max-min"].value == pytest.approx(max(fmr) / min(fmr))
    assert figures["fnmr-max-mean"].value == pytest.approx(max(fnmr) / np.sqrt(np.prod(fnmr)))
    assert figures["fdr"].value == pytest.approx(1 - (abs(fmr[0] - fmr[1]) + abs(fnmr[0] - fnmr[1])) / 2)
    assert figures["garbe"].value == pytest.approx(garbe(fmr, fnmr))
    assert figures["a/fmr"].low is not None


def test_one_group_and_a_group_whose_tail_ends_early() -> None:
    assert sorted(group_figures({"a": group(0)}, 2.0)) == ["a/fmr", "a/fnmr"]
    tail = Scores(np.array([3.0]), np.array([2.5]), 100)
    figures = group_figures({"a": group(0), "b": tail}, 2.0)
    assert [figures[name].value for name in ("b/fmr", "fmr-max-min", "fdr", "garbe")] == [None] * 4
    assert figures["a/fmr"].value is not None


@given(seed=st.integers(0, 2**32 - 1), images=st.integers(1, 20), groups=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_cross_group_fmr_equals_a_loop(seed: int, images: int, groups: int) -> None:
    generator = np.random.default_rng(seed)
    of_image, ids = generator.integers(-1, groups, images), generator.integers(0, 4, images)
    accepted = []
    pairs, accepts = np.zeros((groups, groups)), np.zeros((groups, groups))
    for left, right in itertools.combinations(range(images), 2):
        if ids[left] == ids[right]:
            continue
        is_accepted = generator.random() < 0.3
        if is_accepted:
            accepted.append((left, right))
        if min(of_image[left], of_image[right]) >= 0:
            for place in {(of_image[left], of_image[right]), (of_image[right], of_image[left])}:
                pairs[place] += 1
                accepts[place] += is_accepted
    with np.errstate(invalid="ignore"):
        expected = accepts / pairs
    rows = np.array(accepted, dtype=np.int64).reshape(-1, 2)
    np.testing.assert_array_equal(cross_group_fmr(rows, of_image, ids, groups), expected)
