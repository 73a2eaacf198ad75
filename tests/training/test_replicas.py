"""The backbone in parts over two processes beside a whole replica in each: the same run, and on from one to the other.

Also gradients that are exchanged in bfloat16, under both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_workers import run_ranks
from small_runs import final_tensors, timeless, tiny_config, write_images
from torch import Tensor, nn

from partialfc.backbones import BACKBONES, create_backbone
from partialfc.backbones.vit import ViT
from partialfc.config.options import BackboneConfig, OptimizerConfig, ProcessesConfig, TrainConfig
from partialfc.core.errors import InputError
from partialfc.data.loader import Batch
from partialfc.model.files import load_model
from partialfc.training import step as step_module
from partialfc.training.checkpoint.read import Checkpoint
from partialfc.training.loop import train
from partialfc.training.replicas import _units, split_over_processes, whole_network
from partialfc.training.run.log import read_metrics
from partialfc.training.step import Stepper

STEPS, STOP = 4, 3
DDP, FSDP = ProcessesConfig(), ProcessesConfig(backbone="fsdp")


@pytest.fixture(autouse=True)
def short_vit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of the twelve blocks of ViT-T, so that checkpoints stay small."""
    monkeypatch.setitem(BACKBONES, "vit_short", partial(ViT, (256, 3)))


def exact_config(images: Path, processes: ProcessesConfig = DDP) -> TrainConfig:
    """All that could go wrong, in float64: micro-steps, clipping that bites, averages, random parts, recomputation."""
    backbone = BackboneConfig(
        "vit_short", 16, sync_batch_norm=True, drop_path=0.2, mask_ratio=0.25, freeze=[], checkpointing=True
    )
    optimizer = OptimizerConfig("adamw", 1e-3, "absolute", weight_decay=0.1, max_grad_norm=0.01, ema_decay=0.9)
    config = tiny_config(
        images, backbone=backbone, precision="float64", device="cpu", optimizer=optimizer, processes=processes
    )
    data = replace(config.data, global_batch_size=10, micro_batch_size=10, micro_steps=2)
    schedule = replace(config.schedule, epochs=STEPS * 10 / 32)
    return replace(config, data=data, schedule=schedule, output=replace(config.output, checkpoint_every=2, keep=9))


def plain_config(images: Path, processes: ProcessesConfig, **changes: Any) -> TrainConfig:
    """float32, SGD, one micro-step, no clipping."""
    optimizer = OptimizerConfig(lr=0.01, lr_scaling="absolute", max_grad_norm=0.0)
    base = replace(exact_config(images, processes), precision="float32", optimizer=optimizer)
    backbone = BackboneConfig("vit_short", 16)
    return replace(base, backbone=backbone, data=replace(base.data, micro_steps=1), **changes)


class Stopped(Exception):
    """The run was stopped on purpose."""


@contextmanager
def stopped_before(step: int) -> Iterator[None]:
    """A run ends as if it had been killed, before `step`."""
    original = Stepper.step

    def stop(self: Stepper, micro_batches: list[Batch]) -> dict[str, Tensor]:
        if self.state.done == step:
            raise Stopped
        return original(self, micro_batches)

    Stepper.step = stop  # type: ignore[method-assign]
    try:
        yield
    except Stopped:
        pass
    finally:
        Stepper.step = original  # type: ignore[method-assign]


@contextmanager
def not_finite_on(rank: int) -> Iterator[None]:
    """In step 1 the gradient of rank 1 is NaN, in step 2 its images are."""
    loss_of, augment = Stepper._loss, step_module.augment

    def loss(self: Stepper, batch: Batch) -> Tensor:
        bad = torch.nan if rank == 1 and batch.step == 2 else 1.0
        step_module.augment = lambda *inputs, **options: augment(*inputs, **options) * bad
        result = loss_of(self, batch)
        if rank == 1 and batch.step == 1:
            result.register_hook(lambda gradient: gradient * torch.nan)
        return result

    Stepper._loss = loss  # type: ignore[method-assign]
    try:
        yield
    finally:
        Stepper._loss, step_module.augment = loss_of, augment  # type: ignore[method-assign]


@contextmanager
def recorded_exchanges(record: dict[str, int]) -> Iterator[None]:
    """Count what is reduced over the processes, in elements by operation and dtype."""
    names = [each for each in ("all_reduce", "reduce_scatter_tensor", "reduce_scatter_single") if hasattr(dist, each)]
    originals = {name: getattr(dist, name) for name in names}

    def recording(name: str) -> Any:
        def call(*inputs: Any, **options: Any) -> Any:
            tensor = options.get("input", inputs[1] if len(inputs) > 1 and name != "all_reduce" else inputs[:1])
            tensor = tensor[0] if isinstance(tensor, tuple) else tensor
            key = f"{name.partition('_s')[0]} {str(tensor.dtype).removeprefix('torch.')}"
            record[key] = record.get(key, 0) + tensor.numel()
            return originals[name](*inputs, **options)

        return call

    for name in names:
        setattr(dist, name, recording(name))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)


def on_two(rank: int, folder: Path) -> None:
    BACKBONES["vit_short"] = partial(ViT, (256, 3))
    images = folder / "images"
    for name, processes in (("ddp", DDP), ("fsdp", FSDP)):
        train(exact_config(images, processes), folder / name, quiet=True)
        with not_finite_on(rank):
            train(plain_config(images, processes, precision="float64"), folder / f"{name}-skips", quiet=True)
        train(plain_config(images, processes), folder / f"{name}-32", quiet=True)
        rounded: dict[str, int] = {}
        with recorded_exchanges(rounded):
            halved = replace(processes, gradients="bfloat16")
            train(plain_config(images, halved), folder / f"{name}-16", quiet=True)
        torch.save(rounded, folder / f"{name}-exchanged-{rank}.pt")
    straight = exact_config(images, FSDP)
    for name in ("fsdp-fsdp", "fsdp-alone"):
        config = (
            straight
            if name == "fsdp-fsdp"
            else replace(straight, output=replace(straight.output, checkpoint_async=False))
        )
        with stopped_before(STOP):
            train(config, folder / name, quiet=True)
    train(straight, folder / "fsdp-fsdp", resume=True, quiet=True)
    train(straight, folder / "alone-fsdp", resume=True, quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    BACKBONES["vit_short"] = partial(ViT, (256, 3))
    folder = tmp_path_factory.mktemp("replicas")
    images = write_images(folder / "images", [f"person {number}" for number in range(8)], size=20)
    with stopped_before(STOP):
        train(exact_config(images), folder / "alone-fsdp", quiet=True)
    run_ranks(2, on_two, folder)
    train(exact_config(images), folder / "fsdp-alone", resume=True, quiet=True)
    return folder


def curve(root: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in read_metrics(root / "metrics.jsonl") if line["kind"] == "train"]


def assert_same_run(found: Path, expected: Path, rtol: float) -> None:
    """Loss curve, norms of gradients and all tensors of the last checkpoint agree."""
    assert curve(found) == pytest.approx(curve(expected), rel=rtol)
    assert curve(found, "grad_norm") == pytest.approx(curve(expected, "grad_norm"), rel=rtol)
    tensors, others = final_tensors(found), final_tensors(expected)
    assert tensors.keys() == others.keys()
    for name, value in tensors.items():
        # A bias whose gradient is 0 but for rounding has moved by rounding alone: steps are of the size 1e-3.
        largest = max(1e-3, float(others[name].abs().max()))
        torch.testing.assert_close(value, others[name], rtol=rtol, atol=rtol * largest, msg=f"{found.name}: {name}")


@pytest.mark.parametrize("other", ["fsdp", "fsdp-alone", "alone-fsdp"])
def test_in_parts_the_run_is_that_of_replicas_also_from_or_to_one_process(folder: Path, other: str) -> None:
    assert len(curve(folder / "ddp")) == STEPS
    assert min(curve(folder / "ddp", "grad_norm")) > 0.1  # all gradients are scaled down
    assert_same_run(folder / other, folder / "ddp", rtol=1e-9)


def test_in_float32_it_is_the_same_within_rounding(folder: Path) -> None:
    assert_same_run(folder / "fsdp-32", folder / "ddp-32", rtol=1e-3)
    assert curve(folder / "fsdp-32")[:2] == pytest.approx(curve(folder / "ddp-32")[:2], rel=1e-5)


def test_interrupted_in_parts_is_uninterrupted_bit_for_bit(folder: Path) -> None:
    straight, resumed = final_tensors(folder / "fsdp"), final_tensors(folder / "fsdp-fsdp")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())
    lines = [timeless(read_metrics(folder / name / "metrics.jsonl")) for name in ("fsdp", "fsdp-fsdp")]
    assert lines[0] == lines[1]


def test_what_is_not_finite_on_one_process_is_skipped_by_both(folder: Path) -> None:
    for name in ("ddp-skips", "fsdp-skips"):
        assert Checkpoint(folder / name / "checkpoints" / f"step-{STEPS:08d}").state["skipped"] == 2
    expected = final_tensors(folder / "ddp-skips")
    for name, value in final_tensors(folder / "fsdp-skips").items():
        assert torch.isfinite(value).all(), name
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_the_saved_model_is_the_whole_average(folder: Path) -> None:
    saved = load_model(folder / "fsdp").backbone.state_dict()
    tensors = final_tensors(folder / "fsdp")
    for name, value in saved.items():
        torch.testing.assert_close(value.double(), tensors[f"backbone-ema/{name}"].double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_gradients_travel_in_bfloat16_and_stay_close(folder: Path, name: str) -> None:
    exchanged = torch.load(folder / f"{name}-exchanged-0.pt", weights_only=True)
    network = create_backbone("vit_short", embedding_dim=16, image_size=20)
    trained = sum(each.numel() for each in network.parameters() if each.requires_grad)
    way = "all_reduce" if name == "ddp" else "reduce"
    found = sum(count for key, count in exchanged.items() if key.startswith(way) and key.endswith("bfloat16"))
    passes = STEPS + (name == "ddp")  # DDP lays out its exchange in a pass of its own
    assert trained * passes <= found <= 1.02 * trained * passes  # FSDP pads rows that do not divide
    full, rounded = curve(folder / f"{name}-32"), curve(folder / f"{name}-16")
    assert rounded[0] == full[0]
    assert rounded != full
    assert rounded == pytest.approx(full, rel=2e-2)


def test_units_are_blocks_and_large_layers() -> None:
    with torch.device("meta"):
        vit = create_backbone("vit_t", embedding_dim=512, image_size=112)
        r50 = create_backbone("r50", embedding_dim=512, image_size=112)
    assert list(_units(vit)) == [*vit.blocks, vit.feature[0]]
    assert r50.fc in list(_units(r50))
    assert all(block in list(_units(r50)) for block in r50.layer3)


def test_one_process_keeps_its_network() -> None:
    network = nn.Linear(2, 2)
    assert whole_network(network, None) is network


def test_what_cannot_be_split_or_combined_is_refused(tmp_path: Path) -> None:
    network = nn.Module()
    network.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(InputError, match="fsdp cannot split scale, a single number: use ddp"):
        split_over_processes(network, torch.device("cpu"), torch.float32)
    compiled = BackboneConfig("mini", 16, compile=True)
    with pytest.raises(InputError, match=r"backbone\.compile does not go together with processes\.backbone fsdp"):
        tiny_config(tmp_path, backbone=compiled, processes=FSDP).check()
    with pytest.raises(InputError, match=r"precision float64 is for proofs, and processes\.gradients bfloat16 rounds"):
        tiny_config(tmp_path, precision="float64", processes=ProcessesConfig(gradients="bfloat16")).check()
