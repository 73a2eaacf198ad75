"""A training step of a head alone, on synthetic batches: for `bench head`, the planner and the benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partialfc.config.build import build_head, build_head_optimizer
from partialfc.config.options import BackboneConfig, HeadConfig, OptimizerConfig, TrainConfig
from partialfc.core import keyed_random
from partialfc.head.optim import RowwiseAdamW, RowwiseSGD
from partialfc.head.partial_fc import PartialFC


@dataclass(frozen=True)
class HeadCase:
    """A head to measure: C, D, B (all on one process), the sample rate and the device."""

    num_classes: int
    embedding_dim: int
    batch_size: int
    sample_rate: float
    device: str

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Random embeddings (B, D) float32 that require a gradient, and labels (B,): functions of the step."""
        uniform = keyed_random.uniform(keyed_random.derive_key("labels", step), torch.arange(self.batch_size))
        key = keyed_random.derive_key("embeddings", step)
        embeddings = keyed_random.normal_rows(key, 0, self.batch_size, self.embedding_dim)
        return embeddings.to(self.device).requires_grad_(), (uniform * self.num_classes).long().to(self.device)

    def build(
        self, optimizer: OptimizerConfig | None = None, **head: Any
    ) -> tuple[PartialFC, RowwiseSGD | RowwiseAdamW]:
        """The head and its optimizer as training builds them, from fields of `HeadConfig`; by default SGD with 0.1."""
        config = TrainConfig(
            backbone=BackboneConfig(embedding_dim=self.embedding_dim),
            head=HeadConfig(self.sample_rate, **head),
            optimizer=optimizer or OptimizerConfig(lr=0.1),
        )
        built = build_head(config, self.num_classes, device=torch.device(self.device))
        return built, build_head_optimizer(config, built)


def median_seconds(step: Callable[[], None], device: torch.device, *, steps: int = 3, warm_up: int = 1) -> float:
    """Median seconds of a step, each waiting for the device."""
    seconds = []
    for _ in range(warm_up + steps):
        wait_for(device)
        start = time.perf_counter()
        step()
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[warm_up:])


def wait_for(device: torch.device) -> None:
    """Wait for the kernels of a GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
