"""ArcFace: the cosine of the angle plus a constant."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from partialfc.core.errors import InputError
from partialfc.head.margins.base import Margin, MarginBatch


@dataclass(frozen=True)
class ArcFace(Margin):
    """cos(θ + m) (Deng et al., CVPR 2019, arXiv 1801.07698, eq. 3).

    Past θ = π − m, where cos(θ + m) would rise, it continues as cos θ − m·sin m, so that it decreases everywhere.

    Args:
        m: the margin in radians, in [0, 2.33]: past that the continuation would begin above cos π, and the logit rise.
        gradient: "exact" is sin(θ + m) / sin θ; "straight_through" is 1, as in the reference implementation, which
            computes the margin outside autograd.

    Raises:
        InputError: m lies outside [0, 2.33], or the gradient is unknown.
    """

    m: float = 0.5
    gradient: Literal["exact", "straight_through"] = "exact"

    def __post_init__(self) -> None:
        # At θ = π − m the continuation is −cos m − m·sin m, which must not exceed cos π.
        if not (
            isinstance(self.m, Real) and 0 <= self.m < math.pi and math.cos(self.m) + self.m * math.sin(self.m) >= 1
        ):
            raise InputError(f"ArcFace's margin is {self.m!r}; it is an angle in radians in [0, 2.33], such as 0.5.")
        if self.gradient not in ("exact", "straight_through"):
            raise InputError(f"ArcFace's gradient is {self.gradient!r}; it is 'exact' or 'straight_through'.")

    def target(self, cosine: Tensor, batch: MarginBatch) -> Tensor:
        # At θ = 0 the exact gradient is infinite; the floor on sin² θ keeps it finite there.
        sine = torch.sqrt((1.0 - cosine.square()).clamp_min(1e-12))
        with_margin = cosine * math.cos(self.m) - sine * math.sin(self.m)
        beyond = cosine < -math.cos(self.m)
        value = torch.where(beyond, cosine - self.m * math.sin(self.m), with_margin)
        if self.gradient == "straight_through":
            return cosine + (value - cosine).detach()
        return value
