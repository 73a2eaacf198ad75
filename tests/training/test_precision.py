"""float16: the loss scale, and a step that overflows on one of three ranks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_workers import run_ranks
from small_runs import final_tensors, timeless, tiny_config, write_images
from torch import Tensor

from partialfc.config.options import HeadConfig
from partialfc.data.loader import Batch
from partialfc.training import build
from partialfc.training import step as step_module
from partialfc.training.build import compute_dtype
from partialfc.training.checkpoint.read import Checkpoint
from partialfc.training.loop import train
from partialfc.training.run.log import read_metrics
from partialfc.training.scaling import LossScale, scale_gradient
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
    assert torch.equal(embeddings.grad / 8.0, gradient)


def test_what_auto_means_depends_on_the_device() -> None:
    cpu = torch.device("cpu")
    assert compute_dtype("float16", cpu) == torch.float16
    assert compute_dtype("float32", cpu) == torch.float32
    assert compute_dtype("auto", cpu) in (torch.float32, torch.bfloat16)


def overflow_on_rank_1(rank: int, folder: Path) -> None:
    """Four steps in float16 with both updates of the head; on rank 1, one step's gradient leaves float16's range."""
    original_loss, original_step = Stepper._loss, Stepper.step
    plain = step_module.scale_gradient
    seen: list[dict[str, Any]] = []

    def loss(self: Stepper, batch: Batch) -> Tensor:
        overflows = rank == 1 and batch.step == OVERFLOW_STEP
        step_module.scale_gradient = (lambda x, factor: plain(x, 2.0**60)) if overflows else plain
        return original_loss(self, batch)

    def step(self: Stepper, micro_batches: list[Batch]) -> dict[str, Tensor]:
        figures = original_step(self, micro_batches)
        backbone = {name: value.clone() for name, value in self.state.backbone.named_parameters()}
        momentum = self.state.head_optimizer.row_state(self.state.head.centers)["momentum_buffer"]
        seen.append(
            {
                "parameters": {name: value.detach() for name, value in backbone.items()},
                "centers": self.state.head.centers.detach().clone(),
                "momentum": momentum.clone(),
                "scale": self.state.loss_scale.value if self.state.loss_scale else None,
                "skipped": self.state.skipped,
            }
        )
        return figures

    Stepper._loss, Stepper.step = loss, step  # type: ignore[method-assign]
    build.LossScale = partial(LossScale, FIRST_SCALE)  # type: ignore[assignment, misc]
    results = {}
    for update in ("sparse", "deferred"):
        head = HeadConfig(0.5, scale=16.0, update=update)
        config = tiny_config(folder / "images", precision="float16", device="cpu", head=head)
        data = replace(config.data, global_batch_size=13, micro_batch_size=3)
        train(replace(config, data=data, schedule=replace(config.schedule, epochs=1.6)), folder / update, quiet=True)
        results[update] = list(seen)
        seen.clear()
    torch.save(results, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("overflow")
    write_images(folder / "images", [f"person {number}" for number in range(8)])
    run_ranks(3, overflow_on_rank_1, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(3)]


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


@pytest.mark.parametrize("update", ["sparse", "deferred"])
def test_replicas_stay_identical(ranks: list[dict[str, list[dict[str, Any]]]], update: str) -> None:
    for number, first in enumerate(ranks[0][update]):
        for other in ranks[1:]:
            for name, value in first["parameters"].items():
                assert torch.equal(value, other[update][number]["parameters"][name]), (number, name)


def test_both_updates_of_the_head_give_the_same_run(ranks: list[dict[str, list[dict[str, Any]]]]) -> None:
    for rank in ranks:
        torch.testing.assert_close(rank["sparse"][-1]["centers"], rank["deferred"][-1]["centers"])


def test_fp16_follows_float32_and_resumes_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_images(tmp_path / "images", [f"person {number}" for number in range(8)])
    config = tiny_config(images, precision="float16", device="cpu")
    monkeypatch.setattr(build, "LossScale", partial(LossScale, FIRST_SCALE))
    train(config, tmp_path / "straight", quiet=True)
    train(tiny_config(images, precision="float32"), tmp_path / "float32", quiet=True)
    original = Stepper._loss

    def stop(self: Stepper, batch: Batch) -> Tensor:
        if batch.step == 4:
            raise KeyboardInterrupt
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "_loss", stop)
        with pytest.raises(KeyboardInterrupt):
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
