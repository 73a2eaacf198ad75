"""The protocol of a margin: it turns the cosine between an embedding and its own class center into the target logit.

A margin is a small immutable object. The head passes it float64 vectors over the global batch and differentiates the
result with autograd, so a new margin is its formula and nothing else. Logits are returned before the scale is applied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor

from partialfc.core.errors import InputError

# At θ = π − m the continuation of `add_angle` is −cos m − m·sin m, which must not exceed cos π: m is at most 2.331.
LARGEST_ANGLE = 2.33


@dataclass(frozen=True)
class MarginBatch:
    """The inputs of a margin beside the target cosine; the same on every rank.

    Attributes:
        norms: (G,) float64 norms of the embeddings.
        key: () int64, the key of this step's noise, for `keyed_random` with `places` as counters.
        state: the margin's running figures, by the names of `Margin.initial_state`.
        first_sample: the position of the first sample in its optimizer step, which may consist of several micro-steps.
    """

    norms: Tensor
    key: Tensor
    state: dict[str, Tensor]
    first_sample: int = 0

    @property
    def places(self) -> Tensor:
        """(G,) int64, the position of each sample in its optimizer step, however the step is split."""
        return torch.arange(self.first_sample, self.first_sample + len(self.norms), device=self.norms.device)


@dataclass(frozen=True)
class Margin:
    """Base class of all margins; by itself the plain normalised softmax, without a margin.

    A subclass overrides `target` and, if it needs them, the methods below it.

    Class attributes:
        negatives_bound: the largest absolute value of a negative's logit, above 1 where `hard_negatives` raises them;
            the head needs no running maximum while scale times this bound fits the compute dtype.
    """

    negatives_bound: ClassVar[float] = 1.0

    @property
    def sub_centers(self) -> int:
        """K, centers per class, of which the nearest gives the cosine."""
        return 1

    def target(self, cosine: Tensor, batch: MarginBatch) -> Tensor:
        """(G,) target logits, differentiable in the (G,) target cosines; float64."""
        return cosine

    def hard_negatives(self, target_cosine: Tensor, batch: MarginBatch) -> tuple[Tensor, Tensor] | None:
        """Limits (G,) and t (): the logit of a negative with a cosine c above its sample's limit becomes c (t + c).

        No gradient flows through either. None leaves all negatives as they are.
        """
        return None

    def regulariser(self, batch: MarginBatch) -> Tensor | None:
        """(G,) terms added to the losses of the samples, differentiable in `batch.norms`; None for none."""
        return None

    def initial_state(self) -> dict[str, Tensor]:
        """Initial running figures, named float64 tensors; the head keeps them as buffers and checkpoints them."""
        return {}

    def updated_state(self, target_cosine: Tensor, batch: MarginBatch) -> dict[str, Tensor]:
        """The running figures after this batch, with which its logits are then computed; called in training only.

        `batch.state` is the previous state. The batch is the global one, so all ranks compute the same.
        """
        return batch.state


def add_angle(cosine: Tensor, angle: Tensor) -> Tensor:
    """cos(θ + angle) for θ = arccos(cosine), made monotonic.

    Past θ + angle = π, where it would rise, it continues as cos θ − angle·sin(angle). Below θ + angle = 0, where a
    negative angle would make it fall, it is 1.

    Args:
        cosine: (G,) float64.
        angle: (G,) float64 in radians, at most `LARGEST_ANGLE`; the result is differentiable in both.
    """
    # At θ = 0 the gradient is infinite; the floor on sin² θ keeps it finite there.
    sine = torch.sqrt((1.0 - cosine.square()).clamp_min(1e-12))
    turned = cosine * angle.cos() - sine * angle.sin()
    turned = torch.where((angle > 0) & (cosine < -angle.cos()), cosine - angle * angle.sin(), turned)
    return torch.where((angle < 0) & (cosine > angle.cos()), 1.0, turned)


def check_range(margin: Margin, low: float, high: float, **options: object) -> None:
    """Raise InputError for an option of a margin that is no number in [low, high], or is not finite."""
    for name, value in options.items():
        if not (isinstance(value, Real) and math.isfinite(value) and low <= float(value) <= high):
            limits = f"of at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
            raise InputError(f"{type(margin).__name__}'s {name} is {value!r}; it is a finite number {limits}.")


def check_angle(margin: Margin, **options: object) -> None:
    """Raise InputError for an option that is no angle which `add_angle` accepts."""
    for name, value in options.items():
        if not (isinstance(value, Real) and 0 <= float(value) <= LARGEST_ANGLE):
            raise InputError(
                f"{type(margin).__name__}'s {name} is {value!r}; it is an angle in radians in [0, {LARGEST_ANGLE}]."
            )
