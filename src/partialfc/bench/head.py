"""`partialfc bench head`: step time by phase and peak memory, our head beside the dense one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from multiprocessing import get_context
from typing import Any, Literal, get_args

import torch

from partialfc.bench.head_variants import HeadConfiguration, Phases, StepFunction, Variant, dense_step, our_steps
from partialfc.bench.machine import available_bytes, describe, peak_resident_bytes
from partialfc.core.errors import InputError, JobError
from partialfc.head.sampling import sample_bound

WARM_UP = 2
_MEMORY_STEPS = 2
_GIB = 1 << 30
_SCRATCH = 512 << 20  # tiles at work and tiles kept, at most


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

    All variants take turns step by step, so that a machine that slows down slows all of them; memory is measured in a
    fresh process for each.

    Args:
        num_classes, embedding_dim, batch_size, sample_rate: C, D, B and the part of the classes that a step uses.
        steps: measured steps of each variant.
        baseline: also measure the dense head.
        device: "cpu", "cuda" or "cuda:0" …
        update: measure only this way to update; None for both.
        operand_dtype: measure only products of operands rounded to this; None for both.

    Yields:
        One result a variant: "variant", "step_ms_median", "step_ms_min", "peak_bytes" (beyond imports), "phases_ms"
        (medians of sampling, forward, backward, optimizer), "configuration", "hardware".

    Raises:
        InputError: an impossible size, no such device, or more memory than there is.
        JobError: a measuring process was killed.
    """
    configuration = HeadConfiguration(num_classes, embedding_dim, batch_size, sample_rate, device)
    variants: list[Variant] = [
        variant
        for variant in get_args(Variant)
        if variant != "dense baseline"
        and (update is None or variant.startswith(update))
        and (operand_dtype is None or variant.endswith("bfloat16") == (operand_dtype == "bfloat16"))
    ]
    if baseline:
        variants.append("dense baseline")
    _check(configuration, steps, variants)
    peaks = {variant: measure_peak(configuration, variant) for variant in variants}
    timed = _alternate(configuration, variants, steps)
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
            "configuration": asdict(configuration) | {"steps": steps},
            "hardware": describe(device),
        }


def _check(configuration: HeadConfiguration, steps: int, variants: list[Variant]) -> None:
    """Every mistake that can be known before anything is allocated."""
    sizes = {"classes": configuration.num_classes, "embedding-dim": configuration.embedding_dim}
    sizes |= {"batch-size": configuration.batch_size, "steps": steps}
    for name, value in sizes.items():
        if value < 1:
            raise InputError(f"--{name} is {value}; it must be at least 1.")
    if not (math.isfinite(configuration.sample_rate) and 0 <= configuration.sample_rate <= 1):
        raise InputError(f"--sample-rate is {configuration.sample_rate}; it is a part of the classes, from 0 to 1.")
    _check_device(configuration.device)
    needed, free = _needed_bytes(configuration, variants), available_bytes(configuration.device)
    if needed > free:
        advice = "leave out --baseline or lower --classes" if "dense baseline" in variants else "lower --classes"
        raise InputError(
            f"{configuration.num_classes} classes of {configuration.embedding_dim} dimensions need about "
            f"{needed / _GIB:.1f} GiB, but {free / _GIB:.1f} GiB are free: {advice}."
        )


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device is {name!r}; it is 'cpu' or 'cuda'.")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"--device is {name!r}, but PyTorch sees {torch.cuda.device_count()} GPUs here: use 'cpu'.")


def _needed_bytes(configuration: HeadConfiguration, variants: list[Variant]) -> int:
    """About what all variants hold while they take turns."""
    row = 4 * configuration.embedding_dim
    batch = configuration.batch_size
    sampled = sample_bound(configuration.num_classes, configuration.sample_rate, batch)
    ours, dense = set(variants) - {"dense baseline"}, "dense baseline" in variants
    needed = 0
    if ours:
        # Centers and momentum; the gradient of the sparse update.
        needed += 2 * configuration.num_classes * row + _SCRATCH
        needed += sampled * row if any(variant.startswith("sparse") for variant in ours) else 0
    if dense:
        # Centers, momentum, gradient and the optimizer's temporary; gathered, normalised and their gradients; logits.
        needed += (4 * configuration.num_classes + 3 * sampled) * row + 5 * 4 * batch * sampled
    return needed


def _steps_of(configuration: HeadConfiguration, variants: list[Variant]) -> dict[Variant, StepFunction]:
    steps: dict[Variant, StepFunction] = {}
    if set(variants) - {"dense baseline"}:
        steps |= our_steps(configuration)
    if "dense baseline" in variants:
        steps["dense baseline"] = dense_step(configuration)
    return steps


def _alternate(
    configuration: HeadConfiguration, variants: list[Variant], steps: int
) -> dict[Variant, list[dict[str, float]]]:
    """Seconds of each phase of each measured step."""
    functions = _steps_of(configuration, variants)
    timed: dict[Variant, list[dict[str, float]]] = {variant: [] for variant in variants}
    for step in range(WARM_UP + steps):
        for variant in variants:
            phases = Phases(configuration.device)
            functions[variant](*configuration.batch(step), phases)
            if step >= WARM_UP:
                timed[variant].append(phases.seconds)
    return timed


def measure_peak(configuration: HeadConfiguration, variant: Variant) -> int:
    """Peak bytes of a variant beyond its imports, from a fresh process.

    Raises:
        JobError: the process was killed, most likely for want of memory.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(run_for_memory, configuration, variant).result()
        except BrokenProcessPool as error:
            raise JobError(f"The process that measured the memory of '{variant}' was killed.") from error


def run_for_memory(configuration: HeadConfiguration, variant: Variant) -> int:
    """Some steps of one variant; how far they raised the peak of this process's, or the GPU's, memory."""
    is_cuda = torch.device(configuration.device).type == "cuda"
    tiny = replace(configuration, num_classes=64, embedding_dim=8, batch_size=4, sample_rate=0.5)
    _steps_of(tiny, [variant])[variant](*tiny.batch(0), Phases(tiny.device))  # libraries loaded and loops compiled
    before = 0 if is_cuda else peak_resident_bytes()
    step = _steps_of(configuration, [variant])[variant]
    for number in range(_MEMORY_STEPS):
        step(*configuration.batch(number), Phases(configuration.device))
    return torch.cuda.max_memory_allocated() if is_cuda else peak_resident_bytes() - before
