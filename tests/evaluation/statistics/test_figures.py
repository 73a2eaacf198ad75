"""Figures as JSON values and as a table."""

from __future__ import annotations

import pytest

from partialfc.evaluation.statistics.figures import COLUMNS, Figure, Result, rate_name, results_table


@pytest.mark.parametrize(
    ("rate", "name"),
    [(1e-4, "1e-4"), (1e-3, "1e-3"), (0.01, "0.01"), (0.1, "0.1"), (2.5e-4, "2.5e-4"), (1e-10, "1e-10"), (0.0, "0")],
)
def test_rate_name(rate: float, name: str) -> None:
    assert rate_name(rate) == name


def test_a_result_as_values_for_json() -> None:
    figures = {"eer": Figure(0.1, 0.05, 0.2), "tar@far=1e-6": Figure(None, reason="too few")}
    assert Result("pairs", figures, {"pairs": 3}).to_dict() == {
        "kind": "pairs",
        "figures": {
            "eer": {"value": 0.1, "low": 0.05, "high": 0.2},
            "tar@far=1e-6": {"value": None, "low": None, "high": None, "reason": "too few"},
        },
        "pairs": 3,
    }


def test_the_table_has_a_column_a_model_and_each_reason_once() -> None:
    reason = "999,999 impostor pairs cannot resolve a rate of 1e-6."
    unresolvable = Figure(None, reason=reason)
    models = {
        name: {
            "mfr": Result(
                "all-pairs",
                {
                    "african/tar@far=1e-4": Figure(0.98765, 0.98, 0.99),
                    "tar@far=1e-6": unresolvable,
                    "eer": Figure(0.00041, 0.0003, 0.0006),
                    "min-cllr": Figure(0.0123),
                },
                {},
            )
        }
        for name in ("first", "second", "third-of-them")
    }
    del models["second"]["mfr"].figures["eer"]
    table = results_table(models)
    lines = table.splitlines()
    assert lines[0] == "mfr (all-pairs)"
    assert max(map(len, lines)) <= COLUMNS
    assert table.count(reason) == 1
    first, third = (next(line for line in lines if name in line) for name in ("first", "third-of-them"))
    assert first.split() == ["first", "second"]
    assert third.split() == ["third-of-them"]
    assert next(line.split() for line in lines if "african" in line) == [
        "african/tar@far=1e-4",
        *("98.77%", "[98.00,", "99.00]") * 2,
    ]
    assert next(line.split() for line in lines if "eer" in line) == ["eer", "0.0410%", "[0.0300,", "0.0600]", "-"]
    assert next(line.split() for line in lines if "cllr" in line) == ["min-cllr", "0.0123", "0.0123"]


def test_benchmarks_of_one_model_stand_below_each_other() -> None:
    of_model = {name: Result("pairs", {"accuracy": Figure(0.5, 0.4, 0.6)}, {}) for name in ("lfw", "cfp")}
    assert results_table({"model": of_model}) == (
        "lfw (pairs)\n"
        "            model\n"
        "  accuracy  50.00% [40.00, 60.00]\n"
        "\n"
        "cfp (pairs)\n"
        "            model\n"
        "  accuracy  50.00% [40.00, 60.00]"
    )
