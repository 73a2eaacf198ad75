"""ArcFace: the cosine of the angle plus a constant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from partialfc.core.errors import InputError
from partialfc.head.margins.base import Margin, MarginBatch, add_angle, check_angle


@dataclass(frozen=True)
class ArcFace(Margin):
    """cos(θ + m) (Deng et al., CVPR 2019, arXiv 1801.07698, eq. 3), past θ = π − m continued as in `add_angle`.

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
        check_angle(self, m=self.m)
        if self.gradient not in ("exact", "straight_through"):
            name = type(self).__name__
            raise InputError(f"{name}'s gradient is {self.gradient!r}; it is 'exact' or 'straight_through'.")

    def target(self, cosine: Tensor, batch: MarginBatch) -> Tensor:
        value = add_angle(cosine, torch.full_like(cosine, self.m))
        if self.gradient == "straight_through":
            return cosine + (value - cosine).detach()
        return value
