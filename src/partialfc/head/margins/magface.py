"""MagFace: a margin that grows with the embedding's norm, and a term that draws the norm up."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from partialfc.core.errors import InputError
from partialfc.head.margins.base import Margin, MarginBatch, add_angle, check_angle, check_range


@dataclass(frozen=True)
class MagFace(Margin):
    """cos(θ + m(a)), plus λ_g g(a) in the loss of a sample (Meng et al., CVPR 2021, arXiv 2103.06627).

    a is the embedding's norm, clipped to [l_a, u_a], m(a) = (u_m − l_m) / (u_a − l_a) (a − l_a) + l_m, and
    g(a) = 1 / a + a / u_a². The gradient flows through the norm in both. Past θ = π − m(a) the logit continues as
    ArcFace's does; the authors' code has the plain cosine for θ > π / 2 instead.

    Args:
        l_a, u_a: limits of the norm, 0 < l_a < u_a.
        l_m, u_m: margins at these limits, angles in [0, 2.33].
        lambda_g: weight of g, at least 0.

    Raises:
        InputError: a value is out of its range.
    """

    l_a: float = 10.0
    u_a: float = 110.0
    l_m: float = 0.45
    u_m: float = 0.8
    lambda_g: float = 35.0

    def __post_init__(self) -> None:
        check_range(self, math.ulp(0), math.inf, l_a=self.l_a, u_a=self.u_a)
        check_angle(self, l_m=self.l_m, u_m=self.u_m)
        check_range(self, 0, math.inf, lambda_g=self.lambda_g)
        for low, high in (("l_a", "u_a"), ("l_m", "u_m")):
            least, most = getattr(self, low), getattr(self, high)
            if least > most or (low == "l_a" and least == most):
                raise InputError(f"MagFace's {low} is {least!r} and {high} {most!r}: {low} is the smaller one.")

    def target(self, cosine: Tensor, batch: MarginBatch) -> Tensor:
        slope = (self.u_m - self.l_m) / (self.u_a - self.l_a)
        return add_angle(cosine, slope * (self._clipped(batch.norms) - self.l_a) + self.l_m)

    def regulariser(self, batch: MarginBatch) -> Tensor:
        a = self._clipped(batch.norms)
        return self.lambda_g * (1 / a + a / self.u_a**2)

    def _clipped(self, norms: Tensor) -> Tensor:
        return norms.clamp(self.l_a, self.u_a)
