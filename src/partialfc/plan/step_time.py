"""The time of a training step, part by part; the formulas of docs/scaling.md."""

from __future__ import annotations

import math
from dataclasses import dataclass

from partialfc.plan.memory import kept_classes
from partialfc.plan.network import network_pass, network_size
from partialfc.plan.rates import MachineRates
from partialfc.plan.workload import Workload

_BUCKET = 25 << 20  # of DistributedDataParallel: the last one cannot hide behind the backward pass
_DECODE_RATE = 5000.0  # 112 × 112 JPEGs per second of one worker: Pillow, loader included; assumed


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
    def step(self) -> float:
        """The whole step: reading overlaps with the rest."""
        return max(self.backbone + self.head + self.communication, self.loader)

    @property
    def limit(self) -> str:
        """The largest part."""
        if self.loader > self.backbone + self.head + self.communication:
            return "loader"
        parts = {"backbone": self.backbone, "head": self.head, "communication": self.communication}
        return max(parts, key=lambda name: parts[name])


def step_time(workload: Workload, rates: MachineRates, precision: str) -> StepTime:
    """Predicted seconds; `precision` is a key of `DTYPES`."""
    images = workload.batch_size * workload.micro_steps
    per_worker = _DECODE_RATE * (112 / workload.image_size) ** 2
    passes = backbone_flops(workload, precision) / rates.backbone_flops
    return StepTime(
        backbone=passes + _backbone_update(workload, rates),
        head=head_time(workload, rates),
        communication=communication_time(workload, rates, passes),
        loader=images / (per_worker * max(1, workload.config.data.workers)),
    )


def backbone_flops(workload: Workload, precision: str) -> float:
    """Operations of a step: forward, twice as much backward, and forward again where activations are recomputed."""
    passes = 4 if workload.config.backbone.checkpointing else 3
    return float(passes * workload.micro_steps * network_pass(workload, precision).flops)


def _backbone_update(workload: Workload, rates: MachineRates) -> float:
    """Weight, gradient and states are read, all but the gradient written."""
    if rates.memory_rate is None:
        return rates.overhead
    bytes_moved = 4 * network_size(workload).trained * (3 + 2 * workload.states) / workload.backbone_shards
    return rates.overhead + bytes_moved / rates.memory_rate


def head_work(workload: Workload) -> tuple[float, float, float]:
    """Operations of one step on one process, bytes of rows on the device, and bytes to the host and back.

    Cosines, the embeddings' gradient and the centers' gradient are a product of 2 G S D operations each; cosines that
    were not kept are computed once more. A sampled row is read in both passes (on a CPU once more where it is
    recomputed), and written with its state in the update; the sparse update writes and reads its gradient besides. A
    GPU's deferred update has the row at hand, the others read it again.
    """
    sampled, width = workload.sampled, workload.config.backbone.embedding_dim
    sparse = workload.config.head.update == "sparse"
    again = 1 - kept_classes(workload) / sampled
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
    embeddings = 2 * share * 4 * workload.gathered * workload.config.backbone.embedding_dim / rate
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
