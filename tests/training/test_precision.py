"""float16: the loss scale, and a step that overflows on one of three ranks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_workers import run_ranks
from small_runs import (
    after_each_step,
    final_tensors,
    interrupt_at,
    on_micro_batch,
    timeless,
    tiny_config,
    write_images,
)
from torch import Tensor

from partialfc.checkpoint.read import Checkpoint
from partialfc.config.options import HeadConfig
from partialfc.core.device import compute_dtype
from partialfc.data.loader import Batch
from partialfc.training import build
from partialfc.training import step as step_module
from partialfc.training.loop import train
from partialfc.training.nonfinite import LossScale, scale_gradient
from partialfc.training.run.log import read_metrics
from partialfc.training.step import Stepper

OVERFLOW_STEP = 1
FIRST_SCALE = 16.0  # few small images give large gradients


def test_the_scale_halves_when_a_step_overflows_and_doubles_after_two_thousand_good_ones() -> None:
    scale = LossScale()
    scale.update(False)
    assert scale == LossScale(2.0**15, 0)
    for _ in range(1999):
        scale.update(True)
    assert scale == LossScale(2.0**15, 1999)
    scale.update(True)
    assert scale == LossScale(2.0**16, 0)
    for _ in range(60):
        scale.update(False)
    assert scale.value == 2.0**-14


def test_the_scale_stands_on_the_way_back_only() -> None:
    embeddings = torch.randn(3, 4, requires_grad=True)
    scaled = scale_gradient(embeddings, 8.0)
    assert torch.equal(scaled, embeddings)
    gradient = torch.randn(3, 4)
    scaled.backward(gradient)
    assert embeddings.grad is not None
    assert torch.equal(embeddings.grad / 8.0, gradient)


def test_what_auto_means_depends_on_the_device() -> None:
    cpu = torch.device("cpu")
    assert compute_dtype("float16", cpu) == torch.float16
    assert compute_dtype("float32", cpu) == torch.float32
    assert compute_dtype("auto", cpu) in (torch.float32, torch.bfloat16)


def overflow_on_rank_1(rank: int, folder: Path) -> None:
    """Four steps in float16 with both updates of the head; on rank 1, one step's gradient leaves float16's range."""
    plain = step_module.scale_gradient
    seen: list[dict[str, Any]] = []

    def leave_the_range(embeddings: Tensor, factor: float) -> Tensor:
        return plain(embeddings, 2.0**60)

    def overflow(_: Stepper, batch: Batch) -> None:
        overflows = rank == 1 and batch.step == OVERFLOW_STEP
        step_module.scale_gradient = leave_the_range if overflows else plain

    def record(stepper: Stepper) -> None:
        state = stepper.state
        backbone = {name: value.clone() for name, value in state.backbone.named_parameters()}
        momentum = state.head_optimizer.row_state(state.head.centers)["momentum_buffer"]
        seen.append(
            {
                "parameters": {name: value.detach() for name, value in backbone.items()},
                "centers": state.head.centers.detach().clone(),
                "momentum": momentum.clone(),
                "scale": state.loss_scale.value if state.loss_scale else None,
                "skipped": state.skipped,
            }
        )

    build.LossScale = partial(LossScale, FIRST_SCALE)  # type: ignore[assignment, misc]
    results = {}
    for update in ("sparse", "deferred"):
        head = HeadConfig(0.5, scale=16.0, update=update)
        config = tiny_config(folder / "images", precision="float16", device="cpu", head=head)
        data = replace(config.data, global_batch_size=13, micro_batch_size=3)
        config = replace(config, data=data, schedule=replace(config.schedule, epochs=1.6))
        with on_micro_batch(overflow), after_each_step(record):
            train(config, folder / update, quiet=True)
        results[update] = list(seen)
        seen.clear()
    torch.save(results, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("overflow")
    write_images(folder / "images", [f"person {number}" for number in range(8)])
    run_ranks(3, overflow_on_rank_1, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(3)]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("update", ["sparse", "deferred"])
def test_an_overflow_on_one_rank_is_skipped_by_all_in_both_optimizers(
    ranks: list[dict[str, list[dict[str, Any]]]], update: str
) -> None:
    for rank in ranks:
        before, after = rank[update][OVERFLOW_STEP - 1], rank[update][OVERFLOW_STEP]
        assert [step["skipped"] for step in rank[update]] == [0, 1, 1, 1]
        assert [step["scale"] for step in rank[update]] == [FIRST_SCALE] + [FIRST_SCALE / 2] * 3
        assert torch.equal(before["centers"], after["centers"])
        assert torch.equal(before["momentum"], after["momentum"])
        for name, value in before["parameters"].items():
            assert torch.equal(value, after["parameters"][name]), name
        assert not torch.equal(after["centers"], rank[update][OVERFLOW_STEP + 1]["centers"])


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("update", ["sparse", "deferred"])
def test_replicas_stay_identical(ranks: list[dict[str, list[dict[str, Any]]]], update: str) -> None:
    for number, first in enumerate(ranks[0][update]):
        for other in ranks[1:]:
            for name, value in first["parameters"].items():
                assert torch.equal(value, other[update][number]["parameters"][name]), (number, name)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_both_updates_of_the_head_give_the_same_run(ranks: list[dict[str, list[dict[str, Any]]]]) -> None:
    for rank in ranks:
        torch.testing.assert_close(rank["sparse"][-1]["centers"], rank["deferred"][-1]["centers"])


def test_fp16_follows_float32_and_resumes_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_images(tmp_path / "images", [f"person {number}" for number in range(8)])
    config = tiny_config(images, precision="float16", device="cpu")
    monkeypatch.setattr(build, "LossScale", partial(LossScale, FIRST_SCALE))
    train(config, tmp_path / "straight", quiet=True)
    train(tiny_config(images, precision="float32"), tmp_path / "float32", quiet=True)
    with interrupt_at(4):
        train(config, tmp_path / "resumed", quiet=True)
    train(config, tmp_path / "resumed", resume=True, quiet=True)
    straight, resumed = final_tensors(tmp_path / "straight"), final_tensors(tmp_path / "resumed")
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())
    lines = {name: read_metrics(tmp_path / name / "metrics.jsonl") for name in ("straight", "resumed", "float32")}
    assert timeless(lines["straight"]) == timeless(lines["resumed"])
    half, full = lines["straight"][0], lines["float32"][0]  # later steps of so small a run magnify any rounding
    assert half["loss"] == pytest.approx(full["loss"], rel=0.01)
    assert half["grad_norm"] == pytest.approx(full["grad_norm"], rel=0.1)
    state = Checkpoint(tmp_path / "resumed" / "checkpoints" / "step-00000006").state
    assert state["loss_scale"] == {"value": FIRST_SCALE, "good_steps": 6}
