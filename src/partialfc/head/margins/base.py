"""The protocol of a margin: it turns the cosine between an embedding and its own class center into the target logit.

A margin is a small immutable object. The head passes it float64 vectors over the global batch and differentiates the
result with autograd, so a new margin is its formula and nothing else. Logits are returned before the scale is applied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class MarginBatch:
    """The inputs of a margin beside the target cosine; the same on every rank.

    Attributes:
        norms: (G,) float64 norms of the embeddings.
        key: the key of this step's noise, for `keyed_random` with `places` as counters.
        state: the margin's running figures, by the names of `Margin.initial_state`.
        first_sample: the position of the first sample in its optimizer step, which may consist of several micro-steps.
    """

    norms: Tensor
    key: int
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

    Class attributes a subclass may set:
        negatives_bound: the largest absolute value that `negatives` returns; the head needs no running maximum while
            scale times this bound fits the compute dtype.
        reweights_negatives: whether `negatives` is overridden; plain cosines take a faster backend.
        sub_centers: centers per class, of which the nearest gives the cosine (Deng et al., ECCV 2020).
        updates: the values of `PartialFC`'s update that the margin supports.
    """

    negatives_bound: ClassVar[float] = 1.0
    reweights_negatives: ClassVar[bool] = False
    sub_centers: ClassVar[int] = 1
    updates: ClassVar[frozenset[str]] = frozenset({"sparse", "deferred"})

    def target(self, cosine: Tensor, batch: MarginBatch) -> Tensor:
        """(G,) target logits, differentiable in the (G,) target cosines; float64."""
        return cosine

    def negatives(self, cosine: Tensor, target_cosine: Tensor, batch: MarginBatch) -> Tensor:
        """(G, s) logits of negatives, differentiable in their cosines; `target_cosine` is (G, 1)."""
        return cosine

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
