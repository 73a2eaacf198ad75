"""CosFace: the cosine minus a constant."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

from torch import Tensor

from partialfc.core.errors import InputError
from partialfc.head.margins.base import Margin, MarginBatch


@dataclass(frozen=True)
class CosFace(Margin):
    """cos θ − m (Wang et al., CVPR 2018, arXiv 1801.09414, eq. 4).

    Raises:
        InputError: m is not a finite number >= 0.
    """

    m: float = 0.4

    def __post_init__(self) -> None:
        if not (isinstance(self.m, Real) and math.isfinite(self.m) and self.m >= 0):
            raise InputError(f"CosFace's margin is {self.m!r}; it must be a finite number of at least 0, such as 0.4.")

    def target(self, cosine: Tensor, batch: MarginBatch) -> Tensor:
        return cosine - self.m
