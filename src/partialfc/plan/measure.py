"""The rates of the machine this runs on: a few training steps of the chosen backbone and head, at small sizes."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from partialfc.backbones import create_backbone
from partialfc.core import keyed_random
from partialfc.core.device import DTYPES
from partialfc.data.images import decode_image, encode_jpeg
from partialfc.head.optim import RowwiseAdamW, RowwiseSGD
from partialfc.head.partial_fc import PartialFC
from partialfc.plan.network import network_pass
from partialfc.plan.rates import MachineRates
from partialfc.plan.request import PlanRequest
from partialfc.plan.step_time import head_work

_TABLE_ELEMENTS = 100_000_000  # of the head's centers: far beyond any cache
_SAMPLED, _FEW_SAMPLED = 20_000, 1_000
_BATCHES = (32, 256)
_STEPS, _WARM_UP = 5, 2
_CPU_FLOPS, _GPU_FLOPS = 1.5e11, 5e13  # of the larger backbone step that is timed
_LINK_RATE, _LINK_LATENCY = 1e9, 1e-4  # of processes on one machine by gloo; assumed, not measured
_NETWORK_RATE = 1e9  # assumed
_COPY_BYTES = 256 << 20
_DECODED = 300


def measure_rates(request: PlanRequest, precision: str) -> MachineRates:
    """Rates for this request's backbone, precision and head on this machine's CPU or GPU."""
    device = torch.device(request.device)
    flops, seconds = measure_backbone(request, precision)
    head, _ = measure_head(request)
    on_cpu = device.type == "cpu"
    return MachineRates(
        name="this machine" if on_cpu else torch.cuda.get_device_name(device),
        origin="measured on this machine just now; links between processes are assumed at 1 GB/s",
        memory_bytes=_memory_bytes(device) // (request.gpus if on_cpu else 1),
        backbone_flops=flops,
        backbone_seconds=seconds,
        head_flops=head.flops,
        head_row_bytes=head.row_bytes,
        head_seconds=head.seconds,
        memory_rate=0.0,
        host_rate=_copy_rate(device),
        node_rate=_LINK_RATE,
        node_latency=_LINK_LATENCY,
        network_rate=_NETWORK_RATE,
        network_latency=_LINK_LATENCY,
        decode_rate=_decode_rate(request.image_size),
    )


def measure_backbone(request: PlanRequest, precision: str) -> tuple[float, float]:
    """Operations a second, and seconds of a step whatever its batch, from steps of two batches."""
    budget = _CPU_FLOPS if request.on_cpu else _GPU_FLOPS
    single = _flops(replace(request, batch_size=2), precision) / 2
    most = int(min(request.batch_size, max(4, budget // single)))
    if most < 2:
        return single / _backbone_seconds(request, precision, 2) * 2, 0.0
    few = max(2, most // 4)
    slow, quick = (_backbone_seconds(request, precision, images) for images in (most, few))
    per_image = (slow - quick) / (most - few) if most > few else slow / most
    per_image = max(per_image, 0.25 * slow / most)  # noise must not make a step free of charge
    return single / per_image, max(0.0, slow - most * per_image)


def _flops(request: PlanRequest, precision: str) -> float:
    return (4.0 if request.checkpointing else 3.0) * network_pass(request, precision).flops


def _backbone_seconds(request: PlanRequest, precision: str, images: int) -> float:
    """Median of a forward pass, backward pass and update as training does them, on random images."""
    options: dict[str, Any] = {"checkpointing": True} if request.checkpointing else {}
    if request.mask_ratio is not None:
        options["mask_ratio"] = request.mask_ratio
    device, dtype = torch.device(request.device), DTYPES[precision]
    size = request.image_size
    network = create_backbone(request.backbone, embedding_dim=request.embedding_dim, image_size=size, **options)
    network.to(device)
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer
    if request.optimizer == "adamw":
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
    else:
        optimizer = torch.optim.SGD(trained, lr=1e-4, momentum=0.9, weight_decay=5e-4)
    places = torch.arange(images, device=device)
    values = keyed_random.normal_rows(keyed_random.derive_key("images"), 0, images, 3 * size * size, device=device)
    batch = values.view(images, 3, size, size).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            embeddings = network(batch, places).float()
        embeddings.square().mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 5.0)
        optimizer.step()
        optimizer.zero_grad()

    return median_seconds([step], device, 3, 1)[0]


@dataclass(frozen=True)
class HeadRates:
    """Operations a second, row bytes a second and seconds a step whatever its size."""

    flops: float
    row_bytes: float
    seconds: float


def measure_head(request: PlanRequest, beside: Sequence[Callable[[], None]] = ()) -> tuple[HeadRates, list[float]]:
    """Rates of the requested head: three sizes of it give three equations in their reciprocals.

    Args:
        beside: other steps that are timed in turn with these, on the same device.

    Returns:
        The rates, and the median seconds of the other steps.
    """
    classes = min(request.classes, max(2 * _SAMPLED, _TABLE_ELEMENTS // request.embedding_dim))
    base = replace(request, classes=classes, gpus=1, micro_steps=1)
    head, step_of = head_step(base)
    rows: list[list[float]] = []
    steps: list[Callable[[], None]] = []
    for sampled, batch in ((_FEW_SAMPLED, _BATCHES[0]), (_SAMPLED, _BATCHES[0]), (_SAMPLED, _BATCHES[1])):
        sized = replace(base, batch_size=batch, sample_rate=min(1.0, sampled / classes))
        work = head_work(sized)
        rows.append([work.flops, work.row_bytes + work.host_bytes, 1.0])
        steps.append(partial(_step_at_rate, head, sized.sample_rate, step_of(batch)))
    times = median_seconds([*steps, *beside], torch.device(request.device), _STEPS, _WARM_UP)
    per_flop, per_byte, fixed = np.linalg.solve(np.array(rows), np.array(times[: len(rows)])).tolist()
    # What noise makes negative counts as free.
    return HeadRates(1 / max(per_flop, 1e-16), 1 / max(per_byte, 1e-14), max(fixed, 0.0)), times[len(rows) :]


def _step_at_rate(head: PartialFC, sample_rate: float, step: Callable[[], None]) -> None:
    head.sample_rate = sample_rate
    step()


def head_step(request: PlanRequest) -> tuple[PartialFC, Callable[[int], Callable[[], None]]]:
    """A head of the request, and a step of it for a batch of some size."""
    head = PartialFC(
        request.classes,
        request.embedding_dim,
        request.sample_rate,
        update=request.head_update,
        operand_dtype=getattr(torch, request.head_operand_dtype),
        device=request.device,
        dtype=getattr(torch, request.head_dtype),
    )
    state_dtype = None if request.state_dtype is None else getattr(torch, request.state_dtype)
    storage: dict[str, Any] = {"state_dtype": state_dtype, "state_on_host": request.state_on_host}
    optimizer: torch.optim.Optimizer
    if request.optimizer == "adamw":
        optimizer = RowwiseAdamW(head.parameters(), **storage)
    else:
        optimizer = RowwiseSGD(head.parameters(), **storage)

    def step_of(images: int) -> Callable[[], None]:
        def step() -> None:
            embeddings, labels = head_batch(request, images, head.step)
            head(embeddings, labels).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return head, step_of


def head_batch(request: PlanRequest, images: int, step: int) -> tuple[Tensor, Tensor]:
    """Embeddings (B, D) that want a gradient, and labels (B,): functions of the step."""
    places = torch.arange(images)
    labels = (keyed_random.uniform(keyed_random.derive_key("labels", step), places) * request.classes).long()
    values = keyed_random.normal_rows(keyed_random.derive_key("embeddings", step), 0, images, request.embedding_dim)
    return values.to(request.device).requires_grad_(), labels.to(request.device)


def median_seconds(steps: Sequence[Callable[[], None]], device: torch.device, rounds: int, warm_up: int) -> list[float]:
    """Median seconds of each step; they take turns, so that a machine that slows down slows all of them."""
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(warm_up + rounds):
        for step, taken in zip(steps, seconds, strict=True):
            _wait(device)
            start = time.perf_counter()
            step()
            _wait(device)
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken[warm_up:]) for taken in seconds]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _copy_rate(device: torch.device) -> float:
    """Bytes a second from host memory to the device; on a CPU, from memory to memory."""
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)

    def copy() -> None:
        target.copy_(source)

    return _COPY_BYTES / median_seconds([copy], device, 3, 1)[0]


def _decode_rate(size: int) -> float:
    """Images of 112 × 112 a second on one core, from one of the asked size that is as smooth as a face."""
    line = np.linspace(0, 4 * math.pi, size)
    wave = 127.5 + 60 * np.sin(line)[:, None, None] + 60 * np.cos(line)[None, :, None]
    encoded = encode_jpeg(np.broadcast_to(wave, (size, size, 3)).astype(np.uint8))
    start = time.perf_counter()
    for _ in range(_DECODED):
        decode_image(encoded)
    return _DECODED / (time.perf_counter() - start) * (size / 112) ** 2


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
