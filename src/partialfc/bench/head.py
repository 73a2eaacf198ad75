"""`partialfc bench head`: step time by phase and peak memory, our head beside the dense one."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from multiprocessing import get_context
from typing import Any, Literal

import torch

from partialfc.bench.head_step import HeadCase
from partialfc.bench.head_variants import OURS, Phases, StepFunction, Variant, dense_step, our_steps
from partialfc.bench.machine import available_bytes, describe
from partialfc.core.device import choose_device, peak_bytes
from partialfc.core.errors import InputError, JobError
from partialfc.head.backends.tile_sizes import SCRATCH_BYTES
from partialfc.head.sampling import sample_bound

_WARM_UP = 2
_MEMORY_STEPS = 2
_GIB = 1 << 30
_SCRATCH = 2 * SCRATCH_BYTES  # tiles in use and tiles kept, at most


def bench_head(
    num_classes: int,
    embedding_dim: int = 512,
    batch_size: int = 128,
    sample_rate: float = 0.1,
    steps: int = 10,
    baseline: bool = False,
    device: str = "cpu",
    update: Literal["sparse", "deferred"] | None = None,
    operand_dtype: Literal["float32", "bfloat16"] | None = None,
) -> Iterator[dict[str, Any]]:
    """Measure the head on this machine, in one process.

    The variants take turns step by step, so that a slowdown of the machine affects all of them. The memory of each is
    measured in a fresh process.

    Args:
        num_classes, embedding_dim, batch_size, sample_rate: C, D, B and the fraction of the classes that a step uses.
        steps: measured steps of each variant.
        baseline: also measure the dense head.
        device: "cpu" or "cuda".
        update: measure only this kind of update; None for both.
        operand_dtype: measure only products with operands of this dtype; None for both.

    Yields:
        One result a variant: "variant", "step_ms_median", "step_ms_min", "peak_bytes" (beyond imports), "phases_ms"
        (medians of sampling, forward, backward, optimizer), "configuration", "hardware".

    Raises:
        InputError: an impossible size, no such device, or more memory than there is.
        JobError: a measuring process was killed.
    """
    case = HeadCase(num_classes, embedding_dim, batch_size, sample_rate, device)
    variants: list[Variant] = [
        variant
        for variant in OURS
        if (update is None or variant.startswith(update))
        and (operand_dtype is None or variant.endswith("bfloat16") == (operand_dtype == "bfloat16"))
    ]
    if baseline:
        variants.append("dense baseline")
    _check(case, steps, variants)
    peaks = {variant: measure_peak(case, variant) for variant in variants}
    timed = _alternate(case, variants, steps)
    for variant in variants:
        step_ms = [1000 * sum(phases.values()) for phases in timed[variant]]
        yield {
            "variant": variant if variant == "dense baseline" else f"partialfc {variant}",
            "step_ms_median": round(statistics.median(step_ms), 3),
            "step_ms_min": round(min(step_ms), 3),
            "peak_bytes": peaks[variant],
            "phases_ms": {
                name: round(1000 * statistics.median(phases[name] for phases in timed[variant]), 3)
                for name in ("sampling", "forward", "backward", "optimizer")
            },
            "configuration": asdict(case) | {"steps": steps},
            "hardware": describe(device),
        }


def _check(case: HeadCase, steps: int, variants: list[Variant]) -> None:
    """Refuse every mistake before anything is allocated."""
    sizes = {"classes": case.num_classes, "embedding-dim": case.embedding_dim, "batch-size": case.batch_size}
    for name, value in (sizes | {"steps": steps}).items():
        if value < 1:
            raise InputError(f"--{name} is {value}; it must be at least 1.")
    if not 0 <= case.sample_rate <= 1:
        raise InputError(f"--sample-rate is {case.sample_rate}; it is a part of the classes, from 0 to 1.")
    if case.device not in ("cpu", "cuda"):
        raise InputError(f"--device is {case.device!r}; it is 'cpu' or 'cuda'.")
    choose_device(case.device)
    needed, free = _needed_bytes(case, variants), available_bytes(case.device)
    if needed > free:
        advice = "leave out --baseline or lower --classes" if "dense baseline" in variants else "lower --classes"
        raise InputError(
            f"{case.num_classes} classes of {case.embedding_dim} dimensions need about {needed / _GIB:.1f} GiB, but "
            f"{free / _GIB:.1f} GiB are free: {advice}."
        )


def _needed_bytes(case: HeadCase, variants: list[Variant]) -> int:
    """Roughly what all variants hold while they take turns."""
    row, batch = 4 * case.embedding_dim, case.batch_size
    sampled = sample_bound(case.num_classes, case.sample_rate, batch)
    needed = 0
    if set(variants) & set(OURS):  # centers and momentum; the gradient of the sparse update
        needed += 2 * case.num_classes * row + _SCRATCH
        needed += sampled * row if any(variant.startswith("sparse") for variant in variants) else 0
    if "dense baseline" in variants:
        # Centers, momentum, gradient and the optimizer's temporary; gathered, normalised and their gradients; logits.
        needed += (4 * case.num_classes + 3 * sampled) * row + 5 * 4 * batch * sampled
    return needed


def _steps_of(case: HeadCase, variants: list[Variant]) -> dict[Variant, StepFunction]:
    steps: dict[Variant, StepFunction] = our_steps(case) if set(variants) & set(OURS) else {}
    if "dense baseline" in variants:
        steps["dense baseline"] = dense_step(case)
    return steps


def _alternate(case: HeadCase, variants: list[Variant], steps: int) -> dict[Variant, list[dict[str, float]]]:
    """Seconds of each phase of each measured step."""
    functions = _steps_of(case, variants)
    timed: dict[Variant, list[dict[str, float]]] = {variant: [] for variant in variants}
    for step in range(_WARM_UP + steps):
        for variant in variants:
            phases = Phases(case.device)
            functions[variant](*case.batch(step), phases)
            if step >= _WARM_UP:
                timed[variant].append(phases.seconds)
    return timed


def measure_peak(case: HeadCase, variant: Variant) -> int:
    """Peak bytes of a variant beyond its imports, from a fresh process.

    Raises:
        JobError: the process was killed, most likely for lack of memory.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(run_for_memory, case, variant).result()
        except BrokenProcessPool as error:
            raise JobError(f"The process that measured the memory of '{variant}' was killed.") from error


def run_for_memory(case: HeadCase, variant: Variant) -> int:
    """Run some steps of one variant and return by how much they raised the peak memory of this process or the GPU."""
    device = torch.device(case.device)
    tiny = replace(case, num_classes=64, embedding_dim=8, batch_size=4, sample_rate=0.5)
    _steps_of(tiny, [variant])[variant](*tiny.batch(0), Phases(tiny.device))  # loads libraries and compiles kernels
    before = 0 if device.type == "cuda" else peak_bytes(device)
    step = _steps_of(case, [variant])[variant]
    for number in range(_MEMORY_STEPS):
        step(*case.batch(number), Phases(case.device))
    return peak_bytes(device) - before
