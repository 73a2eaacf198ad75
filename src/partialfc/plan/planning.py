"""The plan: memory and time of a training, whether it fits, and which sample rates do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from partialfc.bench.machine import available_bytes
from partialfc.config.build import build_head
from partialfc.config.options import TrainConfig
from partialfc.config.recipes import data_set, recipe_config
from partialfc.core.device import choose_device, compute_dtype, dtype_name
from partialfc.core.errors import InputError
from partialfc.plan.measure import measure_rates
from partialfc.plan.memory import FRAGMENTATION, MemoryPlan, plan_memory, weights_memory
from partialfc.plan.network import network_size
from partialfc.plan.rates import DATA_SHEETS, GIB, MachineRates, preset
from partialfc.plan.step_time import StepTime, head_time, step_time
from partialfc.plan.workload import Device, Workload

# Changes to `HeadConfig` that save memory, each leaner than the one before.
LEANER_HEADS: tuple[dict[str, Any], ...] = (
    {"update": "deferred"},
    {"update": "deferred", "dtype": "bfloat16"},
    {"update": "deferred", "dtype": "bfloat16", "state_on_host": True},
)


@dataclass(frozen=True)
class Plan:
    """What a training needs.

    Attributes:
        workload: what was planned.
        precision: of the backbone.
        rates: of the machine; None if this machine was to be measured and the workload does not fit it.
        memory: of each process.
        capacity: bytes that a process may use.
        time: of a step; None without rates.
        fitting_rate: the largest sample rate whose memory fits; None if none does.
        equal_rate: the sample rate at which the head takes as long as the backbone; None if it takes less at 1, and
            without rates.
        advice: options that would each make it fit, if it does not.
    """

    workload: Workload
    precision: str
    rates: MachineRates | None
    memory: MemoryPlan
    capacity: int
    time: StepTime | None
    fitting_rate: float | None
    equal_rate: float | None
    advice: list[str]

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.capacity

    @property
    def images_per_second(self) -> float | None:
        """Over all processes."""
        return None if self.time is None else self.workload.config.data.global_batch_size / self.time.step

    def to_dict(self) -> dict[str, Any]:
        """Plain values: bytes and seconds."""
        time = self.time
        return asdict(self) | {
            "sampled_classes": self.workload.sampled,
            "memory": {"peak_bytes": self.memory.peak} | asdict(self.memory),
            "capacity_bytes": self.capacity,
            "fits": self.fits,
            "time": None if time is None else asdict(time) | {"step": time.step, "limit": time.limit},
            "images_per_second": self.images_per_second,
        }


def make_plan(
    config: TrainConfig,
    *,
    classes: int,
    gpus: int | None = None,
    device: Device = "h100",
    image_size: int = 112,
    gpus_per_node: int = 8,
    gpu_memory: float | None = None,
) -> Plan:
    """Plan a training.

    Args:
        config: the training; its `device` is not used.
        classes: identities of the data.
        gpus: processes, one for each GPU; by default as many as hold the global batch at once.
        device: kind of GPU, from its data sheet; "cpu" or "cuda" times some steps on this machine, if they fit it.
        image_size: side of the images in pixels.
        gpus_per_node: GPUs of one machine.
        gpu_memory: GiB that a process may use; by default what the device has, or what is free on this machine.

    Raises:
        InputError: an option is out of range, or contradicts another.
    """
    data = config.data
    gpus = -(-data.global_batch_size // max(1, data.micro_batch_size)) if gpus is None else gpus
    workload = Workload(config, classes, gpus, device, image_size, gpus_per_node)
    workload.check()
    if gpu_memory is not None and not gpu_memory > 0:
        raise InputError(f"--gpu-memory is {gpu_memory}; it is a number of GiB above 0.")
    build_head(config, 1, device=torch.device("cpu"))  # refuses what no head takes
    network_size(workload)  # and what no backbone takes
    here = device in ("cpu", "cuda")
    precision: str = config.precision
    if precision == "auto" and here:
        precision = dtype_name(compute_dtype("auto", choose_device(device)))
    elif precision == "auto":
        precision = "float32" if device == "v100" else "bfloat16"
    capacity = usable_bytes(workload, gpu_memory)
    rates: MachineRates | None = None
    if not here:
        rates = preset(device, precision, config.head.operand_dtype)
    elif plan_memory(workload, precision).peak <= capacity:
        rates = measure_rates(workload, precision)
    return plan_workload(workload, precision, rates, capacity)


def plan_workload(workload: Workload, precision: str, rates: MachineRates | None, capacity: int) -> Plan:
    """The plan of a checked workload on processes with these rates and `capacity` bytes."""

    def fits(changed: Workload) -> bool:
        return plan_memory(changed, precision).peak <= capacity

    time = None if rates is None else step_time(workload, rates, precision)
    return Plan(
        workload=workload,
        precision=precision,
        rates=rates,
        memory=plan_memory(workload, precision),
        capacity=capacity,
        time=time,
        fitting_rate=largest_rate(lambda rate: fits(workload.with_rate(rate))),
        equal_rate=None if rates is None or time is None else _equal_rate(workload, rates, time.backbone),
        advice=[] if fits(workload) else _advice(workload, fits),
    )


def recipe_memory(name: str) -> dict[str, int] | None:
    """Bytes of weights, gradients and optimizers on each GPU of a recipe; None for procedural faces.

    Raises:
        InputError: unknown name.
    """
    config, data = recipe_config(name), data_set(name)
    if data is None:
        return None
    gpus = config.data.global_batch_size // config.data.micro_batch_size
    parts = {part: size for part, size in weights_memory(Workload(config, data[1], gpus)).items() if size}
    return parts | {"total": sum(parts.values())}


def usable_bytes(workload: Workload, gpu_memory: float | None) -> int:
    """Bytes of its device that a process may use: the GiB given, or all there are, and on this machine what is free."""
    asked = None if gpu_memory is None else int(gpu_memory * GIB)
    if workload.device in DATA_SHEETS:
        most = int(DATA_SHEETS[workload.device].gib * GIB) if asked is None else asked
    else:
        free = available_bytes(workload.device) // (workload.gpus if workload.on_cpu else 1)
        most = free if asked is None else min(free, asked)
    return int(most * (1 - FRAGMENTATION))


def largest_rate(holds: Callable[[float], bool]) -> float | None:
    """The largest rate in [0, 1], to three digits and rounded down, for which `holds`, which then holds below too."""
    if holds(1.0):
        return 1.0
    if not holds(0.0):
        return None
    low, high = 0, 10**9
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle / 10**9) else (low, middle)
    rounded = 10 ** max(0, len(str(low)) - 3)
    return low // rounded * rounded / 10**9


def _equal_rate(workload: Workload, rates: MachineRates, backbone: float) -> float | None:
    rate = largest_rate(lambda rate: head_time(workload.with_rate(rate), rates) <= backbone)
    return None if rate == 1.0 else rate or 0.0


def _advice(workload: Workload, fits: Callable[[Workload], bool]) -> list[str]:
    """Options each of which alone makes a workload fit, the mildest first."""
    advice = []
    config, data = workload.config, workload.config.data
    lower = largest_rate(lambda rate: fits(workload.with_rate(rate)))
    if lower is not None:
        advice.append(f"--head.sample_rate {lower:g}")
    for changes in LEANER_HEADS:
        if fits(workload.with_head(replace(config.head, **changes))):
            advice.append(" ".join(f"--head.{name} {str(value).lower()}" for name, value in changes.items()))
            break
    with suppress(InputError):  # not every backbone can recompute its activations
        recomputing = replace(config, backbone=replace(config.backbone, checkpointing=True))
        if not config.backbone.checkpointing and fits(replace(workload, config=recomputing)):
            advice.append("--backbone.checkpointing true")
    images = workload.batch_size
    while config.micro_steps() is None and images > 2:
        images //= 2
        if fits(replace(workload, config=replace(config, data=replace(data, micro_batch_size=images)))):
            advice.append(f"--data.micro_batch_size {images}")
            break
    gpus = fewest_gpus(workload, fits)
    return advice if gpus is None else [*advice, f"--gpus {gpus}"]


def fewest_gpus(workload: Workload, fits: Callable[[Workload], bool]) -> int | None:
    """The smallest power of two times the planned GPUs that fits; None if each would have fewer than 2 images."""
    gpus = workload.gpus
    while 2 * (gpus := 2 * gpus) <= workload.config.data.global_batch_size:
        if fits(replace(workload, gpus=gpus)):
            return gpus
    return None
