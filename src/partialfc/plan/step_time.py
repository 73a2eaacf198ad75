"""The time of a training step: the formulas of docs/scaling.md, and the rates that they need, measured here."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from partialfc.bench.head_step import HeadCase, median_seconds
from partialfc.config.build import build_backbone, build_head, build_optimizers
from partialfc.core.device import choose_device
from partialfc.plan.memory import kept_classes
from partialfc.plan.network import network_flops, network_size
from partialfc.plan.rates import MachineRates
from partialfc.plan.workload import Workload

_BUCKET = 25 << 20  # of DistributedDataParallel: the last one cannot hide behind the backward pass
_DECODE_RATE = 5000.0  # 112 × 112 JPEGs per second of one worker: Pillow, loader included; assumed
_LINK_RATE, _LINK_LATENCY = 1e9, 1e-4  # of processes joined by gloo; assumed


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step of one process.

    Attributes:
        backbone: forward, backward and update.
        head: of its share of the classes, without collectives.
        communication: what does not hide behind the backward pass.
        loader: reading the images, in parallel with all of that.
    """

    backbone: float
    head: float
    communication: float
    loader: float

    @property
    def parts(self) -> dict[str, float]:
        """What runs in sequence, by name."""
        return {"backbone": self.backbone, "head": self.head, "communication": self.communication}

    @property
    def step(self) -> float:
        """The whole step: reading overlaps with the rest."""
        return max(self.backbone + self.head + self.communication, self.loader)

    @property
    def limit(self) -> str:
        """The largest part."""
        return "loader" if self.loader == self.step else max(self.parts, key=self.parts.__getitem__)


def step_time(workload: Workload, rates: MachineRates) -> StepTime:
    """Predicted seconds."""
    images = workload.batch_size * workload.micro_steps
    per_worker = _DECODE_RATE * (112 / workload.image_size) ** 2
    passes, update = backbone_flops(workload) / rates.backbone_flops, rates.overhead
    if rates.memory_rate is not None:  # weight, gradient and states are read, all but the gradient written
        moved = 4 * network_size(workload).trained * (3 + 2 * workload.states) / workload.backbone_shards
        update += moved / rates.memory_rate
    return StepTime(
        backbone=passes + update,
        head=head_time(workload, rates),
        communication=communication_time(workload, rates, passes),
        loader=images / (per_worker * max(1, workload.config.data.workers)),
    )


def backbone_flops(workload: Workload) -> float:
    """Operations of a step: forward, twice as much backward, and forward again where activations are recomputed."""
    passes = 4 if workload.config.backbone.checkpointing else 3
    return float(passes * workload.micro_steps * network_flops(workload))


def head_work(workload: Workload) -> tuple[float, float, float]:
    """Operations of one step on one process, bytes of rows on the device, and bytes to the host and back.

    Cosines, the embeddings' gradient and the centers' gradient are a product of 2 G S D operations each; cosines that
    were not kept are computed once more. A sampled row is read in both passes (on a CPU once more where it is
    recomputed), and written with its state in the update; the sparse update writes and reads its gradient besides. A
    GPU's deferred update has the row at hand, the others read it again.
    """
    sampled, width = workload.sampled_rows, workload.width
    sparse = workload.config.head.update == "sparse"
    again = 1 - kept_classes(workload) / workload.sampled
    product = 2.0 * workload.gathered * sampled * width
    passes = workload.micro_steps * (2 + again * workload.on_cpu + 2 * sparse)
    update = 2 if sparse or workload.on_cpu else 1
    row = width * (passes + update) * workload.center_bytes
    state = 2 * width * workload.states * workload.state_bytes
    flops = workload.micro_steps * (3 + again) * product
    if workload.state_on_host:
        return flops, float(sampled * row), float(sampled * state)
    return flops, float(sampled * (row + state)), 0.0


def head_time(workload: Workload, rates: MachineRates) -> float:
    """Seconds of the head's step without collectives."""
    flops, row_bytes, host_bytes = head_work(workload)
    seconds = rates.overhead * workload.micro_steps + flops / rates.head_flops
    if rates.memory_rate is None:
        return seconds
    return seconds + row_bytes / rates.memory_rate + host_bytes / rates.host_rate


def communication_time(workload: Workload, rates: MachineRates, passes: float) -> float:
    """Seconds of collectives that nothing hides; `passes` are those of the backbone's passes.

    Rings: an all-gather or reduce-scatter moves (W - 1) / W of the data through each process, an all-reduce twice that.
    Embeddings are gathered and their gradients scattered in each micro-step, between the passes. The backbone's
    gradient is reduced once, during the last backward pass, all but its last bucket; a sharded backbone (FSDP2) moves
    its weights and gradients in every micro-step, during both passes.
    """
    world = workload.gpus
    if world == 1:
        return 0.0
    inside = world <= workload.gpus_per_node
    rate = rates.node_rate if inside else rates.network_rate
    latency = (rates.node_latency if inside else rates.network_latency) * math.ceil(math.log2(world))
    share = (world - 1) / world
    embeddings = 2 * share * 4 * workload.gathered * workload.width / rate
    figures = 2 * share * 2 * 8 * workload.gathered / rate
    head = workload.micro_steps * (embeddings + figures + 6 * latency)
    return head + _backbone_exchange(workload, rate, latency, passes)


def _backbone_exchange(workload: Workload, rate: float, latency: float, passes: float) -> float:
    """What the passes do not hide of the gradient's all-reduce, or of gathering a sharded backbone."""
    size, share = network_size(workload), (workload.gpus - 1) / workload.gpus
    gradient = (2 if workload.config.processes.gradients == "bfloat16" else 4) * size.trained
    if workload.backbone_shards > 1:
        # Weights are gathered for each of the two passes and gradients scattered, unit by unit.
        moved = workload.micro_steps * share * (2 * 4 * size.parameters + gradient)
        return max(3 * workload.micro_steps * latency, moved / rate - passes)
    reduced = 2 * share * gradient / rate + math.ceil(gradient / _BUCKET) * latency
    last_bucket = 2 * share * min(gradient, _BUCKET) / rate + latency
    return max(last_bucket, reduced - passes / workload.micro_steps * 2 / 3)


def measure_rates(workload: Workload) -> MachineRates:
    """Operations per second of one process's backbone and of its head, from the median of some steps of each.

    Args:
        workload: must fit this machine's memory; its device is "cpu" or "cuda".
    """
    backbone, head = measure_seconds(workload)
    return MachineRates(
        name="CPU of this machine" if workload.on_cpu else torch.cuda.get_device_name(),
        origin="measured on this machine just now; links between processes and the loader are assumed",
        backbone_flops=backbone_flops(workload) / backbone,
        head_flops=head_work(workload)[0] / head,
        memory_rate=None,
        host_rate=_LINK_RATE,
        overhead=0.0,
        node_rate=_LINK_RATE,
        node_latency=_LINK_LATENCY,
        network_rate=_LINK_RATE,
        network_latency=_LINK_LATENCY,
    )


def measure_seconds(workload: Workload) -> tuple[float, float]:
    """Median seconds of an optimizer step of the backbone, and of the head on one process's share of the classes."""
    config, device, dtype = workload.config, choose_device(workload.device), workload.dtype
    network = build_backbone(config, workload.image_size, device=device)
    head = build_head(config, workload.local_classes, device=device)
    network_optimizer, head_optimizer = build_optimizers(config, network, head)
    size = workload.image_size
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(max(2, workload.batch_size), 3, size, size, generator=generator).to(device)
    if config.backbone.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    keys = torch.arange(len(images), device=device)
    case = HeadCase(workload.local_classes, workload.width, workload.gathered, workload.largest_rate, workload.device)
    embeddings, labels = case.batch(0)

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
