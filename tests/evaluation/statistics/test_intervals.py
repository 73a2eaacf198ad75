"""Intervals: against brute-force resampling and textbook values, at the edges, and their coverage."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from intervals import MODELS, coverage, ends_of
from partialfc.core.errors import InputError
from partialfc.evaluation.statistics.figures import Figure
from partialfc.evaluation.statistics.intervals import (
    accuracy_figure,
    auc_figure,
    eer_figure,
    fmr_at,
    fnmr_at,
    fnmr_figure,
    interval_facts,
    resampled_rates,
    tar_change,
    tar_figure,
    wilson,
)
from partialfc.evaluation.statistics.metrics import Scores, roc, threshold_at_far


def complete(identities: int, *, shots: int = 5, effect: float = 0.3, seed: int = 0) -> Scores:
    """All scores of a small set with an effect of each identity."""
    generator = np.random.default_rng(seed)
    effects = generator.normal(size=identities)
    people = np.repeat(np.arange(identities), shots)
    left, right = np.triu_indices(identities, 1)
    return Scores(
        3.0 + effect * effects[people] + generator.normal(size=len(people)),
        effect * (effects[left] + effects[right]) + generator.normal(size=len(left)),
        len(left),
        people * 7,
        np.stack([left, right], axis=1) * 7,
    )


def without_ids(scores: Scores) -> Scores:
    return replace(scores, genuine_ids=None, impostor_ids=None, failure_ids=None, scanned=None)


def deviation(figure: Figure) -> float:
    assert figure.low is not None
    assert figure.high is not None
    return (figure.high - figure.low) / (2 * 1.96)


def test_a_tail_gives_the_figure_of_all_scores() -> None:
    scores = complete(80)
    kept = np.argsort(-scores.impostor)[:200]
    everyone = np.arange(80) * 7
    assert scores.impostor_ids is not None
    tail = replace(
        scores, impostor=scores.impostor[kept], impostor_ids=scores.impostor_ids[kept], scanned=(everyone, everyone)
    )
    assert tar_figure(tail, 0.01) == tar_figure(scores, 0.01)
    assert interval_facts(tail)["impostor_pairs_of_identities"] == "closed form"
    assert tar_figure(without_ids(tail), 0.01) == tar_figure(without_ids(scores), 0.01)
    assert interval_facts(without_ids(tail))["interval"] == "pairs"


@pytest.mark.parametrize("known", [True, False])
def test_the_value_is_the_metric_and_numbers_are_the_same_every_time(known: bool) -> None:
    scores = complete(60) if known else without_ids(complete(60))
    figure = tar_figure(scores, 0.01)
    assert figure.value == roc(scores.genuine, scores.impostor).tar_at(0.01)
    assert figure.low is not None
    assert figure.high is not None
    assert figure.low < figure.value < figure.high
    assert tar_figure(replace(scores), 0.01) == figure
    opposite = fnmr_figure(scores, 0.01)
    assert (opposite.value, opposite.low, opposite.high) == (1 - figure.value, 1 - figure.high, 1 - figure.low)
    eer = eer_figure(scores)
    assert eer.value == roc(scores.genuine, scores.impostor).equal_error_rate
    assert eer_figure(replace(scores)) == eer


def test_resampled_rates_are_centred_and_spread_as_plain_resampling_where_identities_dominate() -> None:
    scores = complete(60, effect=1.5)
    thresholds = np.array([threshold_at_far(scores, far) for far in (0.05, 0.2)])
    fars, tars = resampled_rates(scores, thresholds)
    people, generator = scores.identities, np.random.default_rng(5)
    assert people is not None
    plain_fars, plain_tars = [], []
    for _ in range(1500):
        weights = np.bincount(generator.integers(60, size=60), minlength=60).astype(float)
        pairs = weights[people.impostor[:, 0]] * weights[people.impostor[:, 1]]
        own = weights[people.genuine]
        plain_fars.append([pairs @ (scores.impostor >= t) / pairs.sum() for t in thresholds])
        plain_tars.append([own @ (scores.genuine >= t) / own.sum() for t in thresholds])
    np.testing.assert_allclose(tars.std(axis=0), np.std(plain_tars, axis=0), rtol=0.12)
    np.testing.assert_allclose(fars.std(axis=0), np.std(plain_fars, axis=0), rtol=0.25)
    np.testing.assert_allclose(np.median(fars, axis=0), np.median(plain_fars, axis=0), rtol=0.1)


def test_the_equal_error_rate_is_spread_as_under_brute_force_resampling() -> None:
    scores = without_ids(complete(40))
    generator, rates = np.random.default_rng(3), []
    for _ in range(300):
        drawn = [generator.choice(part, len(part)) for part in (scores.genuine, scores.impostor)]
        rates.append(roc(*drawn).equal_error_rate)
    assert deviation(eer_figure(scores)) == pytest.approx(np.std(rates), rel=0.2)


def test_tar_is_spread_as_under_brute_force_resampling_of_pairs() -> None:
    scores = without_ids(complete(40))
    generator, tars = np.random.default_rng(3), []
    for _ in range(400):
        drawn = [generator.choice(part, len(part)) for part in (scores.genuine, scores.impostor)]
        tars.append(roc(*drawn).tar_at(0.02))
    figure = tar_figure(scores, 0.02)
    assert (figure.low, figure.high) == pytest.approx(tuple(np.percentile(tars, [2.5, 97.5])), abs=0.025)


def test_a_change_is_paired_by_identity_as_under_brute_force_resampling() -> None:
    before = complete(60, effect=1.0)
    generator = np.random.default_rng(7)
    after = replace(before, genuine=before.genuine + 0.5 + generator.normal(size=len(before.genuine)) / 3)
    change, people = tar_change(before, after, 0.02), before.identities
    assert people is not None
    assert change.value == pytest.approx(
        sum(sign * roc(scores.genuine, scores.impostor).tar_at(0.02) for sign, scores in ((1, after), (-1, before)))
    )
    order, changes = np.argsort(-before.impostor), []
    for _ in range(600):
        weights = np.bincount(generator.integers(60, size=60), minlength=60).astype(float)
        pairs = (weights[people.impostor[:, 0]] * weights[people.impostor[:, 1]])[order].cumsum()
        threshold = before.impostor[order][np.searchsorted(pairs, 0.02 * pairs[-1])]
        accepted = (after.genuine >= threshold) * 1.0 - (before.genuine >= threshold)
        changes.append(weights[people.genuine] @ accepted / weights[people.genuine].sum())
    assert deviation(change) == pytest.approx(np.std(changes), rel=0.2)
    assert deviation(change) < 0.3 * deviation(tar_figure(before, 0.02))
    nothing = tar_change(before, before, 0.02)
    assert (nothing.value, nothing.low, nothing.high) == (0.0, 0.0, 0.0)
    assert tar_change(before, after, 1e-6).value is None


def test_a_change_is_paired_by_pair_where_nobody_is_known() -> None:
    before, generator = without_ids(complete(60)), np.random.default_rng(7)
    noise = [generator.normal(size=len(part)) / 3 for part in (before.genuine, before.impostor)]
    after = replace(before, genuine=before.genuine + noise[0], impostor=before.impostor + noise[1])
    changes = []
    for _ in range(600):
        drawn = [generator.integers(len(part), size=len(part)) for part in (before.genuine, before.impostor)]
        tars = [roc(one.genuine[drawn[0]], one.impostor[drawn[1]]).tar_at(0.02) for one in (before, after)]
        changes.append(tars[1] - tars[0])
    assert deviation(tar_change(before, after, 0.02)) == pytest.approx(np.std(changes), rel=0.15)


def test_auc_is_that_of_scikit_learn_and_spread_as_under_resampling() -> None:
    scores = without_ids(complete(40))
    truth = np.repeat([1, 0], [len(scores.genuine), len(scores.impostor)])
    figure = auc_figure(scores)
    assert figure.value == pytest.approx(
        roc_auc_score(truth, np.concatenate([scores.genuine, scores.impostor])), abs=1e-12
    )
    generator = np.random.default_rng(3)
    areas = [
        roc(*(generator.choice(part, len(part)) for part in (scores.genuine, scores.impostor))).auc for _ in range(300)
    ]
    assert deviation(figure) == pytest.approx(np.std(areas), rel=0.2)
    assert auc_figure(replace(scores, impostors=10**6)).value is None
    ties = auc_figure(Scores(np.array([0.5, 0.6]), np.array([0.5, 0.4]), 2))
    assert ties.value == 0.875


def test_identities_widen_what_their_effects_correlate() -> None:
    scores = complete(60, shots=20, effect=1.0)
    for figure in (
        lambda scores: tar_figure(scores, 0.01),
        eer_figure,
        auc_figure,
        lambda scores: fmr_at(scores, 2.0),
        lambda scores: fnmr_at(scores, 2.0),
    ):
        assert deviation(figure(scores)) > 1.5 * deviation(figure(without_ids(scores)))


def test_without_a_false_accept_each_pair_of_people_counts_once() -> None:
    """Of three people with twenty images each, 1,200 pairs say what three independent ones do."""
    people = np.repeat(np.arange(3), 20)
    left, right = np.triu_indices(60, 1)
    other = people[left] != people[right]
    ids = np.stack([people[left[other]], people[right[other]]], axis=1)
    scores = Scores(np.ones(3), np.zeros(1200), 1200, np.arange(3), ids)
    assert fmr_at(scores, 0.5) == wilson(0.0, 3)
    assert fmr_at(without_ids(scores), 0.5) == wilson(0.0, 1200)


def test_a_rate_that_cannot_be_resolved_is_null_with_its_reason() -> None:
    scores = complete(10)
    assert tar_figure(scores, 1e-3) == Figure(None, reason="45 impostor pairs cannot resolve a rate of 1e-3.")
    tail = replace(without_ids(scores), impostor=np.sort(scores.impostor)[-4:])
    figure = fnmr_figure(tail, 0.1)
    assert figure.value is None
    assert figure.reason == "Only 4 impostor scores were kept, too few for a rate of 0.1."
    assert eer_figure(tail).value is None
    assert fmr_at(tail, float(tail.impostor.min())).value is None
    with pytest.raises(InputError, match="must lie in"):
        tar_figure(scores, 1.5)
    with pytest.raises(InputError, match="keep more"):
        resampled_rates(tail, np.array([-9.0]))


def test_an_interval_that_needs_more_than_the_tail_is_widened_and_says_so() -> None:
    scores = complete(80)
    kept = np.argsort(-scores.impostor)[:34]
    assert scores.impostor_ids is not None
    tail = replace(scores, impostor=scores.impostor[kept], impostor_ids=scores.impostor_ids[kept])
    figure, whole = tar_figure(tail, 0.01), tar_figure(scores, 0.01)
    assert figure.value == whole.value
    assert figure.high == 1.0
    assert figure.reason is not None
    assert "of 1,000 resamples need more than the 34 kept" in figure.reason
    assert figure.low == pytest.approx(whole.low, abs=0.03)


@pytest.mark.parametrize("known", [True, False])
def test_failures_are_rejected_at_every_threshold(known: bool) -> None:
    scores = complete(40) if known else without_ids(complete(40))
    failed = replace(scores, failures=50)
    values = [tar_figure(of, 0.05).value for of in (scores, failed)]
    assert values[0] is not None
    assert values[1] == pytest.approx(values[0] * 200 / 250)
    assert fnmr_at(failed, -99.0).value == pytest.approx(0.2)
    if known:  # the failures of one person are worth less than those of fifty
        of_one = replace(failed, failure_ids=np.full(50, 7))
        assert deviation(fnmr_at(of_one, 0.0)) > 2 * deviation(fnmr_at(failed, 0.0))
        assert deviation(tar_figure(of_one, 0.05)) > 1.5 * deviation(tar_figure(failed, 0.05))


def test_no_error_at_all_leaves_the_rule_of_three() -> None:
    scores = without_ids(Scores(np.full(300, 0.9), np.linspace(0, 0.5, 1000), 1000))
    figure = tar_figure(scores, 0.01)
    assert (figure.value, figure.high) == (1.0, 1.0)
    assert figure.low == pytest.approx(1 - 3 / 300, abs=1e-3)
    assert eer_figure(scores).high == pytest.approx(3 / 300, abs=1e-3)
    of_thirty = replace(
        scores, genuine_ids=np.repeat(np.arange(30), 10), impostor_ids=np.array([[0, 1]] * 500 + [[2, 3]] * 500)
    )
    assert tar_figure(of_thirty, 0.01).low == pytest.approx(0.05 ** (1 / 30))


def test_wilson_is_that_of_the_textbook_and_stays_in_range() -> None:
    figure = wilson(0.1, 50)
    assert (figure.low, figure.high) == pytest.approx((0.0435, 0.2136), abs=1e-4)
    assert (wilson(0.0, 100).low, wilson(0.0, 100).high) == pytest.approx((0.0, 0.0370), abs=1e-4)
    assert wilson(1.0, 100).high == 1.0


def test_accuracy_is_the_mean_of_the_folds_with_a_binomial_interval() -> None:
    generator = np.random.default_rng(0)
    same = np.arange(600) % 2 == 0
    distances = np.clip(generator.normal(np.where(same, 1.0, 2.0), 0.5), 0, 4)
    figure = accuracy_figure(distances, same)
    assert figure.value is not None
    assert deviation(figure) == pytest.approx((figure.value * (1 - figure.value) / 600) ** 0.5, rel=0.1)
    assert accuracy_figure(np.where(same, 0.5, 2.0), same).low == pytest.approx(0.05 ** (1 / 600))


def test_tied_and_degenerate_scores_have_intervals() -> None:
    generator = np.random.default_rng(0)
    tied = replace(
        complete(30), genuine=generator.integers(0, 4, 150) / 4.0, impostor=generator.integers(-4, 3, 435) / 4.0
    )
    equal = Scores(np.zeros(3), np.zeros(5), 5)
    for scores in (tied, without_ids(tied), equal, Scores(np.array([1.0]), np.array([0.0]), 1)):
        figures = [tar_figure(scores, 1.0), tar_figure(scores, 0.4), eer_figure(scores), auc_figure(scores)]
        for figure in [*figures, fmr_at(scores, 0.25), fnmr_at(scores, 0.25)]:
            if figure.value is not None:
                assert figure.low is not None
                assert figure.high is not None
                assert 0.0 <= figure.low <= figure.value <= figure.high <= 1.0


@pytest.mark.slow
def test_coverage() -> None:
    model = MODELS["on both, shared"]
    ends = np.stack([ends_of(model, seed, ("identities",)) for seed in range(300)])
    assert 0.92 <= coverage(ends, model.true_tar())[0] <= 0.985


@pytest.mark.slow
def test_a_long_tail_is_resampled_in_seconds() -> None:
    generator = np.random.default_rng(0)
    ends = generator.integers(3000, size=(1_000_000, 2))
    ends[:, 1] = np.where(ends[:, 0] == ends[:, 1], 3000, ends[:, 1])
    scores = Scores(
        generator.normal(4, 1, 20_000), generator.normal(size=1_000_000), 10**8, np.arange(20_000) % 3000, ends
    )
    start = time.process_time()
    assert tar_figure(scores, 5e-3).value is not None
    assert time.process_time() - start < 15
