"""Margins: from the cosine between an embedding and its own class center to the target's logit.

A margin is a small immutable object. The head hands it float64 vectors over the global batch (only B x D work stands
behind them) and differentiates what it returns with autograd, so a new margin is its formula and nothing else.
Everything is returned before multiplication with the scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from partialfc.core.errors import InputError


@dataclass(frozen=True)
class MarginBatch:
    """What a margin may look at besides the target cosine; the same on every rank.

    Attributes:
        norms: (G,) float64, the lengths of the embeddings before normalisation.
        key: the key of this step's noise, for `keyed_random` with `places` as counters.
        state: the margin's own running figures, as `Margin.initial_state` named them.
        first_sample: the first sample's place among all of the optimizer step, which may be cut into micro-steps.
    """

    norms: Tensor
    key: int
    state: dict[str, Tensor]
    first_sample: int = 0

    @property
    def places(self) -> Tensor:
        """(G,) int64, each sample's place in its optimizer step, however the step is cut."""
        return torch.arange(self.first_sample, self.first_sample + len(self.norms), device=self.norms.device)


@dataclass(frozen=True)
class Margin:
    """The protocol that the head speaks with every margin; by itself the plain normalised softmax (no margin).

    A subclass overrides `target` and, only if it has them, the parts below it.

    Class attributes a subclass may set:
        negatives_bound: the largest absolute value that `negatives` returns; the head needs no running maximum while
            scale times this bound fits the compute dtype.
        reweights_negatives: whether `negatives` does anything; plain cosines take the faster path.
        sub_centers: centers a class; its cosine is that of the nearest one (Deng et al., ECCV 2020).
        updates: the ways of updating the centers that the margin works with.
    """

    negatives_bound: ClassVar[float] = 1.0
    reweights_negatives: ClassVar[bool] = False
    sub_centers: ClassVar[int] = 1
    updates: ClassVar[frozenset[str]] = frozenset({"sparse", "deferred"})

    def target(self, cosine: Tensor, batch: MarginBatch) -> Tensor:
        """(G,) target logits from (G,) target cosines, float64, by differentiable operations."""
        return cosine

    def negatives(self, cosine: Tensor, target_cosine: Tensor, batch: MarginBatch) -> Tensor:
        """(G, s) logits of negatives from their cosines and (G, 1) target cosines, differentiable in `cosine`."""
        return cosine

    def regulariser(self, batch: MarginBatch) -> Tensor | None:
        """(G,) terms added to the samples' losses, differentiable in `batch.norms`; None for none."""
        return None

    def initial_state(self) -> dict[str, Tensor]:
        """Running figures that the head keeps as buffers and checkpoints; named tensors of float64."""
        return {}

    def updated_state(self, target_cosine: Tensor, batch: MarginBatch) -> dict[str, Tensor]:
        """The state that takes a batch in, before the batch's own logits are computed with it (training only).

        `batch.state` is the former one. It sees the global batch, so all ranks compute the same.
        """
        return batch.state


@dataclass(frozen=True)
class CosFace(Margin):
    """cos θ − m (Wang et al., CVPR 2018, arXiv 1801.09414, eq. 4).

    Raises:
        InputError: m is not a finite number >= 0.
    """

    m: float = 0.4

    def __post_init__(self) -> None:
        if not (math.isfinite(self.m) and self.m >= 0):
            raise InputError(f"CosFace's margin is {self.m}; it must be a finite number of at least 0, such as 0.4.")

    def target(self, cosine: Tensor, batch: MarginBatch) -> Tensor:
        return cosine - self.m


@dataclass(frozen=True)
class ArcFace(Margin):
    """cos(θ + m) (Deng et al., CVPR 2019, arXiv 1801.07698, eq. 3).

    Past θ = π − m, where cos(θ + m) turns upwards, it goes on as cos θ − m·sin m, so that it falls everywhere.

    Args:
        m: the margin in radians, in [0, π).
        gradient: "exact" is sin(θ + m) / sin θ; "straight_through" is 1, as in the reference implementation, which
            computes the margin outside autograd.

    Raises:
        InputError: m lies outside [0, π), or the gradient is unknown.
    """

    m: float = 0.5
    gradient: Literal["exact", "straight_through"] = "exact"

    def __post_init__(self) -> None:
        if not 0 <= self.m < math.pi:
            raise InputError(f"ArcFace's margin is {self.m}; it is an angle in radians in [0, π), such as 0.5.")
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
