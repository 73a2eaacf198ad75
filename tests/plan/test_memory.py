"""The memory model: exact where sizes are exact, monotone, and near what a process really takes."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.optimizer import register_optimizer_step_post_hook

from partialfc.bench.machine import peak_resident_bytes
from partialfc.config.options import BackboneConfig, OptimizerConfig, TrainConfig
from partialfc.head import optim
from partialfc.head.optim import RowwiseAdamW, RowwiseSGD
from partialfc.head.rows import Rows
from partialfc.head.sampling import sample_classes
from partialfc.plan.measure import head_batch, head_step
from partialfc.plan.memory import CLASS_BYTES, GATHERED_BYTES, UPDATE_BYTES, head_memory, plan_memory, weights_memory
from partialfc.plan.network import LiveBytes, network_size
from partialfc.plan.request import PlanRequest
from partialfc.training.build import build_backbone, build_optimizers

SMALL = PlanRequest(classes=10_000, gpus=1, backbone="mini", image_size=32, embedding_dim=64, batch_size=8)


def test_weights_of_a_network_are_those_that_training_holds() -> None:
    config = TrainConfig(backbone=BackboneConfig("mini", 64), optimizer=OptimizerConfig("adamw"))
    network = build_backbone(config, 32, device=torch.device("cpu"))
    head, _ = head_step(replace(SMALL, device="cpu"))
    optimizer, _ = build_optimizers(config, network, head)
    network(torch.zeros(4, 3, 32, 32)).sum().backward()
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    exact = weights_memory(replace(SMALL, optimizer="adamw", ema=True))
    parameters = list(network.parameters())
    assert exact["backbone weights"] == sum(each.nbytes for each in parameters)
    assert exact["backbone gradient"] == sum(each.grad.nbytes for each in parameters if each.grad is not None)
    assert exact["backbone optimizer"] == sum(each.nbytes for each in kept)
    assert exact["backbone average"] == 4 * (network_size(SMALL).parameters + network_size(SMALL).buffers)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("dtype", "state"), [("float32", None), ("bfloat16", None), ("float32", "bfloat16")])
def test_weights_of_a_head_are_those_that_its_step_leaves(optimizer: str, dtype: str, state: str | None) -> None:
    request = replace(SMALL, device="cpu", optimizer=optimizer, head_dtype=dtype, state_dtype=state, sample_rate=0.25)
    head, step_of = head_step(request)
    kept: list[torch.Tensor] = []
    gradients: list[int] = []

    def watch(stepped: torch.optim.Optimizer, *_: object) -> None:
        assert head.centers.grad is not None
        gradients.append(head.centers.grad._values().nbytes)
        kept[:] = stepped.state[head.centers].values()

    handle = register_optimizer_step_post_hook(watch)
    step_of(8)()
    handle.remove()
    exact = weights_memory(request)
    assert exact["centers"] == head.centers.nbytes
    assert exact["centers' optimizer"] == sum(each.nbytes for each in kept)
    assert exact["sampled rows' gradient"] == gradients[0]


def test_shares_of_many_processes() -> None:
    request = replace(SMALL, classes=2_059_906, gpus=8, sample_rate=0.3, embedding_dim=512)
    assert request.local_classes == 257_489
    assert request.sampled == 77_247
    assert weights_memory(request)["centers"] == 4 * 512 * 257_489
    assert weights_memory(replace(request, sample_rate=0.0))["sampled rows' gradient"] == 4 * 512 * 8


def test_state_on_the_host_leaves_the_gpu() -> None:
    request = replace(SMALL, classes=1_000_000, gpus=2)
    here, there = (plan_memory(replace(request, state_on_host=on_host), "bfloat16") for on_host in (False, True))
    assert here.peak - there.peak == there.host["centers' optimizer"] == 4 * 500_000 * 64


def test_a_backbone_in_parts_is_shared() -> None:
    request = replace(SMALL, gpus=4, optimizer="adamw", ema=True)
    whole, parts = (weights_memory(replace(request, processes_backbone=way)) for way in ("ddp", "fsdp"))
    for name in ("backbone weights", "backbone gradient", "backbone optimizer"):
        assert whole[name] / 4 <= parts[name] < whole[name] / 4 + 16, name
    assert parts["centers"] == whole["centers"]
    alone = replace(request, gpus=1)
    assert weights_memory(replace(alone, processes_backbone="fsdp")) == weights_memory(alone)


def test_a_cpu_has_everything_in_one_memory() -> None:
    on_cpu = plan_memory(replace(SMALL, device="cpu"), "float32")
    assert on_cpu.host == {}
    assert on_cpu.parts["checkpoint copy"] > 2 * on_cpu.parts["centers"]
    assert "CUDA and NCCL" not in on_cpu.parts
    apart = plan_memory(SMALL, "float32")
    assert "checkpoint copy" in apart.host
    assert "checkpoint copy" not in apart.parts


requests = st.builds(
    PlanRequest,
    classes=st.integers(1, 2_000_000),
    gpus=st.integers(1, 64),
    backbone=st.just("mini"),
    image_size=st.just(32),
    embedding_dim=st.just(64),
    batch_size=st.sampled_from([2, 16]),
    micro_steps=st.integers(1, 3),
    sample_rate=st.floats(0, 1),
    device=st.sampled_from(["cpu", "h100"]),
    optimizer=st.sampled_from(["sgd", "adamw"]),
    head_update=st.sampled_from(["sparse", "deferred"]),
    head_operand_dtype=st.sampled_from(["float32", "bfloat16"]),
    head_dtype=st.sampled_from(["float32", "bfloat16"]),
    state_on_host=st.booleans(),
)


@settings(deadline=None)
@given(request=requests, more=st.floats(0, 1))
def test_more_of_anything_takes_no_less_memory(request: PlanRequest, more: float) -> None:
    peak = plan_memory(request, "bfloat16").peak
    assert peak == sum(plan_memory(request, "bfloat16").parts.values()) > 0
    rate = request.sample_rate + more * (1 - request.sample_rate)
    assert plan_memory(request.with_rate(min(1.0, rate)), "bfloat16").peak >= peak
    assert plan_memory(replace(request, classes=request.classes + int(1e6 * more)), "bfloat16").peak >= peak
    assert plan_memory(replace(request, ema=True), "bfloat16").peak > peak


def test_bytes_of_an_updated_number_are_counted_on_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "numba_kernels_for", lambda *tensors: None)
    for name, kind in (("sgd", RowwiseSGD), ("adamw", RowwiseAdamW)):
        for rounded in (False, True):
            parameter = torch.nn.Parameter(torch.ones(4096, 512, dtype=torch.bfloat16 if rounded else torch.float32))
            optimizer = kind([parameter])
            optimizer.row_state(parameter)
            rows, gradient = Rows(torch.arange(4096), torch.float32, None), torch.ones(4096, 512)
            with torch.no_grad(), LiveBytes(torch.nn.Identity()) as live:
                optimizer._update_rows(parameter, rows, gradient, optimizer.param_groups[0])
            assert live.peak / gradient.numel() == pytest.approx(UPDATE_BYTES[name, rounded], rel=0.1)


def test_bytes_of_a_sampled_class_are_counted_on_the_sampling() -> None:
    with LiveBytes(torch.nn.Identity()) as live:
        classes = sample_classes(
            torch.arange(100), num_classes=200_000, sample_rate=0.25, seed=0, step=0, start=0, stop=200_000
        )
    assert 0.8 * CLASS_BYTES < live.peak / len(classes) < CLASS_BYTES


def test_bytes_of_the_batch_are_counted_on_the_head() -> None:
    request = replace(SMALL, device="cpu", classes=64, sample_rate=0.0, head_update="deferred")
    peaks = []
    for images in (8192, 16384):
        head, _ = head_step(request)
        embeddings, labels = head_batch(request, images, 0)
        with LiveBytes(head) as live:
            head(embeddings, labels).backward()
        peaks.append(live.peak)
    # What does not grow with the batch falls out of the difference.
    assert (peaks[1] - peaks[0]) / (8192 * 64) == pytest.approx(GATHERED_BYTES, rel=0.15)


def _warm_up(request: PlanRequest) -> None:
    head_step(replace(request, classes=64, embedding_dim=8))[1](4)()  # libraries loaded and loops compiled


def _measured_peak(request: PlanRequest) -> int:
    _warm_up(request)
    before = peak_resident_bytes()
    _, step_of = head_step(request)
    for _ in range(2):
        step_of(request.batch_size)()
    return peak_resident_bytes() - before


def test_a_process_takes_what_is_predicted() -> None:
    request = PlanRequest(
        classes=100_000, gpus=1, device="cpu", sample_rate=0.2, backbone="mini", embedding_dim=256, batch_size=64
    )
    # What a first process compiles, the second loads: compiling would raise the memory before.
    for work in (_warm_up, _measured_peak):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            measured = pool.submit(work, request).result()
    assert head_memory(request, torch.get_num_threads()) == pytest.approx(measured, rel=0.15)
