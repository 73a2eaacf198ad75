"""The memory of a training step, part by part; the formulas of docs/scaling.md.

A step has four moments at which memory may be highest: the head, after the backbone's forward pass; the backward pass;
the two updates; and, on a CPU whose checkpoints are copied in the same memory, always the same plus those copies. What
is there in all of them is counted once, and the moment that needs the most makes the peak.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from partialfc.plan.network import network_pass, network_size
from partialfc.plan.request import PlanRequest

SCRATCH = 256 << 20  # PartialFC's scratch_bytes
_CHUNKED_SCRATCH = 32 << 20  # of the plain path on a CPU
_CPU_TILE = 3 << 20
_GPU_TILE = 64 << 20
_CPU_PARTS = 16  # sums of the first pass that are kept apart
_NUMBERS_CPU, _NUMBERS_GPU = 1 << 18, 1 << 26  # of a sparse gradient that are updated at once
CLASS_BYTES = 49  # of class numbers and of drawing them, for each sampled class
GATHERED_BYTES = 60  # of each element of the gathered embeddings, and of their target centers in float64
UPDATE_BYTES = {("sgd", False): 20, ("sgd", True): 32, ("adamw", False): 24, ("adamw", True): 34}
CONTEXT_BYTES = 1 << 30  # of CUDA, its libraries and NCCL on each GPU; assumed
FRAGMENTATION = 0.05  # of a GPU's memory that its allocator cannot use; assumed
HEAP = 0.35  # of the activations, that a CPU's heap holds between them; from the trainings of benchmarks/plan.py
_PREFETCH = 2


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one process at the moment of its peak.

    Attributes:
        moment: when that is.
        parts: on the device (on a CPU: of the process), by name; the peak is their sum.
        host: in the host's memory beside a GPU, by name.
    """

    moment: str
    parts: dict[str, int]
    host: dict[str, int]

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


def weights_memory(request: PlanRequest) -> dict[str, int]:
    """Everything whose size is exact: weights, gradients and states of backbone and head, in bytes a process."""
    size = network_size(request)
    trained = -(-size.trained // request.backbone_parts)
    centers = request.local_classes * request.embedding_dim
    return {
        "backbone weights": 4 * -(-size.parameters // request.backbone_parts),
        "backbone statistics": 2 * 4 * size.buffers,  # twice: a copy undoes a skipped step
        "backbone gradient": 4 * trained,
        "backbone optimizer": 4 * request.states * trained,
        "backbone average": 4 * (-(-size.parameters // request.backbone_parts) + size.buffers) * request.ema,
        "centers": request.center_bytes * centers,
        "centers' optimizer": request.states * request.state_bytes * centers
        + 4 * request.local_classes * (request.optimizer == "adamw"),
        "sampled rows' gradient": _sparse_gradient(request),
    }


def plan_memory(request: PlanRequest, precision: str, threads: int = 1) -> MemoryPlan:
    """Memory of each process; `precision` is a key of `DTYPES`, `threads` those of a CPU."""
    exact = weights_memory(request)
    size, both = network_size(request), network_pass(request, precision)
    gradient, sparse = exact.pop("backbone gradient"), exact.pop("sampled rows' gradient")
    # DistributedDataParallel keeps the gradients in its buckets, and accumulation those of the micro-step before.
    stays = request.gpus > 1 or request.micro_steps > 1
    persistent = exact | {"head's scratch": _scratch(request, threads)}
    if request.backbone_parts > 1:  # the unit at work, the next one, and the gradient of one
        persistent["backbone put together"] = 3 * 4 * size.largest
    host = _host_memory(request, exact)
    if request.state_on_host and not request.on_cpu:
        host["centers' optimizer"] = persistent.pop("centers' optimizer")
    if request.on_cpu:
        persistent, host = persistent | host, {}
    else:
        persistent["CUDA and NCCL"] = CONTEXT_BYTES
    moments = {
        "the head": {
            "backbone gradient": gradient * stays,
            "activations": both.saved_bytes,
            "head at work": _head_at_work(request, threads),
            "sampled rows' gradient": sparse,
        },
        "the backward pass": {
            "backbone gradient": gradient * stays,
            "activations" if stays else "activations and gradient": both.working_bytes if stays else both.peak_bytes,
            "sampled rows' gradient": sparse,
        },
        "the update": {
            "backbone gradient": gradient,
            "update at work": max(_backbone_update(request, gradient, size.largest), _head_update(request, threads)),
            "sampled rows' gradient": sparse * (2 if request.micro_steps > 1 else 1),
        },
    }
    if request.on_cpu:
        moments["the head"]["heap between them"] = int(HEAP * both.saved_bytes)
        moments["the backward pass"]["heap between them"] = int(HEAP * both.peak_bytes)
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    parts = {name: size for name, size in (persistent | moments[moment]).items() if size}
    return MemoryPlan(moment, parts, {name: size for name, size in host.items() if size})


def head_memory(request: PlanRequest, threads: int = 1) -> int:
    """Peak bytes of a head's steps alone, as `partialfc bench head` measures them."""
    exact = weights_memory(request)
    sparse = exact["sampled rows' gradient"]
    on_device = exact["centers"] + exact["centers' optimizer"] * (request.on_cpu or not request.state_on_host)
    update = _head_update(request, threads)
    return on_device + _scratch(request, threads) + sparse + max(_head_at_work(request, threads), update)


def _sparse_gradient(request: PlanRequest) -> int:
    """Rows of each micro-step stay apart until the update puts them together."""
    if request.head_update == "deferred":
        return 0
    return request.micro_steps * request.sampled * request.embedding_dim * request.center_bytes


def _tile_numbers(request: PlanRequest) -> int:
    """Elements of the gradient of one tile of classes."""
    samples, width = request.gathered, request.embedding_dim
    if not request.on_cpu:
        classes = _GPU_TILE // ((samples + width) * request.operand_bytes + 4 * width)
    elif request.compiled_head:
        classes = _CPU_TILE // (6 * (samples + width))
    else:
        classes = _CHUNKED_SCRATCH // (4 * (4 * samples + 3 * width))
    return min(request.sampled, max(1, classes)) * width


def _scratch(request: PlanRequest, threads: int) -> int:
    """What the head keeps from step to step on a CPU with compiled loops: the weights kept, and each thread's tile."""
    if not request.compiled_head:
        return 0
    kept = kept_classes(request) * request.gathered * request.operand_bytes
    classes = _tile_numbers(request) // request.embedding_dim
    return kept + threads * classes * (request.embedding_dim + request.gathered) * (4 + request.operand_bytes)


def kept_classes(request: PlanRequest) -> int:
    """Classes whose cosines are not computed again for the centers' gradient."""
    if not request.on_cpu:
        return 0
    bytes_a_class = request.gathered * request.operand_bytes
    budget = SCRATCH
    if not request.compiled_head:
        bytes_a_class, budget = 4 * (request.gathered + request.embedding_dim), _CHUNKED_SCRATCH
    return min(request.sampled, budget // bytes_a_class)


def _head_at_work(request: PlanRequest, threads: int) -> int:
    """Forward and backward pass of the head: batch, class numbers, sums kept apart, tiles."""
    width, gathered = request.embedding_dim, request.gathered
    batch = GATHERED_BYTES * gathered * width
    classes = CLASS_BYTES * request.sampled
    if not request.on_cpu:
        return batch + classes + _GPU_TILE
    if request.compiled_head:
        return batch + classes + (_CPU_PARTS + threads * (request.operand_bytes == 2)) * 4 * gathered * width
    full = _tile_numbers(request) // width < request.sampled
    tiles = 2 * _CHUNKED_SCRATCH if full else 4 * (5 * gathered + 5 * width) * request.sampled
    return batch + classes + tiles


def _backbone_update(request: PlanRequest, gradient: int, largest: int) -> int:
    """On a GPU all parameters are updated at once, with a temporary for each; on a CPU one after the other."""
    return 4 * -(-largest // request.backbone_parts) if request.on_cpu else gradient


def _head_update(request: PlanRequest, threads: int) -> int:
    """Temporaries of the rows that are updated at once."""
    sparse, tile = request.head_update == "sparse", _tile_numbers(request)
    in_kernel = not request.on_cpu and not sparse and request.micro_steps == 1
    fused = request.optimizer == "sgd" and (in_kernel or (request.compiled_head and request.state_bytes == 4))
    if fused:
        return 0
    rounded = 2 in (request.center_bytes, request.state_bytes)
    each = UPDATE_BYTES[request.optimizer, rounded]
    everything = request.sampled * request.embedding_dim
    if sparse:
        at_once = min(everything, _NUMBERS_CPU * threads if request.on_cpu else _NUMBERS_GPU)
        return each * at_once
    at_work = tile * (threads if request.compiled_head else 1)
    return (each + 4) * min(everything, at_work)


def _host_memory(request: PlanRequest, exact: dict[str, int]) -> dict[str, int]:
    """The copy of an asynchronous checkpoint, of which rank 0 has the backbone's part, and images read ahead."""
    names = (
        "backbone weights",
        "backbone statistics",
        "backbone optimizer",
        "backbone average",
        "centers",
        "centers' optimizer",
    )
    image = 3 * request.image_size**2
    copied = sum(exact[name] for name in names) - exact["backbone statistics"] // 2
    return {
        "checkpoint copy": copied * request.checkpoint_async,
        "images read ahead": (max(1, request.workers * _PREFETCH) + 2) * request.batch_size * image,
    }


def cpu_threads() -> int:
    """Threads that the head spreads its tiles over."""
    return torch.get_num_threads()
