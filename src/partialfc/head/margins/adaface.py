"""AdaFace: a margin that adapts to the quality of an image, of which the embedding's norm is the measure."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.head.margins.base import Margin, MarginBatch, add_angle, check_angle, check_range

_MOMENTUM = 0.01  # weight of a batch in the running figures
_SMALLEST_NORM, _LARGEST_NORM = 0.001, 100.0
_EPSILON = 0.001


@dataclass(frozen=True)
class AdaFace(Margin):
    """cos(θ − m ẑ) − (m + m ẑ) with ẑ = clip(h (‖z‖ − μ) / σ, −1, 1) (Kim et al., CVPR 2022, arXiv 2204.00964).

    Images of low norm (ẑ = −1) get ArcFace's margin, average ones CosFace's, and those of high norm a margin that asks
    most of hard samples. μ and σ are running mean and deviation of the norms over all ranks, which take in a batch
    with weight 0.01 before it uses them and start at 20 and 100, as the authors' code does. Norms are clipped to
    [0.001, 100], and no gradient flows through them.

    Args:
        m: the margin, an angle in [0, 2.33].
        h: how soon ẑ reaches its ends, above 0: at h = 0.333, three deviations from the mean.

    Raises:
        InputError: a value is out of its range.
    """

    m: float = 0.4
    h: float = 0.333

    def __post_init__(self) -> None:
        check_angle(self, m=self.m)
        check_range(self, math.ulp(0), math.inf, h=self.h)

    def target(self, cosine: Tensor, batch: MarginBatch) -> Tensor:
        mean, deviation = batch.state["mean"], batch.state["deviation"]
        quality = (self.h * (_clipped(batch.norms) - mean) / (deviation + _EPSILON)).clamp(-1.0, 1.0)
        return add_angle(cosine, -self.m * quality) - self.m * (1.0 + quality)

    def initial_state(self) -> dict[str, Tensor]:
        return {
            "mean": torch.tensor(20.0, dtype=torch.float64),
            "deviation": torch.tensor(100.0, dtype=torch.float64),
        }

    def updated_state(self, target_cosine: Tensor, batch: MarginBatch) -> dict[str, Tensor]:
        norms, state = _clipped(batch.norms), batch.state
        deviation = norms.std() if len(norms) > 1 else state["deviation"]  # one norm has none
        return {
            "mean": torch.lerp(state["mean"], norms.mean(), _MOMENTUM),
            "deviation": torch.lerp(state["deviation"], deviation, _MOMENTUM),
        }


def _clipped(norms: Tensor) -> Tensor:
    return norms.detach().clamp(_SMALLEST_NORM, _LARGEST_NORM)
