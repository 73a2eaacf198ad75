"""The backbone sharded over two processes beside a replica in each: the same run, and resumed from one to the other.

Also gradients that are exchanged in bfloat16, under both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_workers import run_ranks
from small_runs import (
    final_tensors,
    interrupt_at,
    losses,
    poison_gradient_at,
    poison_images_at,
    timeless,
    tiny_config,
    write_images,
)
from torch import nn

from partialfc.backbones import BACKBONES, create_backbone
from partialfc.backbones.vit import ViT
from partialfc.checkpoint.read import Checkpoint
from partialfc.config.options import BackboneConfig, OptimizerConfig, ProcessesConfig, TrainConfig
from partialfc.core.errors import InputError
from partialfc.model.files import load_model
from partialfc.training.loop import train
from partialfc.training.replicas import fsdp_units, shard_over_processes, whole_network
from partialfc.training.run.log import read_metrics

STEPS, STOP = 4, 3
DDP, FSDP = ProcessesConfig(), ProcessesConfig(backbone="fsdp")


@pytest.fixture(scope="module", autouse=True)
def short_vit() -> Iterator[None]:
    """Three of the twelve blocks of ViT-T, so that checkpoints stay small; gone after this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, "vit_short", partial(ViT, (256, 3)))
        yield


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


@contextmanager
def poisoned() -> Iterator[None]:
    """In step 1 the gradient of this process is NaN, in step 2 its images are."""
    with poison_gradient_at([1]), poison_images_at([2]):
        yield


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
        with poisoned() if rank == 1 else nullcontext():
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
        with interrupt_at(STOP):
            train(config, folder / name, quiet=True)
    train(straight, folder / "fsdp-fsdp", resume=True, quiet=True)
    train(straight, folder / "alone-fsdp", resume=True, quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replicas")
    images = write_images(folder / "images", [f"person {number}" for number in range(8)], size=20)
    with interrupt_at(STOP):
        train(exact_config(images), folder / "alone-fsdp", quiet=True)
    run_ranks(2, on_two, folder)
    train(exact_config(images), folder / "fsdp-alone", resume=True, quiet=True)
    return folder


def assert_same_run(actual: Path, expected: Path, rtol: float) -> None:
    """Loss curve, norms of gradients and all tensors of the last checkpoint agree."""
    assert losses(actual) == pytest.approx(losses(expected), rel=rtol)
    assert losses(actual, "grad_norm") == pytest.approx(losses(expected, "grad_norm"), rel=rtol)
    tensors, others = final_tensors(actual), final_tensors(expected)
    assert tensors.keys() == others.keys()
    for name, value in tensors.items():
        # A bias whose gradient is 0 but for rounding has moved by rounding alone: steps are of the size 1e-3.
        largest = max(1e-3, float(others[name].abs().max()))
        torch.testing.assert_close(value, others[name], rtol=rtol, atol=rtol * largest, msg=f"{actual.name}: {name}")


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("other", ["fsdp", "fsdp-alone", "alone-fsdp"])
def test_a_sharded_run_is_that_of_replicas_also_from_or_to_one_process(folder: Path, other: str) -> None:
    assert len(losses(folder / "ddp")) == STEPS
    assert min(losses(folder / "ddp", "grad_norm")) > 0.1  # all gradients are scaled down
    assert_same_run(folder / other, folder / "ddp", rtol=1e-9)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_in_float32_it_is_the_same_within_rounding(folder: Path) -> None:
    assert_same_run(folder / "fsdp-32", folder / "ddp-32", rtol=1e-3)
    assert losses(folder / "fsdp-32")[:2] == pytest.approx(losses(folder / "ddp-32")[:2], rel=1e-5)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_sharded_run_is_resumed_bit_for_bit(folder: Path) -> None:
    straight, resumed = final_tensors(folder / "fsdp"), final_tensors(folder / "fsdp-fsdp")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())
    lines = [timeless(read_metrics(folder / name / "metrics.jsonl")) for name in ("fsdp", "fsdp-fsdp")]
    assert lines[0] == lines[1]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_what_is_not_finite_on_one_process_is_skipped_by_both(folder: Path) -> None:
    for name in ("ddp-skips", "fsdp-skips"):
        assert Checkpoint(folder / name / "checkpoints" / f"step-{STEPS:08d}").state["skipped"] == 2
    expected = final_tensors(folder / "ddp-skips")
    for name, value in final_tensors(folder / "fsdp-skips").items():
        assert torch.isfinite(value).all(), name
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_saved_model_is_the_whole_average(folder: Path) -> None:
    saved = load_model(folder / "fsdp").backbone.state_dict()
    tensors = final_tensors(folder / "fsdp")
    for name, value in saved.items():
        torch.testing.assert_close(value.double(), tensors[f"backbone-ema/{name}"].double(), rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_gradients_travel_in_bfloat16_and_stay_close(folder: Path, name: str) -> None:
    exchanged = torch.load(folder / f"{name}-exchanged-0.pt", weights_only=True)
    network = create_backbone("vit_short", embedding_dim=16, image_size=20)
    trained = sum(each.numel() for each in network.parameters() if each.requires_grad)
    way = "all_reduce" if name == "ddp" else "reduce"
    elements = sum(count for key, count in exchanged.items() if key.startswith(way) and key.endswith("bfloat16"))
    passes = STEPS + (name == "ddp")  # DDP lays out its exchange in a pass of its own
    assert trained * passes <= elements <= 1.02 * trained * passes  # FSDP pads rows that do not divide
    full, rounded = losses(folder / f"{name}-32"), losses(folder / f"{name}-16")
    assert rounded[0] == full[0]
    assert rounded != full
    assert rounded == pytest.approx(full, rel=2e-2)


def test_units_are_blocks_and_large_layers() -> None:
    with torch.device("meta"):
        vit = create_backbone("vit_t", embedding_dim=512, image_size=112)
        r50 = create_backbone("r50", embedding_dim=512, image_size=112)
    assert list(fsdp_units(vit)) == [*vit.get_submodule("blocks").children(), vit.get_submodule("feature.0")]
    assert r50.fc in list(fsdp_units(r50))
    assert all(block in list(fsdp_units(r50)) for block in r50.layer3)


def test_one_process_keeps_its_network() -> None:
    network = nn.Linear(2, 2)
    assert whole_network(network, None) is network


def test_what_cannot_be_sharded_or_combined_is_refused(tmp_path: Path) -> None:
    network = nn.Module()
    network.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(InputError, match="fsdp cannot split scale, a single number: use ddp"):
        shard_over_processes(network, torch.device("cpu"), torch.float32)
    compiled = BackboneConfig("mini", 16, compile=True)
    with pytest.raises(InputError, match=r"backbone\.compile does not go together with processes\.backbone fsdp"):
        tiny_config(tmp_path, backbone=compiled, processes=FSDP).check()
    with pytest.raises(InputError, match=r"precision float64 is for proofs, and processes\.gradients bfloat16 rounds"):
        tiny_config(tmp_path, precision="float64", processes=ProcessesConfig(gradients="bfloat16")).check()
