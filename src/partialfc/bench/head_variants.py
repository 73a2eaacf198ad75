"""The variants that `bench head` measures: a step of our head, and of the dense head as it is usually written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from partialfc.bench.head_step import HeadCase
from partialfc.config.options import OptimizerConfig
from partialfc.core.device import timed
from partialfc.head.sampled_softmax import sample_step
from partialfc.head.sampling import sample_size

Variant = Literal["sparse", "deferred", "sparse bfloat16", "deferred bfloat16", "dense baseline"]
OURS: tuple[Variant, ...] = ("sparse", "deferred", "sparse bfloat16", "deferred bfloat16")
SGD = OptimizerConfig(lr=0.1, momentum=0.9, weight_decay=5e-4)
MARGIN, SCALE = 0.4, 64.0  # CosFace


# A training step on embeddings and labels, which returns the seconds of each phase.
StepFunction = Callable[[Tensor, Tensor], dict[str, float]]


def our_steps(case: HeadCase, unsampled: Literal["freeze", "lazy_dense"] = "freeze") -> dict[Variant, StepFunction]:
    """A step of each of our variants; all train one head, so that memory is needed only once."""
    head, optimizer = case.build(SGD, margin="cosface", margin_value=MARGIN, scale=SCALE, unsampled=unsampled)

    def step(variant: Variant, embeddings: Tensor, labels: Tensor) -> dict[str, float]:
        seconds: dict[str, float] = {}
        head.update = "deferred" if variant.startswith("deferred") else "sparse"
        operand_dtype = torch.bfloat16 if variant.endswith("bfloat16") else torch.float32
        head.loss_config = replace(head.loss_config, operand_dtype=operand_dtype)
        with timed(seconds, "forward", case.device):
            loss = head(embeddings, labels)
        with timed(seconds, "backward", case.device):
            loss.backward()
        with timed(seconds, "optimizer", case.device):
            optimizer.step()
            optimizer.zero_grad()
        # Sampling is part of the forward pass; it is timed once more by itself.
        with timed(seconds, "sampling", case.device):
            sample_step(head, labels, None, on_device=False)
        seconds["forward"] = max(0.0, seconds["forward"] - seconds["sampling"])
        return seconds

    return {variant: partial(step, variant) for variant in OURS}


class DenseHead(nn.Module):
    """The usual head: autograd gathers the sampled rows, so that the gradient is dense (C, D)."""

    def __init__(self, case: HeadCase) -> None:
        super().__init__()
        self.sampled = sample_size(case.num_classes, case.sample_rate)
        self.centers = nn.Parameter(torch.empty(case.num_classes, case.embedding_dim, device=case.device))
        with torch.no_grad():
            self.centers.normal_(0, 0.01, generator=torch.Generator(case.device).manual_seed(0))

    def sample(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sorted classes (S,), the positives and those with the highest random scores, and the index of each label."""
        positives = labels.unique()
        if self.sampled >= len(self.centers):
            return torch.arange(len(self.centers), device=labels.device), labels
        if self.sampled > len(positives):
            scores = torch.rand(len(self.centers), device=labels.device)
            scores[positives] = 2.0
            positives = torch.topk(scores, self.sampled).indices.sort().values
        return positives, torch.searchsorted(positives, labels)

    def forward(self, embeddings: Tensor, classes: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of CosFace over the classes."""
        centers = self.centers[classes]
        cosine = functional.linear(functional.normalize(embeddings), functional.normalize(centers)).clamp(-1, 1)
        with torch.no_grad():
            cosine[torch.arange(len(targets), device=targets.device), targets] -= MARGIN
        return _ClampedCrossEntropy.apply(cosine * SCALE, targets)


class _ClampedCrossEntropy(torch.autograd.Function):
    """−log of the target's probability, clamped to at least 1e-30; the softmax is computed in place."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        probabilities = (logits - logits.max(dim=1, keepdim=True).values).exp_()
        probabilities /= probabilities.sum(dim=1, keepdim=True)
        ctx.save_for_backward(probabilities, targets)
        return probabilities.gather(1, targets[:, None]).clamp_min_(1e-30).log_().mean().neg_()

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor, None]:
        probabilities, targets = ctx.saved_tensors
        one_hot = torch.zeros_like(probabilities).scatter_(1, targets[:, None], 1.0)
        return (probabilities - one_hot).div_(len(targets)).mul_(loss_gradient), None


def dense_step(case: HeadCase) -> StepFunction:
    """A step of the dense head with torch.optim.SGD."""
    head = DenseHead(case)
    optimizer = torch.optim.SGD(head.parameters(), SGD.lr, SGD.momentum, weight_decay=SGD.weight_decay)

    def step(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
        seconds: dict[str, float] = {}
        with timed(seconds, "sampling", case.device):
            classes, targets = head.sample(labels)
        with timed(seconds, "forward", case.device):
            loss = head(embeddings, classes, targets)
        with timed(seconds, "backward", case.device):
            loss.backward()
        with timed(seconds, "optimizer", case.device):
            optimizer.step()
            optimizer.zero_grad()
        return seconds

    return step
