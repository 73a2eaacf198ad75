"""The memory model: exact where sizes are exact, monotone, and near what a process really takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from workloads import changed, workload

from partialfc.bench.head_step import HeadCase
from partialfc.config.build import build_backbone, build_head, build_head_optimizer, build_optimizers
from partialfc.head import optim
from partialfc.head.optim import RowwiseAdamW, RowwiseSGD
from partialfc.head.rows import Rows
from partialfc.head.sampling import sample_classes
from partialfc.plan.memory import CLASS_BYTES, GATHERED_BYTES, UPDATE_BYTES, plan_memory, weights_memory
from partialfc.plan.network import LiveBytes, network_size
from partialfc.plan.workload import Workload

SMALL = workload()
CPU = torch.device("cpu")


def test_weights_of_a_network_are_those_that_training_holds() -> None:
    asked = changed(SMALL, optimizer__name="adamw", optimizer__ema_decay=0.9)
    network = build_backbone(asked.config, 32, device=CPU)
    optimizer, _ = build_optimizers(asked.config, network, build_head(asked.config, 100, device=CPU))
    network(torch.zeros(4, 3, 32, 32)).sum().backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    exact = weights_memory(asked)
    parameters = list(network.parameters())
    assert exact["backbone weights"] == sum(each.nbytes for each in parameters)
    assert exact["backbone gradient"] == sum(each.grad.nbytes for each in parameters if each.grad is not None)
    assert exact["backbone optimizer"] == sum(state.nbytes for state in states)
    assert exact["backbone average"] == 4 * (network_size(SMALL).parameters + network_size(SMALL).buffers)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("dtype", "state"), [("float32", None), ("bfloat16", None), ("float32", "bfloat16")])
def test_weights_of_a_head_are_those_that_its_step_leaves(optimizer: str, dtype: str, state: str | None) -> None:
    options = {"optimizer__name": optimizer, "head__dtype": dtype, "head__state_dtype": state}
    asked = changed(SMALL, device="cpu", head__sample_rate=0.25, **options)
    head = build_head(asked.config, asked.classes, device=CPU)
    rowwise = build_head_optimizer(asked.config, head)
    embeddings, labels = HeadCase(asked.classes, 64, 8, 0.25, "cpu").batch(0)
    head(embeddings, labels).backward()
    rowwise.step()
    exact = weights_memory(asked)
    assert head.centers.grad is not None
    assert exact["centers"] == head.centers.nbytes
    assert exact["centers' optimizer"] == sum(value.nbytes for value in rowwise.state[head.centers].values())
    assert exact["sampled rows' gradient"] == head.centers.grad._values().nbytes


def test_shares_of_many_processes() -> None:
    asked = workload(2_059_906, 8, gpus=8, head__sample_rate=0.3, backbone__embedding_dim=512)
    assert asked.local_classes == 257_489
    assert asked.sampled == 77_247
    assert weights_memory(asked)["centers"] == 4 * 512 * 257_489
    assert weights_memory(asked.with_rate(0.0))["sampled rows' gradient"] == 4 * 512 * 8


def test_state_on_the_host_leaves_the_gpu() -> None:
    asked = workload(1_000_000, gpus=2)
    here, there = (plan_memory(changed(asked, head__state_on_host=on_host)) for on_host in (False, True))
    assert here.peak - there.peak == there.host["centers' optimizer"] == 4 * 500_000 * 64


def test_a_backbone_in_parts_is_shared() -> None:
    asked = workload(gpus=4, optimizer__name="adamw", optimizer__ema_decay=0.9)
    whole, parts = (weights_memory(changed(asked, processes__backbone=way)) for way in ("ddp", "fsdp"))
    for name in ("backbone weights", "backbone gradient", "backbone optimizer"):
        assert whole[name] / 4 <= parts[name] < whole[name] / 4 + 16, name
    assert parts["centers"] == whole["centers"]
    alone = changed(asked, gpus=1)
    assert weights_memory(changed(alone, processes__backbone="fsdp")) == weights_memory(alone)


def test_a_cpu_has_everything_in_one_memory() -> None:
    on_cpu = plan_memory(changed(SMALL, device="cpu", precision="float32"))
    assert on_cpu.host == {}
    assert on_cpu.parts["checkpoint copy"] > 2 * on_cpu.parts["centers"]
    assert "CUDA and NCCL" not in on_cpu.parts
    apart = plan_memory(changed(SMALL, precision="float32"))
    assert "checkpoint copy" in apart.host
    assert "checkpoint copy" not in apart.parts


workloads = st.builds(
    workload,
    classes=st.integers(1, 2_000_000),
    gpus=st.integers(1, 64),
    batch_size=st.sampled_from([2, 16]),
    data__micro_steps=st.sampled_from([None, 1, 2]),
    head__sample_rate=st.floats(0, 1),
    device=st.sampled_from(["cpu", "h100"]),
    precision=st.just("bfloat16"),
    optimizer__name=st.sampled_from(["sgd", "adamw"]),
    head__update=st.sampled_from(["sparse", "deferred"]),
    head__operand_dtype=st.sampled_from(["float32", "bfloat16"]),
    head__dtype=st.sampled_from(["float32", "bfloat16"]),
    head__state_on_host=st.booleans(),
)


@settings(deadline=None)
@given(asked=workloads, more=st.floats(0, 1))
def test_more_of_anything_takes_no_less_memory(asked: Workload, more: float) -> None:
    asked.check()
    peak = plan_memory(asked).peak
    assert peak == sum(plan_memory(asked).parts.values()) > 0
    rate = asked.largest_rate
    assert plan_memory(asked.with_rate(min(1.0, rate + more * (1 - rate)))).peak >= peak
    assert plan_memory(changed(asked, classes=asked.classes + int(1e6 * more))).peak >= peak
    assert plan_memory(changed(asked, optimizer__ema_decay=0.9)).peak > peak


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
    asked = changed(SMALL, head__sample_rate=0.0, head__update="deferred")
    peaks = []
    for images in (8192, 16384):
        head = build_head(asked.config, 64, device=CPU)
        embeddings, labels = HeadCase(64, 64, images, 0.0, "cpu").batch(0)
        with LiveBytes(head) as live:
            head(embeddings, labels).backward()
        peaks.append(live.peak)
    # What does not grow with the batch falls out of the difference.
    assert (peaks[1] - peaks[0]) / (8192 * 64) == pytest.approx(GATHERED_BYTES, rel=0.15)
