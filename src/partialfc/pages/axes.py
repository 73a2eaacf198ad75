"""Axes of a plot: from values to pixels, with ticks at round numbers and labels for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Format = Callable[[float], str]

# A relative spread below this is rounding, and the values are drawn as a constant.
_FLAT = 1e-9


@dataclass(frozen=True)
class Axis:
    """A straight or logarithmic scale.

    Args:
        low, high: values at the two ends, low < high; both positive if `log`.
        start, stop: pixels at the two ends.
        ticks: values that get a mark and a label, within the ends.
        log: whether equal distances are equal ratios.
    """

    low: float
    high: float
    start: float
    stop: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float) -> float:
        """The pixel of a value; values outside the scale lie at its ends."""
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)


def linear_axis(
    low: float, high: float, start: float, stop: float, *, ticks: int = 4, snug: bool = False, least_step: float = 0.0
) -> Axis:
    """A scale that holds `low` to `high`, with about `ticks` steps of 1, 2 or 5 times a power of ten.

    Args:
        low, high: the smallest and the largest value, which may be equal.
        snug: end at these values; otherwise at the ticks around them.
        least_step: the smallest meaningful distance of two ticks.
    """
    if high - low <= _FLAT * max(abs(low), abs(high)):
        low, high = (0.0, 1.0) if low == 0 else (min(0.0, 2 * low), max(0.0, 2 * low))
    step = max(_round_step((high - low) / ticks), least_step)
    first, last = math.floor(low / step + _FLAT), math.ceil(high / step - _FLAT)
    marks = [number * step for number in range(first, last + 1)]
    if snug:
        slack = _FLAT * step
        return Axis(low, high, start, stop, tuple(mark for mark in marks if low - slack <= mark <= high + slack))
    return Axis(marks[0], marks[-1], start, stop, tuple(marks))


def log_axis(low: float, high: float, start: float, stop: float, *, ticks: int = 5) -> Axis:
    """A logarithmic scale over whole decades that hold the positive values `low` to `high`."""
    first = math.floor(math.log10(low) + _FLAT)
    last = max(math.ceil(math.log10(high) - _FLAT), first + 1)
    every = math.ceil((last - first) / ticks)
    marks = tuple(10.0**decade for decade in range(first, last + 1, every))
    return Axis(10.0**first, 10.0**last, start, stop, marks, log=True)


def _round_step(wanted: float) -> float:
    """The number among 1, 2 and 5 times a power of ten that is closest to `wanted` by ratio."""
    power = 10.0 ** math.floor(math.log10(wanted))
    return min((factor * power for factor in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / wanted)))


def number_format(step: float) -> Format:
    """The format of values that are `step` apart: 0.25, 1,500, 2.5M, 3e-6."""
    if step < 1e-4 or step >= 1e10:
        return lambda value: _short_exponent(f"{value:.3g}") if value else "0"
    if step >= 1e5:
        return lambda value: f"{value / 1e6:,.{_decimals(step / 1e6)}f}M" if value else "0"
    return lambda value: f"{value:,.{_decimals(step)}f}" if abs(value) >= step / 2 else "0"


def percent_format(step: float) -> Format:
    """The format of shares that are `step` apart, as percentages."""
    decimals = min(_decimals(100 * step), 4)
    return lambda value: f"{100 * value:.{decimals}f}%"


def decade_format(value: float) -> str:
    """A power of ten: 0.001 to 1,000 as they are, 1e-4 beyond."""
    return f"{value:,.{_decimals(value)}f}" if 1e-3 <= value < 1e4 else _short_exponent(f"{value:.0e}")


def value_format(value: float) -> str:
    """A single value with four digits, for a label or a tooltip."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return _short_exponent(f"{value:.4g}")


def _decimals(step: float) -> int:
    """Digits after the point that tell multiples of a round step apart."""
    return max(0, -math.floor(math.log10(step) + _FLAT))


def _short_exponent(text: str) -> str:
    """1e-05 as 1e-5."""
    mantissa, mark, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if mark else text
