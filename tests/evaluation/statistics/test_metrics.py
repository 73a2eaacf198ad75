"""Threshold metrics against brute force, scikit-learn, and the LFW protocol written out in loops."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import KFold

from partialfc.core.errors import InputError
from partialfc.evaluation.statistics.metrics import (
    Floats,
    Scores,
    allowed_false_accepts,
    fold_accuracy,
    is_resolvable,
    roc,
    roc_of,
    threshold_at_far,
)

# Few distinct values, so that ties within and between the two lists are the rule.
scores = st.lists(st.integers(-4, 4).map(lambda value: value / 4), min_size=1, max_size=40)
rates = st.one_of(st.integers(0, 40).map(lambda count: count / 40), st.floats(0, 1))


def brute_force_tar(genuine: list[float], impostor: list[float], far: float) -> float:
    best = 0.0
    for threshold in [*genuine, *impostor, float("inf")]:
        passing = sum(score >= threshold for score in impostor) / len(impostor)
        if passing <= far:
            best = max(best, sum(score >= threshold for score in genuine) / len(genuine))
    return best


@given(genuine=scores, impostor=scores, far=rates)
@settings(max_examples=150, deadline=None)
def test_tar_at_far_equals_brute_force_and_scikit_learn(
    genuine: list[float], impostor: list[float], far: float
) -> None:
    tar = roc(genuine, impostor).tar_at(far)
    assert tar == brute_force_tar(genuine, impostor, far)
    truth = [1] * len(genuine) + [0] * len(impostor)
    fars, tars, _ = roc_curve(truth, genuine + impostor, drop_intermediate=False)
    assert tar == tars[fars <= far].max()


def test_tar_at_far_moves_ties_together() -> None:
    impostor = [0.9, 0.5, 0.5, 0.1]
    genuine = [0.95, 0.7, 0.5, 0.3]
    assert roc(genuine, impostor).tar_at(0.0) == 0.25
    assert roc(genuine, impostor).tar_at(0.25) == 0.5
    assert roc(genuine, impostor).tar_at(0.5) == 0.5  # both 0.5 pass or neither: the second may not pass alone
    assert roc(genuine, impostor).tar_at(0.75) == 1.0
    assert roc(genuine, impostor).tar_at(1.0) == 1.0


@pytest.mark.parametrize("count", [3000, 29_997, 100_000])
@pytest.mark.parametrize("far", [1e-4, 1e-3, 1e-2, 0.1, 0.3, 0.7])
def test_far_is_never_exceeded_and_never_wasted(count: int, far: float) -> None:
    impostor = np.arange(count, dtype=np.float64)
    # A genuine score between any two impostor scores: TAR then counts how many impostors may pass.
    tar = roc(impostor + 0.5, impostor).tar_at(far)
    passing = round(tar * count) - 1
    assert passing / count <= far < (passing + 1) / count


@given(genuine=scores, impostor=scores)
@settings(max_examples=100, deadline=None)
def test_roc_equals_scikit_learn(genuine: list[float], impostor: list[float]) -> None:
    curve = roc(genuine, impostor)
    truth = [1] * len(genuine) + [0] * len(impostor)
    fars, tars, thresholds = roc_curve(truth, genuine + impostor, drop_intermediate=False)
    np.testing.assert_array_equal(curve.thresholds, thresholds)
    np.testing.assert_allclose(curve.far, fars, rtol=1e-15)
    np.testing.assert_allclose(curve.tar, tars, rtol=1e-15)
    assert curve.auc == pytest.approx(roc_auc_score(truth, genuine + impostor), abs=1e-12)


def test_equal_error_rate() -> None:
    assert roc([3, 4], [1, 2]).equal_error_rate == 0.0
    assert roc([1, 2], [3, 4]).equal_error_rate == 1.0
    assert roc([1.0], [1.0]).equal_error_rate == 0.5
    # Accepting 0.6 and above: one of four impostors in, one of four genuine out.
    assert roc([0.9, 0.8, 0.6, 0.2], [0.7, 0.5, 0.4, 0.1]).equal_error_rate == pytest.approx(0.25)


@given(genuine=scores, impostor=scores)
@settings(max_examples=50, deadline=None)
def test_equal_error_rate_lies_between_the_operating_points_around_it(
    genuine: list[float], impostor: list[float]
) -> None:
    curve = roc(genuine, impostor)
    misses = 1 - curve.tar
    rate = curve.equal_error_rate
    assert np.minimum(curve.far, misses).max() - 1e-12 <= rate <= np.maximum(curve.far, misses).min() + 1e-12


def looped_protocol(distances: np.ndarray, same: np.ndarray) -> tuple[float, float, list[float]]:
    """The protocol as its description says, in loops."""
    accuracies, chosen = [], []
    for train, test in KFold(10, shuffle=False).split(distances):
        best, best_accuracy = 0.0, -1.0
        for number in range(400):
            threshold = number * 0.01
            accuracy = np.mean((distances[train] < threshold) == same[train])
            if accuracy > best_accuracy:
                best, best_accuracy = threshold, accuracy
        chosen.append(best)
        accuracies.append(np.mean((distances[test] < best) == same[test]))
    mean = sum(accuracies) / 10
    return mean, (sum((accuracy - mean) ** 2 for accuracy in accuracies) / 10) ** 0.5, chosen


@given(seed=st.integers(0, 2**32 - 1), pairs=st.integers(10, 83), grid=st.booleans())
@settings(max_examples=25, deadline=None)
def test_fold_accuracy_equals_the_protocol_in_loops(seed: int, pairs: int, grid: bool) -> None:
    generator = np.random.default_rng(seed)
    same = generator.random(pairs) < 0.5
    distances = np.clip(generator.normal(np.where(same, 1.2, 1.9), 0.5), 0, 4)
    if grid:  # distances that stand exactly on thresholds
        distances = np.round(distances * 100) * 0.01
    accuracies, thresholds = fold_accuracy(distances, same)
    mean, std, chosen = looped_protocol(distances, same)
    assert accuracies.mean() == pytest.approx(mean, abs=1e-12)
    assert accuracies.std() == pytest.approx(std, abs=1e-12)
    np.testing.assert_array_equal(thresholds, chosen)


def test_fold_accuracy_uses_the_first_best_threshold_and_a_strict_below() -> None:
    distances = np.tile([0.5, 1.5], 10)
    same = np.tile([True, False], 10)
    accuracies, thresholds = fold_accuracy(distances, same)
    assert (accuracies == 1.0).all()
    np.testing.assert_allclose(thresholds, 0.51)  # at 0.50 itself, 0.5 is not below


def test_fold_accuracy_is_measured_on_folds_that_had_no_say() -> None:
    # The first fold's pairs contradict all others, so its own threshold is wrong for it throughout.
    distances = np.concatenate([[1.5, 0.5], np.tile([0.5, 1.5], 9)])
    same = np.tile([True, False], 10)
    accuracies, _ = fold_accuracy(distances, same)
    np.testing.assert_array_equal(accuracies, [0.0] + [1.0] * 9)
    assert accuracies.std() == pytest.approx(0.3)


def nearest_far_tar(genuine: Floats, impostor: Floats, far: float) -> tuple[float, float]:
    """TAR and FAR in the reading of the public scripts: the operating point whose FAR is nearest, above it or not."""
    truth = np.repeat([1, 0], [len(genuine), len(impostor)])
    fars, tars, _ = roc_curve(truth, np.concatenate([genuine, impostor]))
    nearest = len(fars) - 1 - np.argmin(np.abs(fars - far)[::-1])  # of several, the highest TAR
    return float(tars[nearest]), float(fars[nearest])


@pytest.mark.parametrize("seed", range(30))
def test_tar_equals_the_nearest_reading_where_a_point_has_the_exact_far(seed: int) -> None:
    generator = np.random.default_rng(seed)
    genuine, impostor = generator.normal(1, 1, 200), generator.normal(0, 1, 50)
    scores, exact = Scores(genuine, impostor, 50), 0
    for count in range(51):
        tar, far = nearest_far_tar(genuine, impostor, count / 50)
        if far == count / 50:  # the public curve leaves out points between others on a line
            exact += 1
            assert scores.tar(threshold_at_far(scores, far)) == pytest.approx(tar, abs=1e-12)
    assert exact >= 10


@given(far=st.fractions(0, 1, max_denominator=3000), impostors=st.integers(1, 10**7))
@settings(max_examples=100, deadline=None)
def test_allowed_false_accepts_is_exact_for_decimal_rates(far: Fraction, impostors: int) -> None:
    allowed = allowed_false_accepts(float(far), impostors)
    assert allowed / impostors <= float(far)
    assert allowed == impostors or (allowed + 1) / impostors > float(far)
    assert allowed == far * impostors or (far * impostors).denominator != 1


def test_allowed_false_accepts_of_usual_counts() -> None:
    assert allowed_false_accepts(1e-3, 1000) == 1
    assert allowed_false_accepts(0.29, 100) == 29
    assert allowed_false_accepts(1e-6, 2_638_000_000_000) == 2_638_000
    assert not is_resolvable(1e-4, 9_999)
    assert is_resolvable(1e-4, 10_000)


@given(genuine=scores, impostor=scores, far=rates, kept=st.integers(1, 40), failures=st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_a_tail_is_read_as_all_scores_or_refused(
    genuine: list[float], impostor: list[float], far: float, kept: int, failures: int
) -> None:
    everything = Scores(np.array(genuine), np.array(impostor), len(impostor), failures=failures)
    tail = replace(everything, impostor=np.sort(impostor)[-kept:])
    threshold = threshold_at_far(everything, far)
    false_accepts = sum(score >= threshold for score in impostor)
    assert false_accepts / len(impostor) <= far
    assert everything.tar(threshold) == pytest.approx(
        brute_force_tar(genuine, impostor, far) * len(genuine) / (len(genuine) + failures), abs=1e-12
    )
    if tail.complete or allowed_false_accepts(far, len(impostor)) < kept:
        assert threshold_at_far(tail, far) == threshold
        assert tail.false_accepts(threshold) == false_accepts
        assert roc_of(tail).tar_at(far) == everything.tar(threshold)
    else:
        with pytest.raises(InputError, match="keep at least"):
            threshold_at_far(tail, far)
        with pytest.raises(InputError, match="than were kept"):
            roc_of(tail).tar_at(far)


def test_the_threshold_accepts_what_its_rate_says_and_no_score_lies_closer() -> None:
    scores = Scores(np.array([0.2, 0.6]), np.array([0.5, 0.4, 0.3, 0.1]), 4)
    assert threshold_at_far(scores, 0.0) == 0.6
    assert threshold_at_far(scores, 0.25) == 0.5
    assert threshold_at_far(scores, 1.0) == 0.1
    assert threshold_at_far(Scores(np.array([0.2]), np.array([0.5]), 1), 0.0) == np.nextafter(0.5, 1)


def test_a_tail_has_no_area_and_an_equal_error_rate_only_if_it_reaches_it() -> None:
    tail = Scores(np.array([0.9, 0.8, 0.1]), np.array([0.5, 0.4]), 10)
    with pytest.raises(InputError, match="area under the curve needs all"):
        _ = roc_of(tail).auc
    with pytest.raises(InputError, match="equal error rate lies below"):
        _ = roc_of(tail).equal_error_rate
    assert roc_of(Scores(np.array([0.9, 0.8]), np.array([0.5, 0.4]), 10)).equal_error_rate == 0.0
    with pytest.raises(InputError, match="does not lie above the lowest of the 2 kept"):
        tail.false_accepts(0.4)


def test_scores_that_do_not_fit_are_refused() -> None:
    some = np.array([0.5, 0.6])
    with pytest.raises(InputError, match="impostor scores must be"):
        Scores(some, np.empty(0), 0)
    with pytest.raises(InputError, match="2 scores of 1 impostor pairs"):
        Scores(some, some, 1)
    with pytest.raises(InputError, match="genuine scores hold NaN"):
        Scores(np.array([np.nan]), some, 2)
    with pytest.raises(InputError, match="one kind of pairs only"):
        Scores(some, some, 2, genuine_ids=np.array([1, 2]))
    with pytest.raises(InputError, match=r"impostor pairs have the shape \(2,\), but must have \(2, 2\)"):
        Scores(some, some, 2, genuine_ids=np.array([1, 2]), impostor_ids=np.array([1, 2]))
    with pytest.raises(InputError, match="failures, -1"):
        Scores(some, some, 2, failures=-1)
    assert Scores(np.empty(0), some, 2, failures=3).tar(0.0) == 0.0


def test_wrong_input_is_refused() -> None:
    with pytest.raises(InputError, match="9 pairs cannot be cut into 10 folds"):
        fold_accuracy(np.zeros(9), np.zeros(9, dtype=bool))
    with pytest.raises(InputError, match="NaN"):
        fold_accuracy(np.full(20, np.nan), np.zeros(20, dtype=bool))
    with pytest.raises(InputError, match="20 distances but 10 answers"):
        fold_accuracy(np.zeros(20), np.zeros(10, dtype=bool))
    with pytest.raises(InputError, match="genuine"):
        roc([], [0.5])
    with pytest.raises(InputError, match="impostor scores hold NaN"):
        roc([0.5], [float("nan")]).tar_at(0.1)
    with pytest.raises(InputError, match="false accept rate 2"):
        roc([0.5], [0.5]).tar_at(2)


@given(
    genuine=scores,
    impostor=st.lists(st.integers(-4, 4).map(lambda value: value / 4), min_size=20, max_size=60),
    far=st.sampled_from([0.05, 0.1, 0.2, 0.5]),
)
@settings(max_examples=100, deadline=None)
def test_tar_at_far_is_that_of_the_insightface_package(genuine: list[float], impostor: list[float], far: float) -> None:
    """Run where `pip install insightface` (2.1) was done."""
    theirs = pytest.importorskip("insightface.gui.core.evaluation", exc_type=ImportError)
    rows = [{"label": 1, "similarity": score} for score in genuine]
    rows += [{"label": 0, "similarity": score} for score in impostor]
    assert roc(genuine, impostor).tar_at(far) == pytest.approx(theirs.tar_at_far(rows, far), abs=1e-12)
