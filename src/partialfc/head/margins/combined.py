"""The combined margin: a factor on the angle, an angle added to it, and a constant taken from its cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.head.margins.base import Margin, MarginBatch, add_angle, check_angle, check_range

_LARGEST_FACTOR = 10.0


@dataclass(frozen=True)
class CombinedMargin(Margin):
    """cos(m1 θ + m2) − m3 (Deng et al., CVPR 2019, arXiv 1801.07698, eq. 4).

    m1 alone is SphereFace (Liu et al., CVPR 2017, arXiv 1704.08063), m2 alone ArcFace, m3 alone CosFace. Where
    φ = m1 θ + m2 passes a multiple of π, the cosine would turn. With m1 = 1 it continues as ArcFace does (`add_angle`),
    otherwise as SphereFace's (−1)^k cos φ − 2k on [kπ, (k + 1)π], which falls everywhere.

    Args:
        m1: factor of the angle, in [0.1, 10]; 1 for none.
        m2: angle in radians, in [0, 2.33].
        m3: a cosine of at least 0.

    Raises:
        InputError: a value is out of its range.
    """

    m1: float = 1.0
    m2: float = 0.3
    m3: float = 0.2

    def __post_init__(self) -> None:
        check_range(self, 0.1, _LARGEST_FACTOR, m1=self.m1)
        check_angle(self, m2=self.m2)
        check_range(self, 0, math.inf, m3=self.m3)

    def target(self, cosine: Tensor, batch: MarginBatch) -> Tensor:
        if self.m1 == 1:
            return add_angle(cosine, torch.full_like(cosine, self.m2)) - self.m3
        # arccos has an infinite gradient at 0 and π; the floor on sin² θ keeps this one finite.
        theta = torch.atan2(torch.sqrt((1.0 - cosine.square()).clamp_min(1e-12)), cosine)
        phi = self.m1 * theta + self.m2
        turns = torch.floor(phi.detach() / math.pi)
        sign = 1.0 - 2.0 * (turns % 2)
        return sign * torch.cos(phi) - 2.0 * turns - self.m3
