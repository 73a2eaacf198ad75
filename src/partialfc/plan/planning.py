"""The plan: memory and time of a training, whether it fits, and which sample rates do; as values and as text."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from textwrap import wrap
from typing import Any

import torch

from partialfc.bench.machine import available_bytes
from partialfc.config.build import build_head
from partialfc.config.recipes import data_set, recipe_config
from partialfc.config.sample_rate import describe_rate
from partialfc.core.console import counted
from partialfc.core.device import dtype_name
from partialfc.core.errors import InputError
from partialfc.plan.memory import FRAGMENTATION, MemoryPlan, plan_memory, weights_memory
from partialfc.plan.network import network_size
from partialfc.plan.rates import DATA_SHEETS, GIB, MachineRates, preset
from partialfc.plan.step_time import StepTime, head_time, measure_rates, step_time
from partialfc.plan.workload import Workload

# Values of a configuration that save memory, each leaner than the one before.
LEANER_HEADS: tuple[dict[str, Any], ...] = (
    {"head.update": "deferred"},
    {"head.update": "deferred", "head.dtype": "bfloat16"},
    {"head.update": "deferred", "head.dtype": "bfloat16", "head.state_on_host": True},
)
_BAR, _NAME = 24, 26  # characters of the longest bar and of a name in the text


@dataclass(frozen=True)
class Plan:
    """What a training needs.

    Attributes:
        workload: what was planned.
        rates: of the machine; None if this machine was to be measured and the workload does not fit it.
        memory: of each process.
        capacity: bytes that a process may use.
        time: of a step, at the largest sample rate; None without rates.
        phases: of the training: share of the steps, sample rate, and seconds of a step; empty without rates.
        fitting_rate: the largest sample rate whose memory fits; None if none does.
        equal_rate: the sample rate at which the head takes as long as the backbone; None if it takes less at 1, and
            without rates.
        advice: options that would each make it fit, if it does not.
    """

    workload: Workload
    rates: MachineRates | None
    memory: MemoryPlan
    capacity: int
    time: StepTime | None
    phases: list[tuple[float, float, float]]
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

    @property
    def hours(self) -> float | None:
        """Of the whole training, without evaluations and checkpoints."""
        steps, mean = self.workload.steps, sum(share * seconds for share, _, seconds in self.phases)
        return None if self.time is None or steps is None else mean * steps / 3600

    def to_dict(self) -> dict[str, Any]:
        """Plain values: bytes and seconds."""
        time = self.time
        return asdict(self) | {
            "precision": dtype_name(self.workload.dtype),
            "sampled_classes": self.workload.sampled,
            "memory": {"peak_bytes": self.memory.peak} | asdict(self.memory),
            "capacity_bytes": self.capacity,
            "fits": self.fits,
            "time": None if time is None else asdict(time) | {"step": time.step, "limit": time.limit},
            "images_per_second": self.images_per_second,
            "hours": self.hours,
            "gpu_hours": None if self.hours is None else self.hours * self.workload.gpus,
        }


def make_plan(workload: Workload, *, gpu_memory: float | None = None) -> Plan:
    """Plan a training.

    Args:
        workload: the training; on "cpu" or "cuda" some of its steps are timed on this machine, if they fit it.
        gpu_memory: GiB that a process may use; by default what the device has, or what is free on this machine.

    Raises:
        InputError: an option is out of range, or contradicts another.
    """
    workload.check()
    if gpu_memory is not None and not gpu_memory > 0:
        raise InputError(f"--gpu-memory is {gpu_memory}; it is a number of GiB above 0.")
    build_head(workload.config, 1, device=torch.device("cpu"))  # refuses what no head takes
    network_size(workload)  # and what no backbone takes
    capacity = usable_bytes(workload, gpu_memory)
    rates: MachineRates | None = None
    if not workload.on_this_machine:
        rates = preset(workload)
    elif plan_memory(workload).peak <= capacity:
        rates = measure_rates(workload.with_rate(workload.largest_rate))
    return plan_workload(workload, rates, capacity)


def plan_workload(workload: Workload, rates: MachineRates | None, capacity: int) -> Plan:
    """The plan of a checked workload on processes with these rates and `capacity` bytes."""
    memory = plan_memory(workload)
    time = None if rates is None else step_time(workload, rates)
    fitting_rate = largest_rate(lambda rate: plan_memory(workload.with_rate(rate)).peak <= capacity)
    return Plan(
        workload=workload,
        rates=rates,
        memory=memory,
        capacity=capacity,
        time=time,
        phases=[]
        if rates is None
        else [(share, rate, step_time(workload.with_rate(rate), rates).step) for share, rate in workload.phases],
        fitting_rate=fitting_rate,
        equal_rate=None if rates is None or time is None else _equal_rate(workload, rates, time.backbone),
        advice=[] if memory.peak <= capacity else _advice(workload, capacity, fitting_rate),
    )


def recipe_memory(name: str) -> dict[str, int] | None:
    """Bytes of weights, gradients and optimizers on each GPU of a recipe; None for procedural faces.

    Raises:
        InputError: unknown name.
    """
    config, data = recipe_config(name), data_set(name)
    if data is None:
        return None
    sizes = weights_memory(Workload(config, data[1], config.data.fewest_processes))
    parts = {part: size for part, size in sizes.items() if size}
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


def _advice(workload: Workload, capacity: int, fitting_rate: float | None) -> list[str]:
    """Options each of which alone makes a workload fit, the mildest first."""
    config, batch = workload.config, workload.config.data.global_batch_size
    images, gpus = workload.batch_size, workload.gpus
    halves = [images >> n for n in range(1, images.bit_length()) if images >> (n - 1) > 2]
    multiples = [gpus << n for n in range(1, batch.bit_length()) if 2 * (gpus << n) <= batch]  # 2 images each, or more
    ways: list[list[dict[str, Any]]] = [
        [] if fitting_rate is None else [{"head.sample_rate": fitting_rate}],
        [*LEANER_HEADS],
        [] if config.backbone.checkpointing else [{"backbone.checkpointing": True}],
        [{"data.micro_batch_size": half} for half in halves if config.micro_steps() is None],
        [{"gpus": multiple} for multiple in multiples],
    ]
    advice = []
    for way in ways:
        for options in way:
            changed = replace(workload, **options) if "gpus" in options else workload.with_values(options)
            with suppress(InputError):  # not every backbone can recompute its activations
                if plan_memory(changed).peak <= capacity:
                    advice.append(" ".join(f"--{name} {_option_value(value)}" for name, value in options.items()))
                    break
    return advice


def _option_value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def plan_text(plan: Plan) -> str:
    """The workload, its memory and time part by part, and the conclusions, as aligned text."""
    workload, memory, time = plan.workload, plan.memory, plan.time
    lines = [*_wrapped(_heading(plan)), ""]
    lines.append(f"memory of {'the process' if workload.on_cpu else 'each GPU'} at its peak, in {memory.moment}")
    lines += _chart(dict(sorted(memory.parts.items(), key=lambda part: -part[1])), _size)
    lines.append(f"  {'together':<{_NAME}}{_size(memory.peak)}  of {plan.capacity / GIB:.1f} GiB usable")
    if memory.host:
        lines.append("memory of the host, for each GPU")
        lines += [f"  {name:<{_NAME}}{_size(size)}" for name, size in memory.host.items()]
    if time is not None:
        lines += ["", "time of a step", *_chart(time.parts | {"loader, in parallel": time.loader}, _milliseconds)]
        speed = f"{plan.images_per_second:,.0f} images a second"
        lines.append(f"  {'together':<{_NAME}}{_milliseconds(time.step)}  {speed}")
    return "\n".join([*lines, "", *_wrapped(_conclusions(plan))])


def _wrapped(lines: list[str]) -> list[str]:
    return [part for line in lines for part in wrap(line, 80, subsequent_indent="  ", break_on_hyphens=False)]


def _heading(plan: Plan) -> list[str]:
    workload, config, head = plan.workload, plan.workload.config, plan.workload.config.head
    device = plan.rates.name if plan.rates else f"{workload.device.upper()} of this machine"
    micro = f" in {workload.micro_steps} micro-steps" if workload.micro_steps > 1 else ""
    storage = f"{head.dtype} centers, {head.state_dtype or head.dtype} state"
    storage += " on the host" if head.state_on_host else ""
    at_most = "at most " if len(workload.phases) > 1 else ""
    return [
        f"{workload.classes:,} identities, {config.backbone.name} in {dtype_name(workload.dtype)}, "
        f"{workload.gpus:,} x {device}, global batch {config.data.global_batch_size:,}{micro}",
        f"sample rate {describe_rate(head.sample_rate)}: "
        f"{at_most}{workload.sampled:,} of {workload.local_classes:,} classes a GPU; "
        f"{head.update} update, {head.operand_dtype} operands, {storage}, {config.optimizer.name}",
        f"rates: {plan.rates.origin if plan.rates else 'not measured, since it does not fit this machine'}",
    ]


def _chart(values: dict[str, Any], text: Callable[[Any], str]) -> list[str]:
    largest = max(values.values())
    bars = {name: "█" * round(_BAR * value / largest) for name, value in values.items()}
    return [f"  {name:<{_NAME}}{text(value)}  {bars[name]}" for name, value in values.items()]


def _size(size: int) -> str:
    return f"{size / GIB:9.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:9.2f} MiB"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:9.1f} ms "


def _conclusions(plan: Plan) -> list[str]:
    workload, config = plan.workload, plan.workload.config
    needed = f"{plan.memory.peak / GIB:.1f} of {plan.capacity / GIB:.1f} GiB"
    remedies = "; ".join(plan.advice) or "a smaller backbone or batch, or more GPUs"
    lines = [
        f"It fits: {needed}." if plan.fits else f"It does not fit: {needed}. Any one of these would: {remedies}.",
        "No sample rate fits with these options."
        if plan.fitting_rate is None
        else f"The largest sample rate that fits is {plan.fitting_rate:g}.",
    ]
    if plan.time is None:
        return lines
    lines.append(f"The largest part of a step is the {plan.time.limit}.")
    if len(plan.phases) > 1:
        lines += [f"At sample rate {rate:g} a step takes {1000 * seconds:.1f} ms." for _, rate, seconds in plan.phases]
    if plan.hours is not None and workload.steps is not None:
        work = f"{config.schedule.epochs:g} epochs, {counted(workload.steps, 'step')}"
        unit = "process" if workload.on_cpu else "GPU"
        lines.append(f"{work}: {plan.hours:,.1f} hours, {plan.hours * workload.gpus:,.1f} {unit}-hours.")
    if plan.equal_rate:
        return [*lines, f"Beyond a sample rate of {plan.equal_rate:g} the head takes more time than the backbone."]
    amount = "less" if plan.equal_rate is None else "more"
    return [*lines, f"The head takes {amount} time than the backbone at every sample rate."]
