"""Dense float64 oracles, written to be read, not to be fast."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dense_loss(
    embeddings: Tensor,
    centers: Tensor,
    labels: Tensor,
    classes: Tensor,
    *,
    margin: str,
    m: float,
    scale: float,
    conflict_threshold: float | None = None,
    conflict_as_zero_logit: bool = False,
) -> Tensor:
    """Mean loss over the batch of the margin softmax over `classes`, differentiable in embeddings and centers.

    Args:
        embeddings: (G, D) float64.
        centers: (C, D) float64, all classes.
        labels: (G,) class numbers, each of them among `classes`.
        classes: (S,) sampled class numbers.
        margin: "CosFace", "ArcFace" or "none"; m is its margin.
    """
    unit_embeddings = embeddings / embeddings.norm(dim=1, keepdim=True)
    unit_centers = centers / centers.norm(dim=1, keepdim=True)
    losses = []
    for unit_embedding, label in zip(unit_embeddings, labels.tolist(), strict=True):
        target_logit = scale * with_margin(unit_embedding @ unit_centers[label], margin, m)
        # −log(e^t / (e^t + Σ e^l)) as log(1 + Σ e^(l − t)): the usual form has no digits left when the loss is small.
        total = torch.zeros((), dtype=torch.float64)
        for number in classes.tolist():
            cosine = unit_embedding @ unit_centers[number]
            if number == label:
                continue
            if conflict_threshold is None or cosine.item() <= conflict_threshold:
                total = total + torch.exp(scale * cosine - target_logit)
            elif conflict_as_zero_logit:
                total = total + torch.exp(-target_logit)
        losses.append(torch.log1p(total))
    return torch.stack(losses).mean()


def with_margin(cosine: Tensor, margin: str, m: float) -> Tensor:
    if margin == "none":
        return cosine
    if margin == "CosFace":
        return cosine - m
    if margin == "ArcFace":
        theta = torch.arccos(cosine)
        if theta.item() > math.pi - m:
            return cosine - m * math.sin(m)
        return torch.cos(theta + m)
    raise ValueError(margin)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """The length of the difference over the length of what is expected."""
    return float((value.double() - expected).norm() / expected.norm())
