"""CurricularFace: ArcFace whose hard negatives weigh more as training proceeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from partialfc.head.margins.arcface import ArcFace
from partialfc.head.margins.base import MarginBatch

_MOMENTUM = 0.01  # weight of a batch in t


@dataclass(frozen=True)
class CurricularFace(ArcFace):
    """Target cos(θ + m); a negative c_j > cos(θ_y + m) becomes c_j (t + c_j) (Huang et al., CVPR 2020, 2004.00288).

    t is the running mean of the target cosines over all ranks, which takes in a batch with weight 0.01 before it uses
    it and starts at 0. No gradient flows through t or through the limit.

    Args:
        m, gradient: as for `ArcFace`.

    Raises:
        InputError: as for `ArcFace`.
    """

    negatives_bound: ClassVar[float] = 2.0

    def hard_negatives(self, target_cosine: Tensor, batch: MarginBatch) -> tuple[Tensor, Tensor]:
        return torch.cos(torch.arccos(target_cosine) + self.m), batch.state["t"]

    def initial_state(self) -> dict[str, Tensor]:
        return {"t": torch.zeros((), dtype=torch.float64)}

    def updated_state(self, target_cosine: Tensor, batch: MarginBatch) -> dict[str, Tensor]:
        return {"t": torch.lerp(batch.state["t"], target_cosine.mean(), _MOMENTUM)}
