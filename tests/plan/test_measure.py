"""Rates of this machine: the planned step is what is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from workloads import changed, workload

from partialfc.bench.head_step import median_seconds
from partialfc.plan import measure
from partialfc.plan.step_time import backbone_flops, head_time, step_time

SMALL = workload(5_000, 16, device="cpu")


def test_a_planned_step_takes_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "measure_seconds", lambda asked, precision: (0.25, 0.125))
    rates = measure.measure_rates(SMALL, "float32")
    time = step_time(SMALL, rates, "float32")
    assert (time.backbone, time.head, time.communication) == pytest.approx((0.25, 0.125, 0.0))
    # Other sizes follow in proportion to their operations.
    doubled = changed(SMALL, head__sample_rate=0.2)
    assert head_time(doubled, rates) == pytest.approx(2 * 0.125)
    assert rates.backbone_flops == pytest.approx(backbone_flops(SMALL, "float32") / 0.25)


@pytest.mark.parametrize("options", [{}, {"optimizer__name": "adamw", "data__micro_batch_size": 8, "gpus": 1}])
def test_steps_are_those_of_the_workload(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """One step of backbone and head each: their batches, micro-steps and optimizers."""
    asked = changed(SMALL, **options)
    seen: list[tuple[int, ...]] = []
    stepped: list[str] = []

    def once(step: Callable[[], None], device: torch.device) -> float:
        step()
        return 1.0

    def watch(module: nn.Module, arguments: Any) -> None:
        if type(module).__name__ in ("Mini", "PartialFC"):
            seen.append(tuple(arguments[0].shape))

    monkeypatch.setattr(measure, "median_seconds", once)
    hooks = [
        torch.nn.modules.module.register_module_forward_pre_hook(watch),
        register_optimizer_step_post_hook(lambda optimizer, *_: stepped.append(type(optimizer).__name__)),
    ]
    try:
        assert measure.measure_seconds(asked, "float32") == (1.0, 1.0)
    finally:
        for hook in hooks:
            hook.remove()
    batch, micro_steps = (16, 1) if not options else (8, 2)
    assert seen == [(batch, 3, 32, 32)] * micro_steps + [(batch, 64)] * micro_steps
    assert stepped == (["SGD", "RowwiseSGD"] if not options else ["AdamW", "RowwiseAdamW"])


def test_the_median_leaves_warm_up_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 9.0, 10.0, 11.0, 20.0, 22.0, 30.0, 37.0])
    monkeypatch.setattr("partialfc.bench.head_step.time.perf_counter", lambda: next(clock))
    assert median_seconds(lambda: None, torch.device("cpu"), steps=3, warm_up=1) == 2.0
