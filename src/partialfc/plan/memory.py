"""The memory of a training step, part by part; the formulas of docs/scaling.md.

A step has three moments at which memory may be highest: the head, after the backbone's forward pass; the backward pass;
and the two updates. What all of them need is counted once, and the moment that needs the most makes the peak.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from partialfc.data.loader import PREFETCH
from partialfc.head.backends import tile_sizes
from partialfc.head.rows import CPU_UPDATE_ELEMENTS, GPU_UPDATE_ELEMENTS
from partialfc.plan.network import network_pass, network_size
from partialfc.plan.workload import Workload

CLASS_BYTES = 49  # class numbers and their sampling, for each sampled class
GATHERED_BYTES = 60  # for each element of the gathered embeddings, with their target centers in float64
# Temporaries for each updated element, by optimizer and whether a stored value is rounded to bfloat16.
UPDATE_BYTES = {("sgd", False): 16, ("sgd", True): 28, ("adamw", False): 24, ("adamw", True): 34}
CONTEXT_BYTES = 1 << 30  # CUDA, its libraries and NCCL on each GPU; assumed
FRAGMENTATION = 0.05  # part of a GPU's memory that its allocator cannot use; assumed
HEAP = 0.35  # memory that a CPU's heap holds between the activations, as a part of them; from benchmarks/plan.py


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one process at its peak.

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


def weights_memory(workload: Workload) -> dict[str, int]:
    """Everything whose size is exact: weights, gradients and states of backbone and head, in bytes per process."""
    size, shards = network_size(workload), workload.backbone_shards
    parameters, trained = -(-size.parameters // shards), -(-size.trained // shards)
    local_rows = workload.local_classes * workload.margin.sub_centers
    centers = local_rows * workload.width
    steps = 4 * local_rows * (workload.config.optimizer.name == "adamw")
    rows = workload.center_bytes * workload.width * workload.sampled_rows * workload.micro_steps
    average = workload.config.optimizer.ema_decay > 0
    return {
        "backbone weights": 4 * parameters,
        "backbone statistics": 2 * 4 * size.buffers,  # twice: a copy undoes a skipped step
        "backbone gradient": 4 * trained,
        "backbone optimizer": 4 * workload.states * trained,
        "backbone average": 4 * (parameters + size.buffers) * average,
        "centers": workload.center_bytes * centers,
        "centers' optimizer": workload.states * workload.state_bytes * centers + steps,
        "sampled rows' gradient": rows * (workload.config.head.update == "sparse"),
    }


def plan_memory(workload: Workload) -> MemoryPlan:
    """Memory of each process. On a CPU, the process has this one's threads."""
    exact = weights_memory(workload)
    size, both = network_size(workload), network_pass(workload)
    gradient, sparse = exact.pop("backbone gradient"), exact.pop("sampled rows' gradient")
    # DistributedDataParallel keeps the gradients in its buckets, and accumulation those of the micro-step before.
    stays = workload.gpus > 1 or workload.micro_steps > 1
    persistent = exact | {"head's scratch": scratch_memory(workload)}
    if workload.backbone_shards > 1:  # the unit at work, the next one, and the gradient of one
        persistent["gathered backbone"] = 3 * 4 * size.largest
    batches = max(1, workload.config.data.workers * PREFETCH) + 2
    host = {
        # Of an asynchronous checkpoint on rank 0, which holds the backbone too, without what undoes a skipped step.
        "checkpoint copy": (sum(exact.values()) - exact["backbone statistics"] // 2)
        * workload.config.output.checkpoint_async,
        "images read ahead": batches * workload.batch_size * 3 * workload.image_size**2,
    }
    if workload.state_on_host:
        host["centers' optimizer"] = persistent.pop("centers' optimizer")
    if workload.on_cpu:
        persistent, host = persistent | host, {}
    else:
        persistent["CUDA and NCCL"] = CONTEXT_BYTES
    # On a GPU all parameters are updated at once, with a temporary for each; on a CPU in sequence.
    backbone_update = 4 * -(-size.largest // workload.backbone_shards) if workload.on_cpu else gradient
    moments = {
        "the head": {
            "backbone gradient": gradient * stays,
            "activations": both.saved_bytes,
            "head at work": head_pass_memory(workload),
            "sampled rows' gradient": sparse,
        },
        "the backward pass": {
            "backbone gradient": gradient * stays,
            "activations" if stays else "activations and gradient": both.working_bytes if stays else both.peak_bytes,
            "sampled rows' gradient": sparse,
        },
        "the update": {
            "backbone gradient": gradient,
            "update at work": max(backbone_update, head_update_memory(workload)),
            "sampled rows' gradient": sparse * (2 if workload.micro_steps > 1 else 1),
        },
    }
    if workload.on_cpu:
        moments["the head"]["heap between them"] = int(HEAP * both.saved_bytes)
        moments["the backward pass"]["heap between them"] = int(HEAP * both.peak_bytes)
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    parts = {name: size for name, size in (persistent | moments[moment]).items() if size}
    return MemoryPlan(moment, parts, {name: size for name, size in host.items() if size})


def scratch_memory(workload: Workload) -> int:
    """Bytes that the head keeps from step to step on a CPU: the weights kept, and a tile for each thread."""
    if not workload.compiled_head:
        return 0
    samples, width, operand = workload.gathered, workload.width, workload.operand_bytes
    tile = _tile_classes(workload) * (width + samples) * (4 + operand)
    return kept_classes(workload) * samples * operand + torch.get_num_threads() * tile


def kept_classes(workload: Workload) -> int:
    """Classes whose cosines are not recomputed for the centers' gradient."""
    if not workload.on_cpu:
        return 0
    if workload.compiled_head:
        kept = tile_sizes.cpu_kept_classes(workload.gathered, workload.operand_bytes, tile_sizes.SCRATCH_BYTES)
    else:
        row_bytes = 4 * workload.margin.sub_centers * (workload.gathered + workload.width)
        kept = tile_sizes.CHUNKED_CPU_SCRATCH_BYTES // row_bytes
    return min(workload.sampled, kept)


def head_pass_memory(workload: Workload) -> int:
    """Bytes of the head's forward and backward pass: batch, class numbers, partial sums, tiles."""
    samples, width, sampled = workload.gathered, workload.width, workload.sampled
    common = GATHERED_BYTES * samples * width + CLASS_BYTES * sampled
    if not workload.on_cpu:
        margin = workload.margin
        has_kernels = margin.sub_centers == 1 and margin.negatives_bound == 1
        return common + (tile_sizes.GPU_TILE_BYTES if has_kernels else 2 * tile_sizes.SCRATCH_BYTES)
    if workload.compiled_head:
        converted = torch.get_num_threads() * (workload.operand_bytes == 2)
        return common + (tile_sizes.CPU_PARTS + converted) * 4 * samples * width
    if _tile_classes(workload) < sampled:
        return common + 2 * tile_sizes.CHUNKED_CPU_SCRATCH_BYTES
    return common + 4 * (5 * samples + 5 * width) * workload.sampled_rows


def head_update_memory(workload: Workload) -> int:
    """Bytes of temporaries of the rows that are updated at once."""
    head, optimizer = workload.config.head, workload.config.optimizer.name
    sparse, width = head.update == "sparse", workload.width
    in_kernel = not workload.on_cpu and not sparse and workload.micro_steps == 1
    if optimizer == "sgd" and (in_kernel or (workload.compiled_head and workload.state_bytes == 4)):
        return 0
    temporaries = UPDATE_BYTES[optimizer, 2 in (workload.center_bytes, workload.state_bytes)]
    elements, threads = workload.sampled_rows * width, torch.get_num_threads()
    if sparse:
        at_once = CPU_UPDATE_ELEMENTS * threads if workload.on_cpu else GPU_UPDATE_ELEMENTS
        return temporaries * min(elements, at_once)
    tiles = threads if workload.compiled_head else 1
    return (temporaries + 4) * min(elements, tiles * _tile_classes(workload) * width)


def _tile_classes(workload: Workload) -> int:
    """Classes of one tile of the backend that takes this head."""
    samples, width = workload.gathered, workload.width
    if not workload.on_cpu:
        classes = tile_sizes.gpu_tile_classes(samples, width, workload.operand_bytes, tile_sizes.SCRATCH_BYTES)
    elif workload.compiled_head:
        classes = tile_sizes.cpu_tile_classes(samples, width, tile_sizes.SCRATCH_BYTES)
    else:
        class_bytes = 4 * workload.margin.sub_centers
        classes = tile_sizes.chunked_tile_classes(samples, width, class_bytes, tile_sizes.CHUNKED_CPU_SCRATCH_BYTES)
    return min(workload.sampled, classes)
