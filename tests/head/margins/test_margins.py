"""Margins by themselves: values, gradients, monotony, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from partialfc.core.errors import InputError
from partialfc.head.margins import ArcFace, CosFace, Margin, MarginBatch

COSINES = torch.linspace(-0.9999, 0.9999, 401, dtype=torch.float64)


def batch_of(count: int) -> MarginBatch:
    return MarginBatch(norms=torch.ones(count, dtype=torch.float64), key=0, state={})


def value_and_slope(margin: Margin, cosine: Tensor) -> tuple[Tensor, Tensor]:
    cosine = cosine.clone().requires_grad_()
    value = margin.target(cosine, batch_of(len(cosine)))
    (slope,) = torch.autograd.grad(value.sum(), cosine)
    return value.detach(), slope


def test_no_margin_is_the_cosine() -> None:
    value, slope = value_and_slope(Margin(), COSINES)
    assert torch.equal(value, COSINES)
    assert torch.equal(slope, torch.ones_like(COSINES))
    batch = batch_of(2)
    assert Margin().regulariser(batch) is None
    assert Margin().initial_state() == Margin().updated_state(COSINES[:2], batch) == {}
    assert Margin().negatives(COSINES, COSINES, batch) is COSINES


def test_cosface_lowers_the_cosine() -> None:
    value, slope = value_and_slope(CosFace(0.35), COSINES)
    assert torch.equal(value, COSINES - 0.35)
    assert torch.equal(slope, torch.ones_like(COSINES))


def test_arcface_turns_the_angle_up_to_its_continuation() -> None:
    m = 0.5
    value, slope = value_and_slope(ArcFace(m), COSINES)
    theta = COSINES.arccos()
    before = theta < math.pi - m
    torch.testing.assert_close(value[before], torch.cos(theta + m)[before], rtol=0, atol=1e-12)
    torch.testing.assert_close(slope[before], (torch.sin(theta + m) / torch.sin(theta))[before], rtol=1e-10, atol=0)
    torch.testing.assert_close(value[~before], (COSINES - m * math.sin(m))[~before], rtol=0, atol=0)
    assert bool(before.any())
    assert bool((~before).any())


def test_straight_through_has_the_value_of_arcface_and_the_slope_of_a_cosine() -> None:
    value, slope = value_and_slope(ArcFace(0.5, "straight_through"), COSINES)
    torch.testing.assert_close(value, value_and_slope(ArcFace(0.5), COSINES)[0], rtol=0, atol=1e-15)
    assert torch.equal(slope, torch.ones_like(slope))


@given(m=st.floats(0, 2.33))
def test_arcface_falls_with_the_angle(m: float) -> None:
    value, slope = value_and_slope(ArcFace(m), COSINES)
    assert bool((value.diff() > 0).all())
    assert bool((slope >= 0).all())


@pytest.mark.parametrize("cosine", [-1.0, 1.0])
def test_arcface_is_finite_where_the_sine_is_zero(cosine: float) -> None:
    value, slope = value_and_slope(ArcFace(0.5), torch.tensor([cosine], dtype=torch.float64))
    assert bool(torch.isfinite(value).all())
    assert bool(torch.isfinite(slope).all())


@pytest.mark.parametrize("m", [-0.1, math.nan, math.inf])
def test_cosface_refuses(m: float) -> None:
    with pytest.raises(InputError, match="CosFace's margin is"):
        CosFace(m)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"m": -0.1}, "angle in radians"),
        ({"m": 3.2}, "angle in radians"),
        ({"m": math.nan}, "angle in radians"),
        ({"gradient": "exat"}, "'exact' or 'straight_through'"),
    ],
)
def test_arcface_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ArcFace(**arguments)
