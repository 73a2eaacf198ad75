"""A training step of a head alone, on synthetic batches: for `bench head`, the planner and the benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from partialfc.config.build import build_head, build_head_optimizer
from partialfc.config.options import BackboneConfig, HeadConfig, OptimizerConfig, TrainConfig
from partialfc.core import keyed_random
from partialfc.head.optim import RowwiseAdamW, RowwiseSGD
from partialfc.head.partial_fc import PartialFC


def synthetic_batch(
    step: int, *, num_classes: int, embedding_dim: int, batch_size: int, device: str | torch.device
) -> tuple[Tensor, Tensor]:
    """Random embeddings (B, D) float32 that require a gradient, and labels (B,) int64: functions of the step."""
    positions = torch.arange(batch_size)
    labels = (keyed_random.uniform(keyed_random.derive_key("labels", step), positions) * num_classes).long()
    embeddings = keyed_random.normal_rows(keyed_random.derive_key("embeddings", step), 0, batch_size, embedding_dim)
    return embeddings.to(device).requires_grad_(), labels.to(device)


def make_head(
    num_classes: int,
    embedding_dim: int,
    head: HeadConfig,
    device: str | torch.device,
    optimizer: OptimizerConfig | None = None,
) -> tuple[PartialFC, RowwiseSGD | RowwiseAdamW]:
    """A head and its optimizer as training builds them; by default SGD with a learning rate of 0.1."""
    config = TrainConfig(
        backbone=BackboneConfig(embedding_dim=embedding_dim), head=head, optimizer=optimizer or OptimizerConfig(lr=0.1)
    )
    built = build_head(config, num_classes, device=torch.device(device))
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
