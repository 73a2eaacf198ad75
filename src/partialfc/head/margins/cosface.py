"""CosFace: the cosine minus a constant."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from partialfc.head.margins.base import Margin, MarginBatch, check_range


@dataclass(frozen=True)
class CosFace(Margin):
    """cos θ − m (Wang et al., CVPR 2018, arXiv 1801.09414, eq. 4).

    Args:
        m: the margin, a cosine of at least 0.

    Raises:
        InputError: m is not a finite number >= 0.
    """

    m: float = 0.4

    def __post_init__(self) -> None:
        check_range(self, 0, math.inf, m=self.m)

    def target(self, cosine: Tensor, batch: MarginBatch) -> Tensor:
        return cosine - self.m
