"""Margins by themselves: values, gradients, monotony, special cases, and what they refuse.

`tests/head/test_against_oracle.py` has the formulas written out, inside the head.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from partialfc.core.errors import InputError
from partialfc.head.margins import (
    MARGINS,
    AdaFace,
    ArcFace,
    CombinedMargin,
    CosFace,
    CurricularFace,
    ElasticFace,
    MagFace,
    Margin,
    MarginBatch,
    SubCenterArcFace,
)

COSINES = torch.linspace(-0.9999, 0.9999, 401, dtype=torch.float64)
NORMS = torch.linspace(0.01, 150, 401, dtype=torch.float64)


def batch_of(count: int, norms: Tensor | None = None, **state: float) -> MarginBatch:
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in state.items()}
    norms = torch.ones(count, dtype=torch.float64) if norms is None else norms
    return MarginBatch(norms, torch.tensor(7), tensors)


def value_and_slope(margin: Margin, cosine: Tensor, norms: Tensor | None = None) -> tuple[Tensor, Tensor]:
    cosine = cosine.clone().requires_grad_()
    batch = MarginBatch(batch_of(len(cosine), norms).norms, torch.tensor(7), margin.initial_state())
    value = margin.target(cosine, batch)
    (slope,) = torch.autograd.grad(value.sum(), cosine)
    return value.detach(), slope


def test_no_margin_is_the_cosine() -> None:
    value, slope = value_and_slope(Margin(), COSINES)
    assert torch.equal(value, COSINES)
    assert torch.equal(slope, torch.ones_like(COSINES))
    batch = batch_of(2)
    assert Margin().regulariser(batch) is None
    assert Margin().hard_negatives(COSINES[:2], batch) is None
    assert Margin().initial_state() == Margin().updated_state(COSINES[:2], batch) == {}


@pytest.mark.parametrize(
    "margin",
    [
        CosFace(0),
        ArcFace(0),
        CombinedMargin(1, 0, 0),
        AdaFace(0),
        MagFace(l_m=0, u_m=0, lambda_g=0),
        ElasticFace("arc", 0, 0),
        ElasticFace("cos", 0, 0),
        SubCenterArcFace(0, sub_centers=1),
        CurricularFace(0),
    ],
    ids=repr,
)
def test_a_margin_of_zero_is_none(margin: Margin) -> None:
    value, slope = value_and_slope(margin, COSINES, NORMS)
    torch.testing.assert_close(value, COSINES, rtol=0, atol=1e-12)
    torch.testing.assert_close(slope, torch.ones_like(slope), rtol=0, atol=1e-12)
    regulariser = margin.regulariser(batch_of(401, NORMS))
    assert regulariser is None or not regulariser.any()
    assert margin.sub_centers == 1


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
    torch.testing.assert_close(value[~before], (COSINES - m * math.sin(m))[~before], rtol=0, atol=1e-15)
    assert bool(before.any())
    assert bool((~before).any())


def test_straight_through_has_the_value_of_arcface_and_the_slope_of_a_cosine() -> None:
    value, slope = value_and_slope(ArcFace(0.5, "straight_through"), COSINES)
    torch.testing.assert_close(value, value_and_slope(ArcFace(0.5), COSINES)[0], rtol=0, atol=1e-15)
    assert torch.equal(slope, torch.ones_like(slope))


@given(m=st.floats(0, 2.33), m1=st.floats(0.1, 10) | st.just(1.0), m2=st.floats(0, 2.33))
def test_logits_fall_with_the_angle(m: float, m1: float, m2: float) -> None:
    for margin in (ArcFace(m), CombinedMargin(m1, m2, 0.1), MagFace(l_m=m, u_m=2.33), ElasticFace("arc", m, 0)):
        value, slope = value_and_slope(margin, COSINES)
        assert bool((value.diff() > 0).all()), margin
        assert bool((slope > -1e-12).all()), margin  # sin φ is rounded where φ is a multiple of π
    for quality in (-1.0, 0.3, 1.0):  # of AdaFace, whose angle may be negative
        batch = batch_of(401, torch.full_like(COSINES, 20 + 300.1 * quality).clamp(0.001, 100), mean=20, deviation=30)
        assert bool((AdaFace(m).target(COSINES, batch).diff() > -1e-15).all())


@pytest.mark.parametrize("cosine", [-1.0, 1.0])
@pytest.mark.parametrize("name", [name for name in MARGINS if name not in ("none", "cosface")])
def test_margins_are_finite_where_the_sine_is_zero(cosine: float, name: str) -> None:
    value, slope = value_and_slope(MARGINS[name](), torch.tensor([cosine], dtype=torch.float64))
    assert bool(torch.isfinite(value).all())
    assert bool(torch.isfinite(slope).all())


def test_the_combined_margin_has_the_others_as_parts() -> None:
    torch.testing.assert_close(value_and_slope(CombinedMargin(1, 0, 0.4), COSINES), value_and_slope(CosFace(), COSINES))
    for one, other in zip(
        value_and_slope(CombinedMargin(1, 0.5, 0), COSINES), value_and_slope(ArcFace(), COSINES), strict=True
    ):
        torch.testing.assert_close(one, other)
    theta = torch.linspace(0.01, 3.13, 99, dtype=torch.float64)
    sphere, _ = value_and_slope(CombinedMargin(4, 0, 0), theta.cos())
    k = (theta / (math.pi / 4)).floor()
    torch.testing.assert_close(sphere, (-1) ** k * torch.cos(4 * theta) - 2 * k)


def test_adaface_is_a_fixed_margin_for_equal_norms() -> None:
    """ẑ = 0 is CosFace, ẑ = −1 ArcFace, ẑ = 1 takes 2 m from the cosine of a smaller angle."""
    margin, expected = AdaFace(0.5), {-1: ArcFace(0.5), 0: CosFace(0.5)}
    for quality in (-1, 0, 1):
        norms = torch.full_like(COSINES, 50.0 + 30 * quality)
        value = margin.target(COSINES, batch_of(401, norms, mean=50, deviation=1))
        if quality in expected:
            torch.testing.assert_close(value, value_and_slope(expected[quality], COSINES)[0])
        else:
            theta = COSINES.arccos()
            torch.testing.assert_close(value, torch.where(theta < 0.5, 1.0, torch.cos(theta - 0.5)) - 1.0)


def test_adaface_takes_a_batch_in_before_it_uses_it() -> None:
    margin, norms = AdaFace(), torch.tensor([0.0, 30.0, 1e6], dtype=torch.float64, requires_grad=True)
    state = margin.updated_state(COSINES[:3], MarginBatch(norms, torch.tensor(7), margin.initial_state()))
    clipped = torch.tensor([0.001, 30.0, 100.0], dtype=torch.float64)
    assert float(state["mean"]) == pytest.approx(0.99 * 20 + 0.01 * float(clipped.mean()))
    assert float(state["deviation"]) == pytest.approx(0.99 * 100 + 0.01 * float(clipped.std()))
    batch = MarginBatch(norms, torch.tensor(7), state)
    assert not margin.target(COSINES[:3], batch).requires_grad  # nothing flows through the norms
    one = margin.updated_state(COSINES[:1], MarginBatch(clipped[:1], torch.tensor(7), margin.initial_state()))
    assert float(one["deviation"]) == 100


def test_magface_draws_norms_between_its_limits() -> None:
    margin, norms = MagFace(), NORMS.clone().requires_grad_()
    batch = MarginBatch(norms, torch.tensor(7), {})
    value, term = margin.target(torch.full_like(COSINES, 0.5), batch), margin.regulariser(batch)
    slopes = [torch.autograd.grad(part.sum(), norms)[0] for part in (value, term)]
    inside = (NORMS > 10) & (NORMS < 110)
    for slope in slopes:  # the margin asks for small norms, the term for large ones
        assert not slope[~inside].any()
    assert bool((slopes[0][inside] < 0).all())
    assert bool((slopes[1][inside] < 0).all())
    ends = margin.target(torch.tensor([0.5, 0.5]).double(), batch_of(2, torch.tensor([1.0, 1e3]).double()))
    torch.testing.assert_close(ends, torch.cos(math.pi / 3 + torch.tensor([0.45, 0.8]).double()))
    assert float(term[0].detach()) == pytest.approx(35 * (1 / 10 + 10 / 110**2))


def test_elasticface_draws_a_margin_for_each_sample() -> None:
    cosine = torch.zeros(20_000, dtype=torch.float64)
    for margin, mean in ((ElasticFace("cos"), 0.35), (ElasticFace("arc"), 0.5), (ElasticFace("cos", 0.2, 0.1), 0.2)):
        value = margin.target(cosine, batch_of(20_000))
        drawn = -value if margin.form == "cos" else torch.arcsin(-value)
        assert float(drawn.mean()) == pytest.approx(mean, abs=0.003)
        assert float(drawn.std()) == pytest.approx(margin.deviation, rel=0.03)
        assert torch.equal(value, margin.target(cosine, batch_of(20_000)))
    assert float(ElasticFace("arc", 0.1, 5.0).target(cosine, batch_of(20_000)).max()) <= 0


def test_curricularface_raises_what_is_harder_than_the_target() -> None:
    limits, t = CurricularFace(0.5).hard_negatives(COSINES, batch_of(401, t=0.2))
    torch.testing.assert_close(limits, torch.cos(COSINES.arccos() + 0.5))
    assert float(t) == pytest.approx(0.2)
    state = CurricularFace().updated_state(COSINES[300:], batch_of(101, t=0.2))
    assert float(state["t"]) == pytest.approx(0.198 + 0.01 * float(COSINES[300:].mean()))


@pytest.mark.parametrize("name", [name for name in MARGINS if name != "none"])
def test_options_outside_their_meaning_are_refused(name: str) -> None:
    """Every option, with what no option can be, in a sentence that names it."""
    for option in fields(MARGINS[name]):
        for value in (-0.1, math.nan, math.inf, "0.5"):
            with pytest.raises(InputError, match=rf"^{MARGINS[name].__name__}'s {option.name} is .*; it is "):
                MARGINS[name](**{option.name: value})


@pytest.mark.parametrize(
    ("margin", "arguments", "message"),
    [
        (CosFace, {"m": -0.1}, "CosFace's m is -0.1; it is a finite number of at least 0"),
        (ArcFace, {"m": 3.2}, "angle in radians"),
        (ArcFace, {"gradient": "exat"}, "'exact' or 'straight_through'"),
        (CurricularFace, {"gradient": "exat"}, "CurricularFace's gradient"),
        (CombinedMargin, {"m1": 0}, r"in \[0.1, 10\]"),
        (CombinedMargin, {"m2": 4}, "m2 is 4"),
        (AdaFace, {"h": 0}, "h is 0"),
        (AdaFace, {"m": 2.4}, "m is 2.4"),
        (MagFace, {"l_a": 110}, "l_a is 110 and u_a 110.0: l_a is the smaller one"),
        (MagFace, {"l_m": 0.9}, "l_m is 0.9 and u_m 0.8"),
        (MagFace, {"l_a": 0}, "l_a is 0"),
        (ElasticFace, {"form": "sin"}, "'arc' or 'cos'"),
        (ElasticFace, {"m": 3}, "angle in radians"),
        (SubCenterArcFace, {"sub_centers": 0}, "whole number of at least 1"),
        (SubCenterArcFace, {"sub_centers": 2.5}, "whole number of at least 1"),
    ],
)
def test_single_options_are_refused(margin: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        margin(**arguments)
