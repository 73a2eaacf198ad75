"""Plots: the numbers go in and can be read back off the picture."""

from __future__ import annotations

import math

import numpy as np
import pytest
from page_reader import Element, curve, read_page, to_values

from partialfc.evaluation.statistics.metrics import roc
from partialfc.pages.plots import Line, histogram, line_chart, roc_chart, thin


def chart(points: list[tuple[float, float]], **options: object) -> Element:
    last_step = max(step for step, _ in points)
    return read_page(line_chart([Line("loss", points)], name="Loss", last_step=last_step, **options))  # type: ignore[arg-type]


def test_a_curve_holds_its_data() -> None:
    points = [(float(step), 3.0 + math.sin(step / 5)) for step in range(10, 110, 10)]
    assert np.allclose(curve(chart(points)), points, atol=0.05)


def test_a_logarithmic_curve_holds_its_data() -> None:
    points = [(float(step), 10.0 ** (3 - step / 20)) for step in range(1, 101)]
    drawn = curve(chart(points, may_log=True), log_y=True)
    assert np.allclose(drawn[:, 1], [value for _, value in points], rtol=0.01)
    linear = curve(chart([(step, value + 100) for step, value in points], may_log=True))
    assert np.allclose(linear[:, 1], [value + 100 for _, value in points], atol=1)


def test_a_value_that_is_not_finite_interrupts_the_curve() -> None:
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, math.nan), (3.0, 2.0), (4.0, math.inf), (5.0, 1.0)]
    page = chart(points)
    words = page.find_all("path")[0].attributes["d"]
    assert [letter for letter in words if letter in "ML"] == ["M", "L", "M", "M"]
    assert np.allclose(curve(page), [(0, 1), (1, 2), (3, 2), (5, 1)], atol=0.02)


def test_tooltips_name_steps_and_values_of_all_lines() -> None:
    lines = [Line("rate", [(1.0, 0.5), (2.0, 0.25)]), Line("head", [(2.0, 0.125)])]
    page = read_page(line_chart(lines, name="Rate", last_step=2))
    assert [title.text for title in page.find_all("title")] == ["step 1: rate 0.5", "step 2: rate 0.25, head 0.125"]
    assert page.find_all("svg")[0].attributes["aria-label"] == "Rate: 0.5 at step 1, 0.25 at step 2"


def test_a_band_reaches_as_far_as_the_deviation_but_not_past_all() -> None:
    page = chart([(0.0, 0.9), (10.0, 0.95)], percent=True, spread=[0.05, 0.1])
    corners = to_values(page, page.find_all("path", "band")[0].attributes["d"])
    assert np.allclose(corners, [(0, 0.95), (10, 1.0), (10, 0.85), (0, 0.85)], atol=0.002)


@pytest.mark.parametrize("value", [0.0, 7.5, -2.0])
def test_a_single_value_is_a_dot(value: float) -> None:
    page = chart([(5.0, value)])
    assert len(page.find_all("circle")) == 2  # the value, and its mark in the tooltip's strip
    assert curve(page)[0] == pytest.approx((5.0, value), abs=0.03)


def test_a_run_of_no_steps_has_a_scale() -> None:
    assert "step 0: loss 1" in chart([(0.0, 1.0)]).words()


def test_thinning_keeps_the_extremes() -> None:
    points = [(float(step), math.sin(step)) for step in range(100_000)]
    points[31_234] = (31_234.0, 50.0)
    points[77_777] = (77_777.0, math.nan)
    kept = thin(points)
    assert 600 <= len(kept) <= 1200
    assert (31_234.0, 50.0) in kept
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})
    assert thin([(0.0, math.nan)] * 5000)
    assert len(line_chart([Line("loss", points)], name="Loss", last_step=1e5)) < 60_000


def test_a_histogram_shows_the_shares() -> None:
    genuine, impostor = np.array([0.7, 0.8, 0.8, 0.9]), np.array([-0.1, 0.0, 0.1])
    page = read_page(histogram(genuine, impostor, 0.42))
    for kind, scores in (("genuine", genuine), ("impostor", impostor)):
        outline = to_values(page, page.find_all("path", kind)[0].attributes["d"])
        tops, widths = outline[1:-1:2, 1], outline[2:-1:2, 0] - outline[1:-1:2, 0]
        assert tops.sum() == pytest.approx(1.0, abs=0.02)
        centers = outline[1:-1:2, 0] + widths / 2
        assert (tops * centers).sum() == pytest.approx(scores.mean(), abs=0.05)
    assert "threshold 0.420" in page.words()
    assert len(page.find_all("title")) == 40


def test_scores_that_are_all_equal_have_a_histogram() -> None:
    page = read_page(histogram(np.ones(3), np.ones(2), 1.0))
    assert to_values(page, page.find_all("path", "genuine")[0].attributes["d"])[:, 1].max() == pytest.approx(
        1, abs=0.01
    )


def test_the_roc_is_the_best_rate_that_is_allowed() -> None:
    generator = np.random.default_rng(3)
    genuine, impostor = generator.normal(1.0, 1, 500), generator.normal(0.0, 1, 400)
    points = roc(genuine, impostor)
    page = read_page(roc_chart(points.far, points.tar, len(impostor), (0.01, 0.1)))
    path = page.find_all("path", "s1")[0].attributes["d"]
    drawn = np.array([pair.split() for pair in path[1:].split("L")], dtype=float)
    ticks = {tick.text: float(tick.attributes["x"]) for tick in page.find_all("text", "x-tick")}
    assert list(ticks) == ["0.001", "0.01", "0.1", "1"]
    heights = np.interp(drawn[:, 1], [10.0, 158.0], [1.0, 0.0])
    for far in (0.01, 0.1):
        reached = heights[drawn[:, 0] <= ticks[f"{far:g}"] + 0.01].max()
        assert reached == pytest.approx(points.tar[points.far <= far].max(), abs=0.001)
    assert heights[-1] == pytest.approx(1.0)
    assert len(page.find_all("circle", "dot")) == 2
    assert "FAR 1: TAR 100.00%" in page.words()
