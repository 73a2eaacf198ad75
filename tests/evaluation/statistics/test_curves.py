"""What draws the scores: points of the ROC that are the metrics' own, bands that hold the truth, histograms, pairs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from partialfc.evaluation.statistics.curves import curve_facts, hardest_pairs
from partialfc.evaluation.statistics.intervals import tar_figure
from partialfc.evaluation.statistics.metrics import Scores, roc_of


def example(seed: int = 0, genuine: int = 500, impostors: int = 2000, kept: int | None = None) -> Scores:
    generator = np.random.default_rng(seed)
    impostor = np.sort(generator.normal(0, 1, impostors))[::-1][: kept or impostors]
    rows = [np.arange(2 * count).reshape(-1, 2) for count in (genuine, len(impostor))]
    scores = generator.normal(2, 1, genuine)
    return Scores(scores, impostor, impostors, genuine_rows=rows[0], impostor_rows=rows[1])


@pytest.mark.parametrize("kept", [None, 300])
def test_points_and_bands_are_those_of_the_metrics(kept: int | None) -> None:
    scores = example(kept=kept)
    facts = curve_facts(scores)
    assert json.loads(json.dumps(facts)) == facts
    far, tar, low, high = (np.array(facts["roc"][name]) for name in ("far", "tar", "low", "high"))
    curve = roc_of(scores)
    assert tar.tolist() == [curve.tar_at(rate) for rate in far]
    assert far[0] == 1 / 2000
    assert far[-1] == (1 if kept is None else pytest.approx(299 / 2000))
    assert ((low <= tar) & (tar <= high)).all()
    figure = tar_figure(scores, 0.01)
    assert figure.low is not None
    assert figure.high is not None
    assert np.interp(0.01, far, low) == pytest.approx(figure.low, abs=0.02)
    assert np.interp(0.01, far, high) == pytest.approx(figure.high, abs=0.02)
    assert sum(facts["histogram"]["genuine"]) == 500
    assert sum(facts["histogram"]["impostor"]) == facts["kept"] == (kept or 2000)
    assert (facts["calibration"] is None) == (kept is not None)


def test_scores_that_are_all_equal_have_curves() -> None:
    facts = curve_facts(Scores(np.ones(3), np.ones(2), 2))
    assert facts["roc"]["far"] == [1.0]
    assert facts["roc"]["tar"] == [1.0]
    assert sum(facts["histogram"]["genuine"]) == 3


def test_curves_of_hardly_any_scores() -> None:
    """Of one kept impostor of several there is no point, and a genuine pair that failed leaves no score."""
    assert curve_facts(example(kept=1))["roc"]["far"] == []
    facts = curve_facts(Scores(np.array([]), np.array([0.2]), 1, failures=1))
    assert facts["roc"]["tar"] == [0.0]
    assert facts["histogram"]["genuine"] == [0] * len(facts["histogram"]["genuine"])


def test_the_hardest_pairs_have_the_most_misleading_scores() -> None:
    scores = example()
    found = hardest_pairs(scores)
    assert [pair["score"] for pair in found["impostor"]] == sorted(scores.impostor)[::-1][:6]
    assert [pair["score"] for pair in found["genuine"]] == sorted(scores.genuine)[:6]
    place = int(scores.genuine.argmin())
    assert found["genuine"][0]["rows"] == [2 * place, 2 * place + 1]
    assert hardest_pairs(Scores(np.ones(3), np.zeros(2), 2)) == {}
