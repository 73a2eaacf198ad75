"""What a step of the head knows of all ranks: how many samples each has, their labels, and that all are sound."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.distributed import Group, all_gather_rows, row_counts
from partialfc.errors import InputError


class NonFiniteEmbeddings(InputError):
    """The backbone gave NaN or infinity; every rank raises it in the same step, and nothing was updated."""


@dataclass(frozen=True)
class Everyone:
    """The samples of all ranks. A training loop that knows them before it calls the head saves two collectives.

    Attributes:
        counts: the samples of each rank, in rank order.
        labels: int64 (G,), their labels, in the same order.
    """

    counts: list[int]
    labels: Tensor


def gather_labels(labels: Tensor, known: Everyone | None, num_classes: int, group: Group | None) -> Everyone:
    """Numbers and labels of all ranks' samples, checked. Two collectives, none if they are known.

    Raises:
        InputError: there is no sample, or a label lies outside [0, num_classes); on all ranks alike.
    """
    if known is None:
        counts = row_counts(len(labels), labels.device, group)
        known = Everyone(counts, all_gather_rows(labels, counts, group))
    if sum(known.counts) == 0:
        raise InputError("the global batch is empty: the head needs at least one image on one rank.")
    outside = ((known.labels < 0) | (known.labels >= num_classes)).nonzero()[:, 0]
    if len(outside):
        raise InputError(
            f"label {int(known.labels[outside[0]])} lies outside [0, {num_classes}): the data has more classes than "
            "the head."
        )
    return known


def check_finite(embeddings: Tensor, step: int) -> None:
    """Raise NonFiniteEmbeddings for NaN or infinity among the embeddings of all ranks."""
    if not bool(torch.isfinite(embeddings).all()):
        raise NonFiniteEmbeddings(
            f"embeddings of step {step} contain NaN or infinity: lower the learning rate or check the input."
        )
