"""The learning rate, a pure function of the step: a resumed run needs no other state."""

from __future__ import annotations

import math
from typing import Literal

from partialfc.core.errors import InputError

Schedule = Literal["polynomial", "cosine", "constant"]


def learning_rate(
    step: int,
    *,
    base: float,
    total_steps: int,
    warmup_steps: int = 0,
    schedule: Schedule = "polynomial",
    power: float = 2.0,
) -> float:
    """The learning rate of optimizer step `step`, the first step being 0.

    In the warm-up, step s has base · (s + 1) / warmup_steps: no step is wasted on a rate of 0, and the last one has
    `base`. After it, with p = (s - warmup_steps) / (total_steps - warmup_steps) in [0, 1):

    - polynomial: base · (1 - p) ** power. The published logs of Partial FC (arXiv 2203.15565) have power 2.
    - cosine: base · (1 + cos(π p)) / 2 (SGDR, arXiv 1608.03983, without restarts).
    - constant: base.

    From step total_steps on, the rate is 0 (constant: base).

    Args:
        step: 0 or more.
        base: the highest rate.
        total_steps: optimizer steps of the whole training, warm-up included.
        warmup_steps: steps of linear warm-up; 0 for none.
        schedule: the decay after the warm-up.
        power: exponent of the polynomial decay.

    Raises:
        InputError: the training has no steps, or none after the warm-up.
        ValueError: a negative step, or an unknown schedule.
    """
    if total_steps < 1:
        raise InputError(f"A training of {total_steps} steps has no learning rate: train for more epochs.")
    if not 0 <= warmup_steps < total_steps:
        raise InputError(
            f"The warm-up of {warmup_steps} steps leaves nothing of the {total_steps} steps of the training: "
            "shorten the warm-up or train for more epochs."
        )
    if step < 0:
        raise ValueError(f"step must not be negative, but is {step}")
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    if schedule == "polynomial":
        return base * (1.0 - progress) ** power
    if schedule == "cosine":
        return base * (1.0 + math.cos(math.pi * progress)) / 2.0
    if schedule == "constant":
        return base
    raise ValueError(f"unknown schedule {schedule!r}")
