"""Dense float64 oracles and a plain bfloat16 computation, written to be read, not to be fast."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Target = Callable[[Tensor, Tensor], Tensor]
"""(G,) target cosines and (G,) embedding norms to (G,) logits before the scale."""


def dense_loss(
    embeddings: Tensor,
    centers: Tensor,
    labels: Tensor,
    classes: Tensor,
    *,
    scale: float,
    target: Target,
    negatives: Callable[[Tensor, Tensor], Tensor] = lambda cosine, target_cosine: cosine,
    regulariser: Callable[[Tensor], Tensor] | None = None,
    conflict_threshold: float | None = None,
    conflict_as_zero_logit: bool = False,
    sub_centers: int = 1,
) -> Tensor:
    """Mean loss over the batch of the margin softmax over `classes`, differentiable in embeddings and centers.

    Args:
        embeddings: (G, D).
        centers: (C × sub_centers, D), all classes.
        labels: (G,) class numbers, each of them among `classes`.
        classes: (S,) sampled class numbers.
        target: the margin.
        negatives: (G, S) cosines and (G, 1) target cosines to (G, S) logits before the scale.
        regulariser: (G,) norms to (G,) terms of the loss.
    """
    cosine = dense_cosines(embeddings, centers, sub_centers)[:, classes]
    own = labels[:, None] == classes
    target_cosine = cosine[own]
    target_logit = scale * target(target_cosine, embeddings.norm(dim=1))
    weights = torch.exp(scale * negatives(cosine, target_cosine[:, None]) - target_logit[:, None])
    if conflict_threshold is not None:
        counted_as = torch.exp(-target_logit[:, None]) if conflict_as_zero_logit else torch.zeros(())
        weights = torch.where(cosine > conflict_threshold, counted_as, weights)
    weights = torch.where(own, 0.0, weights)
    # −log(e^t / (e^t + Σ e^l)) as log(1 + Σ e^(l − t)): the usual form has no digits left when the loss is small.
    loss = torch.log1p(weights.sum(dim=1))
    if regulariser is not None:
        loss = loss + regulariser(embeddings.norm(dim=1))
    return loss.mean()


def plain_bfloat16(embeddings: Tensor, centers: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the usual computation in bfloat16, its logits and softmax in float32."""
    embeddings, centers = embeddings.clone().requires_grad_(), centers.clone().requires_grad_()
    unit_embeddings, unit_centers = functional.normalize(embeddings), functional.normalize(centers)
    cosine = functional.linear(unit_embeddings.bfloat16(), unit_centers.bfloat16()).float()
    logits = 64 * (cosine - 0.4 * functional.one_hot(labels, len(centers)))
    functional.cross_entropy(logits, labels).backward()
    assert embeddings.grad is not None
    assert centers.grad is not None
    return embeddings.grad.double(), centers.grad.double()


def dense_cosines(embeddings: Tensor, centers: Tensor, sub_centers: int = 1) -> Tensor:
    """(G, C) cosines of each embedding and each class's nearest center."""
    unit_embeddings = embeddings / embeddings.norm(dim=1, keepdim=True)
    unit_centers = centers / centers.norm(dim=1, keepdim=True)
    return (unit_embeddings @ unit_centers.T).unflatten(1, (-1, sub_centers)).max(dim=2).values


def no_margin(cosine: Tensor, norms: Tensor) -> Tensor:
    return cosine


def cosface(m: float) -> Target:
    return lambda cosine, norms: cosine - m


def arcface(m: float) -> Target:
    return lambda cosine, norms: arcface_logit(cosine, torch.full_like(cosine, m))


def arcface_straight_through(m: float) -> Target:
    """ArcFace's value with the gradient of a plain cosine."""
    return lambda cosine, norms: cosine + (arcface(m)(cosine, norms) - cosine).detach()


def arcface_logit(cosine: Tensor, m: Tensor) -> Tensor:
    """cos(θ + m), and past θ = π − m its usual monotone continuation."""
    theta = torch.arccos(cosine)
    return torch.where(theta > math.pi - m, cosine - m * torch.sin(m), torch.cos(theta + m))


def combined(m1: float, m2: float, m3: float) -> Target:
    def target(cosine: Tensor, norms: Tensor) -> Tensor:
        angle = m1 * torch.arccos(cosine) + m2
        k = (angle.detach() / math.pi).long()
        return (-1.0) ** k * torch.cos(angle) - 2 * k - m3

    return target


def adaface(m: float, h: float, mean: float, deviation: float) -> Target:
    def target(cosine: Tensor, norms: Tensor) -> Tensor:
        quality = (h * (norms.detach().clamp(0.001, 100) - mean) / (deviation + 0.001)).clamp(-1, 1)
        theta = torch.arccos(cosine)
        low = torch.where(theta < m * quality, 1.0, torch.cos(theta - m * quality))
        return torch.where(quality > 0, low, arcface_logit(cosine, -m * quality)) - (m + m * quality)

    return target


def magface(l_a: float, u_a: float, l_m: float, u_m: float, lambda_g: float) -> dict[str, Any]:
    return {
        "target": lambda cosine, norms: arcface_logit(
            cosine, l_m + (u_m - l_m) * (norms.clamp(l_a, u_a) - l_a) / (u_a - l_a)
        ),
        "regulariser": lambda norms: lambda_g * (norms.clamp(l_a, u_a) / u_a**2 + 1 / norms.clamp(l_a, u_a)),
    }


def curricularface(m: float, t: float) -> dict[str, Any]:
    def negatives(cosine: Tensor, target_cosine: Tensor) -> Tensor:
        return torch.where(cosine > torch.cos(torch.arccos(target_cosine) + m), cosine * (t + cosine), cosine)

    return {"target": arcface(m), "negatives": negatives}


def sgd_step(
    values: Tensor, gradient: Tensor, velocity: Tensor, *, lr: float, momentum: float, weight_decay: float
) -> Tensor:
    """The values after one step of SGD."""
    return values - lr * (momentum * velocity + gradient + weight_decay * values)


def adamw_step(
    values: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    steps: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> Tensor:
    """The values after a step of AdamW that follows `steps` others."""
    mean = (betas[0] * mean + (1 - betas[0]) * gradient) / (1 - betas[0] ** (steps + 1))
    square = (betas[1] * square + (1 - betas[1]) * gradient**2) / (1 - betas[1] ** (steps + 1))
    return values * (1 - lr * weight_decay) - lr * mean / (square.sqrt() + eps)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """The length of the difference over the length of what is expected (of the difference where that is zero)."""
    length = expected.double().norm().item()
    return float((value.double() - expected.double()).norm()) / (length or 1.0)
