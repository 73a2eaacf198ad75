"""Loss scaling for float16: a factor on the gradient that enters the backbone, and the rule by which it moves."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

_GROWTH_INTERVAL = 2000
_LEAST, _MOST = 2.0**-14, 2.0**24


@dataclass
class LossScale:
    """The factor that keeps small gradients out of float16's underflow (Micikevicius et al., ICLR 2018, 1710.03740).

    It stands between head and backbone: the head computes in float32 and needs none, so that its gradient, sparse or
    deferred, is never scaled, and only the backbone's is divided again. It is a power of two, which changes no digits.
    One value holds on all ranks, since it moves by what they agreed on.

    Attributes:
        value: the factor.
        good_steps: finite steps since it last moved; after 2,000 of them it doubles, after a step that is not finite
            it halves.
    """

    value: float = 2.0**16
    good_steps: int = 0

    def update(self, finite: bool) -> None:
        """Move after a step that was finite on all ranks, or was not."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(_LEAST, self.value / 2)
        elif self.good_steps == _GROWTH_INTERVAL:
            self.value, self.good_steps = min(_MOST, self.value * 2), 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)


def scale_gradient(embeddings: Tensor, factor: float) -> Tensor:
    """The same values; their gradient is multiplied by `factor` on its way back."""
    scaled: Tensor = _ScaleGradient.apply(embeddings, factor)
    return scaled


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return embeddings.view_as(embeddings)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None
