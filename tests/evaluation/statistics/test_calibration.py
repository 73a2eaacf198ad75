"""Calibration and its cost: against scikit-learn, closed forms, and resampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from partialfc.core.errors import InputError
from partialfc.evaluation.statistics.calibration import calibrate, cllr, cllr_figures, min_cllr, pool_adjacent_violators
from partialfc.evaluation.statistics.metrics import Scores

tied = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=40)


def isotonic_min_cllr(genuine: np.ndarray, impostor: np.ndarray) -> float:
    """By scikit-learn; a probability is turned into odds, less the odds of the counts."""
    truth = np.repeat([1.0, 0.0], [len(genuine), len(impostor)])
    share = IsotonicRegression().fit_transform(np.concatenate([genuine, impostor]), truth)
    with np.errstate(divide="ignore"):
        odds = share / (1 - share) * len(impostor) / len(genuine)
        misses = np.log2(1 + 1 / odds[: len(genuine)]).mean()
    return float(misses + np.log2(1 + odds[len(genuine) :]).mean()) / 2


@given(genuine=tied, impostor=tied)
@settings(max_examples=60, deadline=None)
def test_min_cllr_equals_scikit_learn_on_tied_scores(genuine: list[float], impostor: list[float]) -> None:
    expected = isotonic_min_cllr(np.array(genuine), np.array(impostor))
    assert min_cllr(genuine, impostor) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("shift", "count"), [(0.0, 500), (2.0, 2_000), (-1.0, 300), (9.0, 50)])
def test_min_cllr_equals_scikit_learn_on_continuous_scores(shift: float, count: int) -> None:
    generator = np.random.default_rng(0)
    genuine, impostor = generator.normal(shift, 1, count), generator.normal(0, 1, 3 * count)
    assert min_cllr(genuine, impostor) == pytest.approx(isotonic_min_cllr(genuine, impostor), abs=1e-9)


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 200), levels=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_pooling_equals_scikit_learn(seed: int, count: int, levels: int) -> None:
    generator = np.random.default_rng(seed)
    values = generator.integers(levels, size=count) / levels - np.arange(count) * generator.choice([0, 0.01, -0.01])
    weights = generator.integers(1, 5, count).astype(float)
    expected = IsotonicRegression().fit(np.arange(count), values, weights).predict(np.arange(count))
    np.testing.assert_allclose(pool_adjacent_violators(values, weights), expected, atol=1e-12)


def test_calibration_recovers_the_ratio_of_two_normal_distributions() -> None:
    generator = np.random.default_rng(0)
    genuine, impostor = generator.normal(0.6, 0.1, 20_000), generator.normal(0.2, 0.1, 5_000)
    calibration = calibrate(genuine, impostor)
    assert calibration.scale == pytest.approx(40, rel=0.05)  # log-likelihood ratio: 0.4 / 0.01 * (score - 0.4)
    assert calibration(0.4) == pytest.approx(0, abs=0.3)
    cost = cllr(calibration(genuine), calibration(impostor))
    assert min_cllr(genuine, impostor) <= cost <= min_cllr(genuine, impostor) + 0.01


def test_calibration_is_the_weighted_regression_of_scikit_learn() -> None:
    generator = np.random.default_rng(1)
    genuine, impostor = generator.normal(1, 1, 300), generator.normal(0, 2, 900)
    scores, truth = np.concatenate([genuine, impostor]), np.repeat([1, 0], [300, 900])
    peer = LogisticRegression(C=1e9, tol=1e-12, class_weight="balanced").fit(scores[:, None], truth)
    calibration = calibrate(genuine, impostor)
    assert calibration.scale == pytest.approx(peer.coef_[0, 0], abs=1e-4)
    assert calibration.offset == pytest.approx(peer.intercept_[0], abs=1e-4)


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_separable_equal_and_reversed_scores_are_calibrated(unit: float) -> None:
    apart = calibrate(np.array([3.0, 4.0]) * unit, np.array([1.0, 2.0]) * unit)
    ratios = apart(np.array([4.0, 3.0, 2.0, 1.0]) * unit)
    assert np.isfinite(ratios).all()
    assert ratios[1] > 5 > -5 > ratios[2]
    equal = calibrate([unit, unit], [unit])
    assert equal(unit) == pytest.approx(0, abs=1e-6)
    assert calibrate(np.array([1.0, 2.0]) * unit, np.array([3.0, 4.0]) * unit).scale < 0


def test_cllr_of_known_ratios() -> None:
    assert cllr([0.0], [0.0, 0.0]) == pytest.approx(1.0)
    assert cllr([math.log(3)], [-math.log(7)]) == pytest.approx((math.log2(4 / 3) + math.log2(8 / 7)) / 2)
    assert cllr([math.inf], [-math.inf]) == 0.0
    assert cllr([1000.0], [1000.0]) == pytest.approx(500 / math.log(2))
    assert min_cllr([2, 3], [0, 1]) == 0.0
    assert min_cllr([0, 1], [2, 3]) == pytest.approx(1.0)


def test_figures_hold_the_cost_of_new_draws_about_as_often_as_they_say() -> None:
    def draw(seed: int) -> Scores:
        generator = np.random.default_rng(seed)
        return Scores(generator.normal(2, 1, 200), generator.normal(0, 1, 600), 600)

    figures = cllr_figures(draw(0))
    for name in ("cllr", "min-cllr"):
        values = [cllr_figures(draw(seed))[name].value for seed in range(1, 60)]
        low, high = figures[name].low, figures[name].high
        assert low is not None
        assert high is not None
        assert (high - low) / 3.92 == pytest.approx(np.std([v for v in values if v is not None]), rel=0.4)
    everything = draw(0)
    elsewhere = cllr_figures(everything, calibrate([9.0], [8.0]))
    assert elsewhere["min-cllr"] == figures["min-cllr"]
    assert elsewhere["cllr"].value > 1.0  # type: ignore[operator]


def test_a_tail_has_no_cost_and_wrong_scores_are_refused() -> None:
    tail = Scores(np.array([1.0]), np.array([0.5]), 10)
    assert [figure.value for figure in cllr_figures(tail).values()] == [None, None]
    with pytest.raises(InputError, match="impostor scores"):
        calibrate([1.0], [])
    with pytest.raises(InputError, match="genuine scores"):
        min_cllr([math.nan], [0.0])
