"""Plots: the numbers go in and can be read back off the picture."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from page_reader import Element, curve, read_page, to_values

from partialfc.pages.plots import Line, Scale, chart, thin

STEP = Scale("optimizer step", "step", (0,), "count", snug=True)


def plot(points: list[tuple[float, float]], y: Scale | None = None, **options: Any) -> Element:
    across, values = zip(*points, strict=True)
    line = Line("loss", across, values, **options)
    return read_page(chart([line], name="Loss", x=STEP, y=y or Scale("Loss")))


def test_a_curve_holds_its_data() -> None:
    points = [(float(step), 3.0 + math.sin(step / 5)) for step in range(10, 110, 10)]
    assert np.allclose(curve(plot(points)), points, atol=0.05)


def test_a_logarithmic_curve_holds_its_data() -> None:
    points = [(float(step), 10.0 ** (3 - step / 20)) for step in range(1, 101)]
    drawn = curve(plot(points, Scale("Loss", log=None)), log_y=True)
    assert np.allclose(drawn[:, 1], [value for _, value in points], rtol=0.01)
    linear = curve(plot([(step, value + 100) for step, value in points], Scale("Loss", log=None)))
    assert np.allclose(linear[:, 1], [value + 100 for _, value in points], atol=1)


def test_both_axes_can_be_logarithmic() -> None:
    far = np.geomspace(1e-5, 1.0, 20)
    line = Line("FNMR", far, 0.5 * far**0.5)
    page = read_page(chart([line], name="DET", x=Scale("FMR", log=True), y=Scale("FNMR", log=True, kind="share")))
    drawn = curve(page, log_x=True, log_y=True)
    assert np.allclose(drawn, np.stack([far, 0.5 * far**0.5], axis=1), rtol=0.02)


def test_a_value_that_is_not_finite_interrupts_the_curve() -> None:
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, math.nan), (3.0, 2.0), (4.0, math.inf), (5.0, 1.0)]
    page = plot(points)
    words = page.find_all("path")[0].attributes["d"]
    assert [letter for letter in words if letter in "ML"] == ["M", "L", "M", "M"]
    assert np.allclose(curve(page), [(0, 1), (1, 2), (3, 2), (5, 1)], atol=0.02)


def test_tooltips_name_steps_and_values_of_all_lines() -> None:
    lines = [Line("rate", [1, 2], [0.5, 0.25]), Line("head", [2], [0.125]), Line("none", [], [])]
    page = read_page(chart(lines, name="Rate", x=STEP, y=Scale("Rate")))
    assert [title.text for title in page.find_all("title")] == ["step 1: rate 0.5", "step 2: rate 0.25, head 0.125"]
    label = "Rate: rate 0.5 at step 1, 0.25 at step 2; head 0.125 at step 2"
    assert page.find_all("svg")[0].attributes["aria-label"] == label
    assert [path.attributes["class"] for path in page.find_all("path")] == ["line s1", "line s2"]


def test_a_line_keeps_its_colour_where_another_is_missing() -> None:
    lines = [Line("none", [], []), Line("other", [1, 2], [3, 4])]
    page = read_page(chart(lines, name="Loss", x=STEP, y=Scale("Loss")))
    assert page.find_all("path")[0].attributes["class"] == "line s2"


def test_a_band_reaches_as_far_as_the_deviation_but_not_past_all() -> None:
    page = plot([(0.0, 0.9), (10.0, 0.95)], Scale("", kind="share"), low=[0.85, 0.85], high=[0.95, 1.05])
    corners = to_values(page, page.find_all("path", "band")[0].attributes["d"])
    assert np.allclose(corners, [(0, 0.95), (10, 1.0), (10, 0.85), (0, 0.85)], atol=0.002)
    assert page.find_all("title")[0].text == "step 0: loss 90.00% (85.00% to 95.00%)"


@pytest.mark.parametrize("value", [0.0, 7.5, -2.0])
def test_a_single_value_is_a_dot(value: float) -> None:
    page = plot([(5.0, value)])
    assert len(page.find_all("circle")) == 2  # the value, and its mark in the tooltip's strip
    assert curve(page)[0] == pytest.approx((5.0, value), abs=0.03)


def test_a_run_of_no_steps_has_a_scale() -> None:
    assert "step 0: loss 1" in plot([(0.0, 1.0)]).words()


def test_thinning_keeps_spikes_and_gaps_of_a_long_run() -> None:
    values = np.sin(np.arange(100_000.0))
    values[31_234], values[77_777] = 50.0, math.nan
    kept = thin(values)
    assert 400 <= len(kept) <= 1000
    assert {0, 31_234, 77_777, 99_999} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    assert len(thin(np.full(5000, math.nan))) < 1000
    assert thin(np.arange(7.0)).tolist() == list(range(7))
    svg = chart([Line("loss", np.arange(100_000.0), values)], name="Loss", x=STEP, y=Scale("Loss"))
    assert len(svg) < 60_000
    titles = [title.text for title in read_page(svg).find_all("title")]
    assert len(titles) <= 125
    assert "step 31,234: loss 50" in titles


def test_marks_are_ticks_at_the_foot() -> None:
    page = read_page(chart([Line("loss", [0, 10], [1, 2])], name="Loss", x=STEP, y=Scale("Loss"), marks=[5, 5, 10]))
    [path] = page.find_all("path", "mark")
    assert path.attributes["d"].count("M") == 2
    assert page.find_all("svg")[0].attributes["aria-label"].endswith("; 3 marks")


def test_areas_show_the_bins_and_the_threshold() -> None:
    centers, shares = np.array([0.1, 0.3, 0.5]), np.array([0.2, 0.5, 0.3])
    line = Line("genuine", centers, shares, look="genuine", shape="area")
    page = read_page(
        chart([line], name="Scores", x=Scale("cosine", "cosine", (0, 0.6)), y=Scale("", ends=(0,)), threshold=0.42)
    )
    outline = to_values(page, page.find_all("path", "genuine")[0].attributes["d"])
    expected = [(0, 0), (0, 0.2), (0.2, 0.2), (0.2, 0.5), (0.4, 0.5), (0.4, 0.3), (0.6, 0.3), (0.6, 0)]
    assert np.allclose(outline, expected, atol=0.01)
    assert "threshold 0.420" in page.words()
    assert page.find_all("title")[1].text == "cosine 0.3: genuine 0.5"
