"""A plan as aligned text."""

from __future__ import annotations

from partialfc.plan.planning import Plan
from partialfc.plan.rates import GIB
from partialfc.plan.step_time import StepTime

_WIDTH = 24  # of the longest bar
_NAME = 26


def plan_text(plan: Plan) -> str:
    """The workload, its memory and time part by part, and the conclusions."""
    lines = [*_heading(plan), "", *_memory(plan)]
    if plan.time is not None:
        lines += ["", *_time(plan, plan.time)]
    return "\n".join([*lines, "", *_conclusions(plan)])


def _heading(plan: Plan) -> list[str]:
    workload, head = plan.workload, plan.workload.config.head
    device = plan.rates.name if plan.rates else f"{workload.device.upper()} of this machine"
    micro = f" in {workload.micro_steps} micro-steps" if workload.micro_steps > 1 else ""
    storage = f"{head.dtype} centers, {head.state_dtype or head.dtype} state"
    storage += " on the host" if head.state_on_host else ""
    return [
        f"{workload.classes:,} identities, {workload.config.backbone.name} in {plan.precision}, {workload.gpus:,} x "
        f"{device}, global batch {workload.config.data.global_batch_size:,}{micro}",
        f"sample rate {head.sample_rate:g}: {workload.sampled:,} of {workload.local_classes:,} classes a GPU; "
        f"{head.update} update, {head.operand_dtype} operands, {storage}, {workload.config.optimizer.name}",
        f"rates: {plan.rates.origin if plan.rates else 'not measured, since it does not fit this machine'}",
    ]


def _bar(value: float, largest: float) -> str:
    return "█" * round(_WIDTH * value / largest) if largest else ""


def _memory(plan: Plan) -> list[str]:
    parts = sorted(plan.memory.parts.items(), key=lambda part: -part[1])
    largest = parts[0][1]
    place = "the process" if plan.workload.on_cpu else "each GPU"
    lines = [f"memory of {place} at its peak, in {plan.memory.moment}"]
    lines += [f"  {name:<{_NAME}}{_size(size)}  {_bar(size, largest)}" for name, size in parts]
    lines.append(f"  {'together':<{_NAME}}{_size(plan.memory.peak)}  of {plan.capacity / GIB:.1f} GiB usable")
    if plan.memory.host:
        lines.append("memory of the host, for each GPU")
        lines += [f"  {name:<{_NAME}}{_size(size)}" for name, size in plan.memory.host.items()]
    return lines


def _size(size: int) -> str:
    return f"{size / GIB:9.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:9.2f} MiB"


def _time(plan: Plan, time: StepTime) -> list[str]:
    parts = {"backbone": time.backbone, "head": time.head, "communication": time.communication}
    parts["loader, in parallel"] = time.loader
    largest = max(parts.values())
    lines = ["time of a step"]
    lines += [f"  {name:<{_NAME}}{1000 * s:9.1f} ms   {_bar(s, largest)}" for name, s in parts.items()]
    lines.append(f"  {'together':<{_NAME}}{1000 * time.step:9.1f} ms   {plan.images_per_second:,.0f} images a second")
    return lines


def _conclusions(plan: Plan) -> list[str]:
    needed, usable = plan.memory.peak / GIB, plan.capacity / GIB
    if plan.fits:
        lines = [f"It fits: {needed:.1f} of {usable:.1f} GiB."]
    else:
        remedy = "; ".join(plan.advice) if plan.advice else "a smaller backbone or batch, or more GPUs"
        lines = [f"It does not fit: {needed:.1f} of {usable:.1f} GiB. Any one of these would: {remedy}."]
    if plan.fitting_rate is None:
        lines.append("No sample rate fits with these options.")
    else:
        lines.append(f"The largest sample rate that fits is {plan.fitting_rate:g}.")
    if plan.time is None:
        return lines
    lines.append(f"The largest part of a step is the {plan.time.limit}.")
    if plan.equal_rate is None:
        lines.append("The head takes less time than the backbone at every sample rate.")
    elif plan.equal_rate == 0:
        lines.append("The head takes more time than the backbone at every sample rate.")
    else:
        lines.append(f"Beyond a sample rate of {plan.equal_rate:g} the head takes more time than the backbone.")
    return lines
