"""The time of a training step, part by part; the formulas of docs/scaling.md."""

from __future__ import annotations

import math
from dataclasses import dataclass

from partialfc.plan.memory import kept_classes
from partialfc.plan.network import network_pass, network_size
from partialfc.plan.rates import MachineRates
from partialfc.plan.request import PlanRequest

_BUCKET = 25 << 20  # of DistributedDataParallel: the last one cannot hide behind the backward pass


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step of one process.

    Attributes:
        backbone: forward, backward and update.
        head: of its share of the classes, without collectives.
        communication: what does not hide behind the backward pass.
        loader: to read the images, beside all of that.
    """

    backbone: float
    head: float
    communication: float
    loader: float

    @property
    def step(self) -> float:
        """The whole step: reading goes on beside the rest."""
        return max(self.backbone + self.head + self.communication, self.loader)

    @property
    def limit(self) -> str:
        """The part that takes most."""
        if self.loader > self.backbone + self.head + self.communication:
            return "loader"
        parts = {"backbone": self.backbone, "head": self.head, "communication": self.communication}
        return max(parts, key=lambda name: parts[name])


def step_time(request: PlanRequest, rates: MachineRates, precision: str) -> StepTime:
    """Predicted seconds; `precision` is a key of `DTYPES`."""
    images = request.batch_size * request.micro_steps
    per_image = rates.decode_rate * (112 / request.image_size) ** 2
    passes = backbone_flops(request, precision) / rates.backbone_flops
    return StepTime(
        backbone=passes + _backbone_update(request, rates),
        head=head_time(request, rates),
        communication=communication_time(request, rates, passes),
        loader=images / (per_image * max(1, request.workers)),
    )


def backbone_flops(request: PlanRequest, precision: str) -> float:
    """Operations of a step: forward, twice as much backward, and forward again where activations are recomputed."""
    passes = 4 if request.checkpointing else 3
    return float(passes * request.micro_steps * network_pass(request, precision).flops)


def _backbone_update(request: PlanRequest, rates: MachineRates) -> float:
    """Weight, gradient and states are read, all but the gradient written."""
    if not rates.memory_rate:
        return rates.backbone_seconds
    bytes_moved = 4 * network_size(request).trained * (3 + 2 * request.states) / request.backbone_parts
    return rates.backbone_seconds + bytes_moved / rates.memory_rate


@dataclass(frozen=True)
class HeadWork:
    """What the head's step does: operations, bytes of rows on the device, and bytes to the host and back."""

    flops: float
    row_bytes: float
    host_bytes: float


def head_work(request: PlanRequest) -> HeadWork:
    """Work of one optimizer step on one process.

    Cosines, the embeddings' gradient and the centers' gradient are a product of 2 G S D operations each; cosines that
    were not kept are computed once more. A sampled row is read in both passes (on a CPU once more where it is
    recomputed), and written with its state in the update; the sparse update writes and reads its gradient besides. A
    GPU's deferred update has the row at hand, the others read it again.
    """
    sampled, width = request.sampled, request.embedding_dim
    sparse = request.head_update == "sparse"
    again = 1 - kept_classes(request) / sampled if sampled else 0.0
    product = 2.0 * request.gathered * sampled * width
    passes = request.micro_steps * (2 + again * request.on_cpu + 2 * sparse)
    update = 2 if sparse or request.on_cpu else 1
    row = width * (passes + update) * request.center_bytes
    state = 2 * width * request.states * request.state_bytes
    on_host = request.state_on_host and not request.on_cpu
    return HeadWork(
        flops=request.micro_steps * (3 + again) * product,
        row_bytes=sampled * (row + state * (not on_host)),
        host_bytes=sampled * state * on_host,
    )


def head_time(request: PlanRequest, rates: MachineRates) -> float:
    """Seconds of the head's step without collectives."""
    work = head_work(request)
    return (
        rates.head_seconds * request.micro_steps
        + work.flops / rates.head_flops
        + work.row_bytes / rates.head_row_bytes
        + work.host_bytes / rates.host_rate
    )


def communication_time(request: PlanRequest, rates: MachineRates, passes: float) -> float:
    """Seconds of collectives that nothing hides; `passes` are those of the backbone's passes.

    Rings: an all-gather or reduce-scatter moves (W - 1) / W of the data through each process, an all-reduce twice that.
    Embeddings are gathered and their gradients scattered in each micro-step, between the passes. The backbone's
    gradient is reduced once, beside the last backward pass, all but its last bucket; a backbone in parts (FSDP2) moves
    its weights and gradients in every micro-step, beside both passes.
    """
    world = request.gpus
    if world == 1:
        return 0.0
    inside = world <= request.gpus_per_node
    rate = rates.node_rate if inside else rates.network_rate
    latency = (rates.node_latency if inside else rates.network_latency) * math.ceil(math.log2(world))
    share = (world - 1) / world
    embeddings = 2 * share * 4 * request.gathered * request.embedding_dim / rate
    figures = 2 * share * 2 * 8 * request.gathered / rate
    head = request.micro_steps * (embeddings + figures + 6 * latency)
    return head + _backbone_exchange(request, rate, latency, passes)


def _backbone_exchange(request: PlanRequest, rate: float, latency: float, passes: float) -> float:
    """What the passes do not hide of the gradient's all-reduce, or of a backbone that is put together in parts."""
    size, share = network_size(request), (request.gpus - 1) / request.gpus
    gradient = (2 if request.gradients == "bfloat16" else 4) * size.trained
    if request.backbone_parts > 1:
        # Weights are gathered for each of the two passes, gradients scattered, one unit after the other.
        moved = request.micro_steps * share * (2 * 4 * size.parameters + gradient)
        return max(3 * request.micro_steps * latency, moved / rate - passes)
    reduced = 2 * share * gradient / rate + math.ceil(gradient / _BUCKET) * latency
    last_bucket = 2 * share * min(gradient, _BUCKET) / rate + latency
    return max(last_bucket, reduced - passes / request.micro_steps * 2 / 3)
