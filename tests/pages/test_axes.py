"""Axes: ticks at round numbers, labels that tell them apart, values at their pixels."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partialfc.pages.axes import (
    decade_format,
    linear_axis,
    log_axis,
    number_format,
    percent_format,
    value_format,
)

VALUES = st.floats(-1e9, 1e9, allow_subnormal=False).map(lambda value: value if abs(value) > 1e-9 else 0.0)


@settings(deadline=None, max_examples=200)
@given(VALUES, VALUES, st.booleans())
def test_a_linear_axis_holds_its_values_and_has_labels_that_differ(one: float, other: float, snug: bool) -> None:
    low, high = sorted((one, other))
    axis = linear_axis(low, high, 100.0, 20.0, snug=snug)
    slack = 1e-6 * (axis.high - axis.low)
    assert axis.low - slack <= low
    assert axis.high + slack >= high
    assert 2 <= len(axis.ticks) <= 9
    labels = [number_format(axis.ticks[1] - axis.ticks[0])(tick) for tick in axis.ticks]
    if high - low > 1e-2 * max(abs(low), abs(high)):
        assert len(set(labels)) == len(labels)
    assert axis.place(axis.low) == 100.0
    assert axis.place(axis.high) == pytest.approx(20.0)
    assert all(20.0 <= axis.place(tick) <= 100.0 for tick in axis.ticks)


@pytest.mark.parametrize("value", [0.0, 3.0, -0.25, 1e-9])
def test_a_constant_gets_a_scale_around_it(value: float) -> None:
    axis = linear_axis(value, value, 0.0, 1.0)
    assert axis.low <= value <= axis.high
    assert axis.low <= 0 <= axis.high
    assert len(axis.ticks) >= 3


def test_steps_of_a_short_run_have_whole_ticks() -> None:
    assert linear_axis(0.0, 2.0, 0.0, 1.0, snug=True, least_step=1.0).ticks == (0.0, 1.0, 2.0)


@pytest.mark.parametrize(("low", "high", "decades"), [(0.02, 3.0, 3), (1.0, 1.0, 1), (1e-12, 1.0, 12), (0.01, 1.0, 2)])
def test_a_logarithmic_axis_covers_whole_decades(low: float, high: float, decades: int) -> None:
    axis = log_axis(low, high, 0.0, 10.0)
    assert math.log10(axis.high / axis.low) == pytest.approx(decades)
    assert axis.low <= low * (1 + 1e-9)
    assert axis.high >= high
    middle = math.sqrt(axis.low * axis.high)
    assert axis.place(middle) == pytest.approx(5.0)
    assert len(axis.ticks) <= 6


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number_format(0.05)(0.25), "0.25"),
        (number_format(500.0)(1500.0), "1,500"),
        (number_format(500_000.0)(2_500_000.0), "2.5M"),
        (number_format(2e-6)(4e-6), "4e-6"),
        (number_format(0.1)(1e-18), "0"),
        (percent_format(0.005)(0.985), "98.5%"),
        (percent_format(0.2)(0.4), "40%"),
        (decade_format(0.001), "0.001"),
        (decade_format(1e-5), "1e-5"),
        (decade_format(1000.0), "1,000"),
        (value_format(0.0), "0"),
        (value_format(13.0871), "13.09"),
        (value_format(123456.0), "123,456"),
        (value_format(1.78e-5), "1.78e-5"),
    ],
)
def test_how_numbers_are_written(text: str, expected: str) -> None:
    assert text == expected
