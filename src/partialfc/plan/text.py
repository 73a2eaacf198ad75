"""A plan for people: aligned text."""

from __future__ import annotations

from partialfc.plan.planning import Plan
from partialfc.plan.rates import GIB

_WIDTH = 24  # of the longest bar
_NAME = 26


def plan_text(plan: Plan) -> str:
    """What is planned, memory by part, time by part, and what follows from them."""
    lines = [*_heading(plan), "", *_memory(plan), "", *_time(plan), "", *_verdict(plan)]
    return "\n".join(lines)


def _heading(plan: Plan) -> list[str]:
    asked = plan.request
    place = "x CPU of this machine" if asked.on_cpu else f"x {plan.rates.name}"
    images = asked.gathered * asked.micro_steps
    micro = f" in {asked.micro_steps} micro-steps" if asked.micro_steps > 1 else ""
    storage = f"{asked.head_dtype} centers, {asked.state_dtype or asked.head_dtype} state"
    storage += " on the host" if asked.state_on_host else ""
    return [
        f"{asked.classes:,} identities, {asked.backbone} in {plan.precision}, {asked.gpus:,} {place}, "
        f"global batch {images:,}{micro}",
        f"sample rate {asked.sample_rate:g}: {asked.sampled:,} of {asked.local_classes:,} classes a GPU; "
        f"{asked.head_update} update, {asked.head_operand_dtype} operands, {storage}, {asked.optimizer}",
        f"rates: {plan.rates.origin}",
    ]


def _bar(value: float, largest: float) -> str:
    return "█" * round(_WIDTH * value / largest) if largest else ""


def _memory(plan: Plan) -> list[str]:
    parts = sorted(plan.memory.parts.items(), key=lambda part: -part[1])
    largest = parts[0][1]
    of = "the process" if plan.request.on_cpu else "each GPU"
    lines = [f"memory of {of} at its peak, in {plan.memory.moment}"]
    lines += [f"  {name:<{_NAME}}{_size(size)}  {_bar(size, largest)}" for name, size in parts]
    lines.append(f"  {'together':<{_NAME}}{_size(plan.memory.peak)}  of {plan.capacity / GIB:.1f} GiB usable")
    if plan.memory.host:
        lines.append("memory of the host, for each GPU")
        lines += [f"  {name:<{_NAME}}{_size(size)}" for name, size in plan.memory.host.items()]
    return lines


def _size(size: int) -> str:
    return f"{size / GIB:9.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:9.2f} MiB"


def _time(plan: Plan) -> list[str]:
    time = plan.time
    parts = {"backbone": time.backbone, "head": time.head, "communication": time.communication}
    largest = max(*parts.values(), time.loader)
    lines = ["time of a step"]
    lines += [f"  {name:<{_NAME}}{1000 * s:9.1f} ms   {_bar(s, largest)}" for name, s in parts.items()]
    lines.append(f"  {'loader, beside these':<{_NAME}}{1000 * time.loader:9.1f} ms   {_bar(time.loader, largest)}")
    lines.append(f"  {'together':<{_NAME}}{1000 * time.step:9.1f} ms   {plan.images_per_second:,.0f} images a second")
    return lines


def _verdict(plan: Plan) -> list[str]:
    needed, usable = plan.memory.peak / GIB, plan.capacity / GIB
    lines = []
    if plan.fits:
        lines.append(f"It fits: {needed:.1f} of {usable:.1f} GiB. The largest part of a step is the {plan.time.limit}.")
    else:
        remedy = "; ".join(plan.advice) if plan.advice else "a smaller backbone or batch, or more GPUs"
        lines.append(f"It does not fit: {needed:.1f} of {usable:.1f} GiB. Any one of these would: {remedy}.")
    if plan.fitting_rate is None:
        lines.append("No sample rate fits with these options.")
    else:
        lines.append(f"The largest sample rate that fits is {plan.fitting_rate:g}.")
    if plan.equal_rate is None:
        lines.append("The head takes less time than the backbone at every sample rate.")
    elif plan.equal_rate == 0:
        lines.append("The head takes more time than the backbone at every sample rate.")
    else:
        lines.append(f"Beyond a sample rate of {plan.equal_rate:g} the head takes more time than the backbone.")
    return lines
