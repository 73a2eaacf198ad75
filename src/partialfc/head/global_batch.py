"""What a step of the head knows of all ranks: how many samples each has, their labels, and that all are sound."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.core.errors import InputError
from partialfc.distributed.collectives import Group, all_gather_rows, row_counts


class NonFiniteEmbeddings(InputError):
    """The backbone gave NaN or infinity; every rank raises it in the same step, and nothing was updated."""


@dataclass(frozen=True)
class GlobalLabels:
    """The samples of all ranks. A training loop that knows them before it calls the head saves two collectives.

    Attributes:
        counts: the samples of each rank, in rank order.
        labels: int64 (G,), their labels, in the same order.
    """

    counts: list[int]
    labels: Tensor


def gather_labels(labels: Tensor, known: GlobalLabels | None, group: Group | None) -> GlobalLabels:
    """Numbers and labels of all ranks' samples. Two collectives, none if they are known.

    Raises:
        InputError: there is no sample, on all ranks alike.
    """
    if known is None:
        counts = row_counts(len(labels), labels.device, group)
        known = GlobalLabels(counts, all_gather_rows(labels, counts, group))
    if sum(known.counts) == 0:
        raise InputError("the global batch is empty: the head needs at least one image on one rank.")
    return known


def raise_bad_input(embeddings: Tensor, labels: Tensor, num_classes: int, step: int) -> None:
    """Raise what is wrong with the global batch, (G, D) and (G,), at once: host reads.

    Raises:
        InputError: a label lies outside [0, num_classes).
        NonFiniteEmbeddings: NaN or infinity among the embeddings of any rank.
    """
    outside = ((labels < 0) | (labels >= num_classes)).nonzero()[:, 0]
    if len(outside):
        raise bad_label(int(labels[outside[0]]), num_classes)
    if not bool(torch.isfinite(embeddings).all()):
        raise bad_embeddings(step)


def bad_label(label: int, num_classes: int) -> InputError:
    """The error of a label that no class has."""
    reason = "labels count from 0" if label < 0 else "the data has more classes than the head"
    return InputError(f"label {label} lies outside [0, {num_classes}): {reason}.")


def bad_embeddings(step: int) -> NonFiniteEmbeddings:
    """The error of embeddings that are no numbers."""
    return NonFiniteEmbeddings(
        f"embeddings of step {step} contain NaN or infinity: lower the learning rate or check the input."
    )
