"""The plan: memory and time of a request, whether it fits, and which sample rates do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from partialfc.plan.measure import measure_rates
from partialfc.plan.memory import FRAGMENTATION, MemoryPlan, cpu_threads, plan_memory
from partialfc.plan.network import network_size
from partialfc.plan.rates import GIB, MachineRates, preset
from partialfc.plan.request import PlanRequest
from partialfc.plan.step_time import StepTime, head_time, step_time

_MOST_GPUS = 1 << 14
# Ways to store the head, each leaner than the one before; the first is what a request says.
STORAGE: dict[str, dict[str, Any]] = {
    "float32, sparse": {},
    "float32, deferred": {"head_update": "deferred"},
    "bfloat16, deferred": {"head_update": "deferred", "head_dtype": "bfloat16"},
    "bfloat16, deferred, state on the host": {
        "head_update": "deferred",
        "head_dtype": "bfloat16",
        "state_on_host": True,
    },
}


@dataclass(frozen=True)
class Plan:
    """What a training needs.

    Attributes:
        request: what was planned.
        precision: of the backbone.
        rates: of the machine.
        memory: of each process.
        capacity: bytes that a process may use.
        time: of a step.
        fitting_rate: the largest sample rate whose memory fits; None if none does.
        equal_rate: the sample rate at which the head takes as long as the backbone; None if it takes less at 1.
        advice: what would fit, where the request does not.
    """

    request: PlanRequest
    precision: str
    rates: MachineRates
    memory: MemoryPlan
    capacity: int
    time: StepTime
    fitting_rate: float | None
    equal_rate: float | None
    advice: list[str]

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.capacity

    @property
    def images_per_second(self) -> float:
        """Of all processes together."""
        return self.request.gathered * self.request.micro_steps / self.time.step

    def to_dict(self) -> dict[str, Any]:
        """Plain values: bytes and seconds."""
        return {
            "request": asdict(self.request),
            "precision": self.precision,
            "rates": asdict(self.rates),
            "sampled_classes": self.request.sampled,
            "memory": {
                "peak_bytes": self.memory.peak,
                "moment": self.memory.moment,
                "parts": self.memory.parts,
                "host": self.memory.host,
            },
            "capacity_bytes": self.capacity,
            "fits": self.fits,
            "time": asdict(self.time) | {"step": self.time.step, "limit": self.time.limit},
            "images_per_second": self.images_per_second,
            "fitting_rate": self.fitting_rate,
            "equal_rate": self.equal_rate,
            "advice": self.advice,
        }


def make_plan(request: PlanRequest, *, auto_precision: str = "bfloat16", rates: MachineRates | None = None) -> Plan:
    """Plan a training.

    Args:
        request: what to plan.
        auto_precision: what the precision "auto" means on this machine; other GPUs take bfloat16, a V100 float32.
        rates: of the machine; by default measured, or from the device's data sheet.

    Raises:
        InputError: the request names something that cannot be.
    """
    request.check()
    precision = _precision(request, auto_precision)
    network_size(request)  # refuses an option of the backbone before anything is measured
    if rates is None:
        rates = measure_rates(request, precision) if request.device in ("cpu", "cuda") else preset(request, precision)
    capacity = usable_bytes(request, rates)

    def fits(asked: PlanRequest) -> bool:
        return plan_memory(asked, precision, cpu_threads()).peak <= capacity

    time = step_time(request, rates, precision)
    return Plan(
        request=request,
        precision=precision,
        rates=rates,
        memory=plan_memory(request, precision, cpu_threads()),
        capacity=capacity,
        time=time,
        fitting_rate=largest_rate(lambda rate: fits(request.with_rate(rate))),
        equal_rate=_equal_rate(request, rates, time.backbone),
        advice=[] if fits(request) else _advice(request, fits),
    )


def _precision(request: PlanRequest, auto_precision: str) -> str:
    if request.precision != "auto":
        return request.precision
    if request.device in ("cpu", "cuda"):
        return auto_precision
    return "float32" if request.device == "v100" else "bfloat16"


def usable_bytes(request: PlanRequest, rates: MachineRates) -> int:
    """What a process may use of its device's memory."""
    whole = rates.memory_bytes if request.gpu_memory is None else int(request.gpu_memory * GIB)
    return int(whole * (1 - FRAGMENTATION))


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


def _equal_rate(request: PlanRequest, rates: MachineRates, backbone: float) -> float | None:
    rate = largest_rate(lambda rate: head_time(request.with_rate(rate), rates) <= backbone)
    return None if rate == 1.0 else rate or 0.0


def _advice(request: PlanRequest, fits: Callable[[PlanRequest], bool]) -> list[str]:
    """Changes each of which alone makes a request fit, the mildest first."""
    found = []
    lower = largest_rate(lambda rate: fits(request.with_rate(rate)))
    if lower is not None:
        found.append(f"--sample-rate {lower:g}")
    for changes in list(STORAGE.values())[1:]:
        if fits(replace(request, **changes)):
            found.append(
                " ".join(f"--{name.replace('_', '-')} {str(value).lower()}" for name, value in changes.items())
            )
            break
    recomputes = not request.checkpointing and not request.backbone.startswith(("mini", "mbf", "timm:"))
    if recomputes and fits(replace(request, checkpointing=True)):
        found.append("--checkpointing true")
    batch = request.batch_size
    while batch > 2:
        batch //= 2
        if fits(replace(request, batch_size=batch)):
            found.append(f"--batch-size {batch}")
            break
    gpus = fewest_gpus(request, fits)
    return found if gpus is None else [*found, f"--gpus {gpus}"]


def fewest_gpus(request: PlanRequest, fits: Callable[[PlanRequest], bool]) -> int | None:
    """The smallest power of two times the asked GPUs that fits; None up to 16,384."""
    gpus = request.gpus
    while (gpus := 2 * gpus) <= _MOST_GPUS:
        if fits(replace(request, gpus=gpus)):
            return gpus
    return None


def leanest_that_fits(request: PlanRequest, make: Callable[[PlanRequest], Plan]) -> tuple[str, Plan]:
    """The first way of `STORAGE` with which a request fits, and its plan; the last way if none does."""
    found = {}
    for name, changes in STORAGE.items():
        found = {name: make(replace(request, **changes))}
        if found[name].fits:
            break
    return next(iter(found.items()))
