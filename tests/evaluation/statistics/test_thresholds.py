"""thresholds.json: round trip, refusals, and what its thresholds do on other pairs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from intervals import Gaussian
from partialfc.core.errors import InputError
from partialfc.evaluation.statistics.metrics import Scores
from partialfc.evaluation.statistics.thresholds import (
    NAME,
    apply_thresholds,
    measure_thresholds,
    read_thresholds,
    write_thresholds,
)


def draw(seed: int, impostors: int = 20_000) -> Scores:
    generator = np.random.default_rng(seed)
    return Scores(generator.normal(0.6, 0.1, 500), generator.normal(0.0, 0.1, impostors), impostors, failures=5)


def test_written_and_read_thresholds_are_the_same(tmp_path: Path) -> None:
    measured = measure_thresholds(draw(0), name="twins", contract="ab12")
    path = write_thresholds(measured, tmp_path)
    assert read_thresholds(path) == read_thresholds(tmp_path) == measured
    content = json.loads((tmp_path / NAME).read_text())
    assert content["schema_version"] == 1
    assert content["contract"] == "ab12"
    assert content["measured_on"]["name"] == "twins"
    assert content["measured_on"]["impostor_pairs"] == 20_000
    rows = {row["target"]: row for row in content["thresholds"]}
    assert sorted(rows) == [1e-6, 1e-5, 1e-4, 1e-3, 1e-2]
    assert rows[1e-5]["cosine"] is rows[1e-5]["squared_distance"] is None
    assert "20,000 impostor pairs cannot resolve a rate of 1e-5" in rows[1e-5]["fmr"]["reason"]
    for target in (1e-2, 1e-3, 1e-4):
        row = rows[target]
        assert row["fmr"]["value"] <= target
        assert row["fmr"]["low"] < target < row["fmr"]["high"]
        assert row["squared_distance"] == 2 - 2 * row["cosine"]
        assert row["distance"] ** 2 == pytest.approx(row["squared_distance"])
        assert row["fnmr"]["value"] >= 5 / 505


def test_distances_are_those_of_unit_vectors() -> None:
    measured = measure_thresholds(draw(0), name="twins", contract="ab12")
    cosine = measured.thresholds[0].cosine
    assert cosine is not None
    left, right = np.array([1.0, 0.0]), np.array([cosine, np.sqrt(1 - cosine**2)])
    assert measured.thresholds[0].distance == pytest.approx(np.linalg.norm(left - right))


def test_a_tail_is_not_calibrated() -> None:
    tail = replace(draw(0), impostors=10**6, impostor=draw(0).impostor[:100])
    measured = measure_thresholds(tail, name="tail", contract="ab12")
    assert measured.calibration is None
    assert "Only 100" in str(measured.thresholds[0].fmr.reason)


def test_damaged_newer_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_thresholds(tmp_path / NAME)
    path = write_thresholds(measure_thresholds(draw(0), name="twins", contract="ab12"), tmp_path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "schema_version": 2, "thresholds": "of another shape"}))
    with pytest.raises(
        InputError, match=r"schema_version 2, and this partialfc reads them up to 1: install a newer one\.$"
    ):
        read_thresholds(path)
    for damaged in ("", "[]", "{}", json.dumps({**content, "thresholds": [{}]})):
        path.write_text(damaged)
        with pytest.raises(InputError, match="no file of thresholds"):
            read_thresholds(path)


def test_realised_rates_elsewhere_beside_the_target() -> None:
    measured = measure_thresholds(draw(0), name="twins", contract="ab12")
    here, lambs = draw(1), draw(2)
    lambs = replace(lambs, impostor=lambs.impostor + 0.2)
    found = apply_thresholds(measured, here, {"plain": here, "lambs": lambs})
    assert [row.threshold.target for row in found] == [1e-2, 1e-3, 1e-4]
    first = found[0]
    assert first.threshold.cosine is not None
    assert first.fmr.value == pytest.approx(np.mean(here.impostor >= first.threshold.cosine))
    assert first.fnmr.value == pytest.approx((np.sum(here.genuine < first.threshold.cosine) + 5) / 505)
    assert first.groups["plain"] == (first.fmr, first.fnmr)
    expected = first.expected
    assert expected is not None
    assert expected[0] < 1e-2 < expected[1]
    group_fmr = first.groups["lambs"][0].value
    assert group_fmr is not None
    assert group_fmr > expected[1]
    values = json.loads(json.dumps(first.to_dict()))
    assert values["target"] == 1e-2
    assert values["groups"]["lambs"]["fmr"]["value"] == group_fmr


@pytest.mark.slow
def test_realised_rates_on_disjoint_splits_lie_in_their_intervals() -> None:
    """A threshold set on one half of a split; the realised FMR on the other half, and that of all people."""
    model = Gaussian(400, 0.6, 0.3)
    spread = np.sqrt(1 + 2 * model.impostor_effect**2)
    held = {"expected": 0, "stored": 0, "realised": 0}
    for seed in range(100):
        there, here = (model.draw(np.random.default_rng([7, seed, half])) for half in (0, 1))
        measured = measure_thresholds(there, name="half", contract="ab12")
        (row,) = [row for row in apply_thresholds(measured, here) if row.threshold.target == 1e-3]
        assert row.threshold.cosine is not None
        true = NormalDist().cdf(-row.threshold.cosine / spread)
        assert row.expected is not None
        held["expected"] += row.expected[0] <= (row.fmr.value or 0.0) <= row.expected[1]
        for name, figure in (("stored", row.threshold.fmr), ("realised", row.fmr)):
            assert figure.low is not None
            assert figure.high is not None
            held[name] += figure.low <= true <= figure.high
    assert min(held.values()) >= 90, held
