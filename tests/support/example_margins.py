"""Margins after published ones, one for each seam of the protocol; each with its own dense oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from reference import arcface, arcface_logit
from torch import Tensor

from partialfc.core import keyed_random
from partialfc.head.margins import ArcFace, Margin, MarginBatch


@dataclass(frozen=True)
class Curricular(ArcFace):
    """Re-weights hard negatives by a running mean of target cosines (Huang et al., CVPR 2020, arXiv 2004.00288)."""

    negatives_bound: ClassVar[float] = 2.0
    reweights_negatives: ClassVar[bool] = True

    def negatives(self, cosine: Tensor, target_cosine: Tensor, batch: MarginBatch) -> Tensor:
        hard = cosine > torch.cos(torch.arccos(target_cosine) + self.m)
        return torch.where(hard, cosine * (batch.state["t"] + cosine), cosine)

    def initial_state(self) -> dict[str, Tensor]:
        return {"t": torch.tensor(0.3, dtype=torch.float64)}

    def updated_state(self, target_cosine: Tensor, batch: MarginBatch) -> dict[str, Tensor]:
        return {"t": 0.99 * batch.state["t"] + 0.01 * target_cosine.mean()}


def curricular_oracle(m: float, t: float) -> dict[str, Any]:
    def negatives(cosine: Tensor, target_cosine: Tensor) -> Tensor:
        return torch.where(cosine > torch.cos(torch.arccos(target_cosine) + m), cosine * (t + cosine), cosine)

    return {"target": arcface(m), "negatives": negatives}


@dataclass(frozen=True)
class Magnitude(Margin):
    """A margin that grows with the embedding's norm, and a regulariser of it (MagFace, CVPR 2021, 2103.06627)."""

    least: float = 0.1
    slope: float = 0.02
    updates: ClassVar[frozenset[str]] = frozenset({"sparse", "deferred"})

    def target(self, cosine: Tensor, batch: MarginBatch) -> Tensor:
        m = self.least + self.slope * batch.norms
        sine = torch.sqrt(1 - cosine.square())
        beyond = cosine < -torch.cos(m)
        return torch.where(beyond, cosine - m * m.sin(), cosine * m.cos() - sine * m.sin())

    def regulariser(self, batch: MarginBatch) -> Tensor:
        return 0.5 * (batch.norms / 100 + 1 / batch.norms)


def magnitude_oracle(least: float, slope: float) -> dict[str, Any]:
    return {
        "target": lambda cosine, norms: arcface_logit(cosine, least + slope * norms),
        "regulariser": lambda norms: 0.5 * (norms / 100 + 1 / norms),
    }


@dataclass(frozen=True)
class Noisy(Margin):
    """A margin drawn for each sample (ElasticFace, CVPRW 2022, arXiv 2109.09416)."""

    mean: float = 0.35
    deviation: float = 0.05

    def target(self, cosine: Tensor, batch: MarginBatch) -> Tensor:
        return cosine - self.mean - self.deviation * keyed_random.normal(batch.key, batch.places)


def noise(key: int, count: int) -> Tensor:
    return keyed_random.normal(key, torch.arange(count))


def noisy_oracle(mean: float, deviation: float, seed: int, step: int) -> dict[str, Any]:
    key = keyed_random.derive_key(seed, "margin", step)
    return {"target": lambda cosine, norms: cosine - mean - deviation * noise(key, len(cosine))}


@dataclass(frozen=True)
class ThreeCenters(ArcFace):
    """Three centers a class, of which the nearest counts (Deng et al., ECCV 2020)."""

    m: float = math.pi / 10
    sub_centers: ClassVar[int] = 3


@dataclass(frozen=True)
class OnlySparse(Margin):
    """A margin that does not work with every update."""

    updates: ClassVar[frozenset[str]] = frozenset({"sparse"})
