"""The learning rate, against values worked out by hand and the properties that its documentation promises."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partialfc.core.errors import InputError
from partialfc.training.schedule import Schedule, learning_rate


def rates(schedule: Schedule, total: int, warmup: int, power: float = 2.0) -> list[float]:
    return [
        learning_rate(step, base=0.4, total_steps=total, warmup_steps=warmup, schedule=schedule, power=power)
        for step in range(total + 2)
    ]


def test_polynomial_by_hand() -> None:
    # Two steps of warm-up, then 0.4 · (1 - 0)², 0.4 · (1 - 1/4)², 0.4 · (1 - 2/4)², 0.4 · (1 - 3/4)², and nothing.
    assert rates("polynomial", 6, 2) == pytest.approx([0.2, 0.4, 0.4, 0.225, 0.1, 0.025, 0.0, 0.0])


def test_linear_is_the_polynomial_of_power_one() -> None:
    assert rates("polynomial", 4, 0, power=1.0) == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0, 0.0])


def test_cosine_by_hand() -> None:
    half = 0.2 * (1 + math.cos(math.pi / 4))
    assert rates("cosine", 4, 0) == pytest.approx([0.4, half, 0.2, 0.4 - half, 0.0, 0.0])


def test_constant_by_hand() -> None:
    assert rates("constant", 4, 2) == pytest.approx([0.2, 0.4, 0.4, 0.4, 0.4, 0.4])


@settings(deadline=None)
@given(
    schedule=st.sampled_from(["polynomial", "cosine", "constant"]),
    total=st.integers(1, 200),
    data=st.data(),
    power=st.floats(0.1, 4.0),
)
def test_rises_to_the_base_and_never_again(schedule: Schedule, total: int, data: st.DataObject, power: float) -> None:
    warmup = data.draw(st.integers(0, total - 1))
    values = rates(schedule, total, warmup, power)
    rise, fall = values[:warmup], values[warmup:]
    assert all(0.0 < low < high for low, high in pairwise(rise))
    assert fall[0] == pytest.approx(0.4)
    assert values[warmup - 1 if warmup else 0] == pytest.approx(0.4)
    assert all(low <= high for high, low in pairwise(fall))
    assert all(value > 0.0 for value in values[:total])


def test_default_is_the_published_recipe_without_warm_up() -> None:
    assert learning_rate(5, base=1.0, total_steps=10) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("total", "warmup", "message"),
    [
        (0, 0, "A training of 0 steps has no learning rate"),
        (5, 5, "The warm-up of 5 steps leaves nothing of the 5 steps"),
        (5, 9, "shorten the warm-up or train for more epochs"),
        (5, -1, "The warm-up of -1 steps"),
    ],
)
def test_an_impossible_training_is_the_users_mistake(total: int, warmup: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        learning_rate(0, base=0.1, total_steps=total, warmup_steps=warmup)


def test_an_impossible_call_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="step must not be negative"):
        learning_rate(-1, base=0.1, total_steps=5)
    with pytest.raises(ValueError, match="unknown schedule 'step'"):
        learning_rate(0, base=0.1, total_steps=5, schedule="step")  # type: ignore[arg-type]
