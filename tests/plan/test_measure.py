"""Rates from measured seconds: whatever made the seconds must come out again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from partialfc.plan import measure
from partialfc.plan.request import PlanRequest
from partialfc.plan.step_time import backbone_flops, head_work

SMALL = PlanRequest(
    classes=50_000, gpus=1, device="cpu", backbone="mini", image_size=32, embedding_dim=16, batch_size=64
)


def test_three_sizes_of_the_head_give_its_three_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    works = [
        head_work(replace(SMALL, batch_size=batch, sample_rate=sampled / 50_000))
        for sampled, batch in ((1_000, 32), (20_000, 32), (20_000, 256))
    ]
    seconds = [0.003 + work.flops / 2e11 + work.row_bytes / 3e10 for work in works]

    def timed(steps: Sequence[Callable[[], None]], device: torch.device, rounds: int, warm_up: int) -> list[float]:
        assert len(steps) == 4
        for step in steps:
            step()
        return [*seconds, 0.5]

    monkeypatch.setattr(measure, "median_seconds", timed)
    ran: list[int] = []
    rates, beside = measure.measure_head(SMALL, [lambda: ran.append(1)])
    assert (rates.flops, rates.row_bytes, rates.seconds) == pytest.approx((2e11, 3e10, 0.003))
    assert (beside, ran) == ([0.5], [1])


def test_noise_does_not_make_a_rate_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "median_seconds", lambda *_: [0.3, 0.2, 0.1])
    rates, _ = measure.measure_head(SMALL)
    assert rates.flops > 0
    assert rates.row_bytes > 0
    assert rates.seconds >= 0


def test_two_batches_of_the_backbone_give_its_two_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    each = backbone_flops(SMALL, "float32") / 64
    monkeypatch.setattr(measure, "_backbone_seconds", lambda request, precision, images: 0.001 + images * each / 5e11)
    assert measure.measure_backbone(SMALL, "float32") == pytest.approx((5e11, 0.001))


def test_steps_take_turns() -> None:
    order: list[str] = []
    steps = [lambda: order.append("a"), lambda: order.append("b")]
    seconds = measure.median_seconds(steps, torch.device("cpu"), 2, 1)
    assert order == ["a", "b"] * 3
    assert all(0 <= each < 1 for each in seconds)
