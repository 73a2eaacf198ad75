"""The sample rate of a training: one number, or a list of [share of the steps, rate]."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from partialfc.core.errors import InputError

SampleRate = float | list[list[float]]
_EXAMPLE = "write for example [[0.8, 0.1], [0.2, 1]]"


def rate_phases(sample_rate: SampleRate) -> list[tuple[float, float]]:
    """The phases of a training in order: share of the steps, and sample rate.

    Raises:
        InputError: the list is no list of pairs, its shares do not sum to 1, or a rate lies outside (0, 1].
    """
    if not isinstance(sample_rate, list):
        return [(1.0, sample_rate)]
    if not sample_rate or not all(_is_pair(phase) for phase in sample_rate):
        raise InputError(f"head.sample_rate is {sample_rate}; a list has pairs of share and rate: {_EXAMPLE}.")
    for share, rate in sample_rate:
        if not (0 < share <= 1 and 0 < rate <= 1):
            raise InputError(f"head.sample_rate has [{share}, {rate}]; share and rate are above 0 and at most 1.")
    total = sum(share for share, _ in sample_rate)
    if abs(total - 1) > 1e-6:
        raise InputError(f"the shares of head.sample_rate sum to {total:g}, not to 1: {_EXAMPLE}.")
    return [(share, rate) for share, rate in sample_rate]


def _is_pair(phase: Any) -> bool:
    return isinstance(phase, list | tuple) and len(phase) == 2 and all(isinstance(part, int | float) for part in phase)


def rate_at(sample_rate: SampleRate, step: int, total_steps: int) -> float:
    """The rate of a step, of which the first is 0: a function of the step, so that a resumed run needs no state."""
    phases = rate_phases(sample_rate)
    ends = [round(end * total_steps) for end in accumulate(share for share, _ in phases)]
    return next((rate for (_, rate), end in zip(phases, ends, strict=True) if step < end), phases[-1][1])


def describe_rate(sample_rate: SampleRate) -> str:
    """The rate in words, such as "0.1" or "0.1 for 80 % of the steps, then 1"."""
    phases = rate_phases(sample_rate)
    parts = [f"{rate:g} for {100 * share:.3g} % of the steps" for share, rate in phases[:-1]]
    return ", then ".join([*parts, f"{phases[-1][1]:g}"])
