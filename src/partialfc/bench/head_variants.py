"""What `bench head` measures: a training step of our head, and of the dense one written the usual way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from partialfc.core import keyed_random
from partialfc.head.margins import CosFace
from partialfc.head.optim import RowwiseSGD, Unsampled
from partialfc.head.partial_fc import PartialFC
from partialfc.head.sampling import sample_classes, sample_size

Variant = Literal["sparse", "deferred", "sparse bfloat16", "deferred bfloat16", "dense baseline"]
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4
MARGIN, SCALE = 0.4, 64.0


@dataclass(frozen=True)
class HeadConfiguration:
    """Sizes of a measured head: C, D, B (all on one process), the sample rate, and the device's name."""

    num_classes: int
    embedding_dim: int
    batch_size: int
    sample_rate: float
    device: str

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Embeddings (B, D) float32 that want a gradient, and labels (B,): functions of the step."""
        places = torch.arange(self.batch_size)
        labels = (keyed_random.uniform(keyed_random.derive_key("labels", step), places) * self.num_classes).long()
        key = keyed_random.derive_key("embeddings", step)
        embeddings = keyed_random.normal_rows(key, 0, self.batch_size, self.embedding_dim)
        return embeddings.to(self.device).requires_grad_(), labels.to(self.device)


class Phases:
    """Seconds of each phase of one step; waits for the device at both ends."""

    def __init__(self, device: str) -> None:
        self.seconds: dict[str, float] = {}
        self._cuda = torch.device(device).type == "cuda"

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] = time.perf_counter() - start

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


StepFunction = Callable[[Tensor, Tensor, Phases], None]


def our_steps(configuration: HeadConfiguration, unsampled: Unsampled = "freeze") -> dict[Variant, StepFunction]:
    """A step of each variant; all train one head, so that the memory of others is not needed."""
    head = PartialFC(
        configuration.num_classes,
        configuration.embedding_dim,
        configuration.sample_rate,
        CosFace(MARGIN),
        SCALE,
        device=configuration.device,
    )
    optimizer = RowwiseSGD(head.parameters(), LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, unsampled=unsampled)

    def step(variant: Variant, embeddings: Tensor, labels: Tensor, phases: Phases) -> None:
        head.update = "deferred" if variant.startswith("deferred") else "sparse"
        operand_dtype = torch.bfloat16 if variant.endswith("bfloat16") else torch.float32
        head.loss_config = replace(head.loss_config, operand_dtype=operand_dtype)
        with phases("forward"):
            loss = head(embeddings, labels)
        with phases("backward"):
            loss.backward()
        with phases("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
        # Sampling is part of the forward pass; it is timed once more by itself.
        with phases("sampling"):
            sample_classes(
                labels.unique(),
                num_classes=configuration.num_classes,
                sample_rate=configuration.sample_rate,
                seed=0,
                step=head.step,
                start=0,
                stop=configuration.num_classes,
            )
        phases.seconds["forward"] = max(0.0, phases.seconds["forward"] - phases.seconds["sampling"])

    variants: tuple[Variant, ...] = ("sparse", "deferred", "sparse bfloat16", "deferred bfloat16")
    return {variant: partial(step, variant) for variant in variants}


class DenseHead(nn.Module):
    """The head as it is usually written: the sampled rows are gathered by autograd, so the gradient is dense (C, D)."""

    def __init__(self, configuration: HeadConfiguration) -> None:
        super().__init__()
        self.sampled = sample_size(configuration.num_classes, configuration.sample_rate)
        shape = configuration.num_classes, configuration.embedding_dim
        self.centers = nn.Parameter(torch.empty(shape, device=configuration.device))
        with torch.no_grad():
            self.centers.normal_(0, 0.01, generator=torch.Generator(configuration.device).manual_seed(0))

    def sample(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sorted classes (S,) and the places of the labels among them: the highest random numbers, positives first."""
        positives = labels.unique()
        if self.sampled >= len(self.centers):
            return torch.arange(len(self.centers), device=labels.device), labels
        if self.sampled > len(positives):
            scores = torch.rand(len(self.centers), device=labels.device)
            scores[positives] = 2.0
            positives = torch.topk(scores, self.sampled).indices.sort().values
        return positives, torch.searchsorted(positives, labels)

    def forward(self, embeddings: Tensor, classes: Tensor, places: Tensor) -> Tensor:
        """Mean loss of CosFace over the classes."""
        centers = self.centers[classes]
        cosine = functional.linear(functional.normalize(embeddings), functional.normalize(centers)).clamp(-1, 1)
        with torch.no_grad():
            cosine[torch.arange(len(places), device=places.device), places] -= MARGIN
        return _ClampedCrossEntropy.apply(cosine * SCALE, places)


class _ClampedCrossEntropy(torch.autograd.Function):
    """−log of the target's probability, which is kept above 1e-30; softmax in place."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, places: Tensor) -> Tensor:
        probabilities = (logits - logits.max(dim=1, keepdim=True).values).exp_()
        probabilities /= probabilities.sum(dim=1, keepdim=True)
        ctx.save_for_backward(probabilities, places)
        return probabilities.gather(1, places[:, None]).clamp_min_(1e-30).log_().mean().neg_()

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor, None]:
        probabilities, places = ctx.saved_tensors
        one_hot = torch.zeros_like(probabilities).scatter_(1, places[:, None], 1.0)
        return (probabilities - one_hot).div_(len(places)).mul_(loss_gradient), None


def dense_step(configuration: HeadConfiguration) -> StepFunction:
    """A step of the dense head under torch.optim.SGD."""
    head = DenseHead(configuration)
    optimizer = torch.optim.SGD(head.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)

    def step(embeddings: Tensor, labels: Tensor, phases: Phases) -> None:
        with phases("sampling"):
            classes, places = head.sample(labels)
        with phases("forward"):
            loss = head(embeddings, classes, places)
        with phases("backward"):
            loss.backward()
        with phases("optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    return step
