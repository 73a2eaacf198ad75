"""The rates of this machine: some steps of the planned backbone and head at the planned size."""

from __future__ import annotations

import torch

from partialfc.bench.head_step import HeadCase, median_seconds
from partialfc.config.build import build_backbone, build_head, build_optimizers
from partialfc.core.device import DTYPES, choose_device
from partialfc.plan.rates import MachineRates
from partialfc.plan.step_time import backbone_flops, head_work
from partialfc.plan.workload import Workload

_LINK_RATE, _LINK_LATENCY = 1e9, 1e-4  # of processes joined by gloo; assumed, not measured


def measure_rates(workload: Workload, precision: str) -> MachineRates:
    """Operations per second of one process's backbone and of its head, from the median of some steps of each.

    Args:
        workload: must fit this machine's memory; its device is "cpu" or "cuda".
        precision: a key of `DTYPES`.
    """
    backbone, head = measure_seconds(workload, precision)
    return MachineRates(
        name="CPU of this machine" if workload.on_cpu else torch.cuda.get_device_name(),
        origin="measured on this machine just now; links between processes and the loader are assumed",
        backbone_flops=backbone_flops(workload, precision) / backbone,
        head_flops=head_work(workload)[0] / head,
        memory_rate=None,
        host_rate=_LINK_RATE,
        overhead=0.0,
        node_rate=_LINK_RATE,
        node_latency=_LINK_LATENCY,
        network_rate=_LINK_RATE,
        network_latency=_LINK_LATENCY,
    )


def measure_seconds(workload: Workload, precision: str) -> tuple[float, float]:
    """Median seconds of an optimizer step of the backbone, and of the head on one process's share of the classes."""
    config, device, dtype = workload.config, choose_device(workload.device), DTYPES[precision]
    network = build_backbone(config, workload.image_size, device=device)
    head = build_head(config, workload.local_classes, device=device)
    network_optimizer, head_optimizer = build_optimizers(config, network, head)
    size = workload.image_size
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(max(2, workload.batch_size), 3, size, size, generator=generator).to(device)
    if config.backbone.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    keys = torch.arange(len(images), device=device)
    width, rate = config.backbone.embedding_dim, config.head.sample_rate
    embeddings, labels = HeadCase(workload.local_classes, width, workload.gathered, rate, workload.device).batch(0)

    def backbone_step() -> None:
        for _ in range(workload.micro_steps):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                output = network(images, keys).float()
            output.square().mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.optimizer.max_grad_norm or float("inf"))
        network_optimizer.step()
        network_optimizer.zero_grad()

    def head_step() -> None:
        for _ in range(workload.micro_steps):
            head(embeddings, labels).backward()
        head_optimizer.step()
        head_optimizer.zero_grad()

    return median_seconds(backbone_step, device), median_seconds(head_step, device)
