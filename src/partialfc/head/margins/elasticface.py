"""ElasticFace: a margin drawn anew for each sample in each step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from partialfc.core import keyed_random
from partialfc.core.errors import InputError
from partialfc.head.margins.base import LARGEST_ANGLE, Margin, MarginBatch, add_angle, check_angle, check_range

_USUAL_MEAN = {"arc": 0.5, "cos": 0.35}


@dataclass(frozen=True)
class ElasticFace(Margin):
    """cos(θ + e) or cos θ − e, with e ~ N(m, σ) for each sample (Boutros et al., CVPRW 2022, arXiv 2109.09416).

    The draw is a function of (seed, step, position of the sample in the global batch). In the arc form it is clipped
    to [0, 2.33], and the logit continues past θ = π − e as ArcFace's does.

    Args:
        form: "arc" or "cos".
        m: mean of the margin; None is 0.5 for arc and 0.35 for cos.
        deviation: σ, at least 0.

    Raises:
        InputError: a value is out of its range.
    """

    form: Literal["arc", "cos"] = "arc"
    m: float | None = None
    deviation: float = 0.0125

    def __post_init__(self) -> None:
        if self.form not in _USUAL_MEAN:
            raise InputError(f"ElasticFace's form is {self.form!r}; it is 'arc' or 'cos'.")
        if self.form == "arc":
            check_angle(self, m=self._mean)
        check_range(self, 0, math.inf, m=self._mean, deviation=self.deviation)

    @property
    def _mean(self) -> float:
        return _USUAL_MEAN[self.form] if self.m is None else self.m

    def target(self, cosine: Tensor, batch: MarginBatch) -> Tensor:
        margin = self._mean + self.deviation * keyed_random.normal(batch.key, batch.places)
        return cosine - margin if self.form == "cos" else add_angle(cosine, margin.clamp(0.0, LARGEST_ANGLE))
