"""What is measured: the dense head is right, phases add up, memory is counted and refused."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import cosface, dense_loss, relative_error

from partialfc.bench import head as bench
from partialfc.bench import machine
from partialfc.bench.head import bench_head
from partialfc.bench.head_step import HeadCase
from partialfc.bench.head_variants import DenseHead, dense_step, our_steps
from partialfc.config.options import OptimizerConfig
from partialfc.core.errors import InputError, JobError

SMALL = HeadCase(num_classes=300, embedding_dim=16, batch_size=8, sample_rate=0.1, device="cpu")
PHASES = {"sampling", "forward", "backward", "optimizer"}


def test_dense_head_computes_the_loss() -> None:
    head = DenseHead(SMALL)
    torch.manual_seed(0)
    embeddings, labels = SMALL.batch(0)
    # Nearer to their own centers: past a loss of 69.08 the clamped probability saturates.
    embeddings = (embeddings.detach() + 300 * head.centers[labels].detach()).requires_grad_()
    classes, places = head.sample(labels)
    loss = head(embeddings, classes, places)
    loss.backward()
    assert head.centers.grad is not None
    assert not head.centers.grad.is_sparse
    exact = embeddings.detach().double().requires_grad_()
    centers = head.centers.detach().double().requires_grad_()
    expected = dense_loss(exact, centers, labels, classes, scale=64.0, target=cosface(0.4))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert embeddings.grad is not None
    assert exact.grad is not None
    assert centers.grad is not None
    assert relative_error(embeddings.grad, exact.grad) < 1e-4
    assert relative_error(head.centers.grad, centers.grad) < 1e-4


@pytest.mark.parametrize(("rate", "count"), [(0.1, 30), (1.0, 300), (0.0, None)])
def test_dense_head_samples_the_positives_and_fills_up(rate: float, count: int | None) -> None:
    head = DenseHead(HeadCase(300, 4, 8, rate, "cpu"))
    labels = torch.tensor([7, 7, 299, 0])
    classes, places = head.sample(labels)
    assert len(classes) == (count or 3)
    assert torch.equal(classes[places], labels)
    assert bool((classes.diff() > 0).all())


def test_dense_step_moves_every_row_and_ours_only_the_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[torch.nn.Parameter] = []
    original = torch.nn.Module.register_parameter

    def remember(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if name == "centers" and parameter is not None:
            built.append(parameter)
        original(module, name, parameter)

    monkeypatch.setattr(torch.nn.Module, "register_parameter", remember)
    steps = our_steps(SMALL) | {"dense baseline": dense_step(SMALL)}
    ours, dense = built
    for variant, step in steps.items():
        parameter, count = (dense, 300) if variant == "dense baseline" else (ours, 30)
        before = parameter.detach().clone()
        assert set(step(*SMALL.batch(0))) == PHASES
        assert int((parameter.detach() != before).any(dim=1).sum()) == count


def test_results_of_all_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "measure_peak", lambda configuration, variant: 1234)
    results = list(bench_head(300, 16, 8, 0.1, steps=2, baseline=True))
    ours = ["sparse", "deferred", "sparse bfloat16", "deferred bfloat16"]
    assert [result["variant"] for result in results] == [*(f"partialfc {each}" for each in ours), "dense baseline"]
    for result in results:
        assert set(result["phases_ms"]) == PHASES
        assert 0 < result["step_ms_min"] <= result["step_ms_median"]
        assert result["peak_bytes"] == 1234
        assert result["configuration"]["num_classes"] == 300
        assert result["hardware"]["torch"] == torch.__version__
    assert [
        result["variant"] for result in bench_head(300, 16, 8, steps=1, update="sparse", operand_dtype="bfloat16")
    ] == ["partialfc sparse bfloat16"]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_memory_is_that_of_the_variant_in_its_own_process() -> None:
    configuration = HeadCase(20_000, 256, 4, 0.0, "cpu")
    centers = 20_000 * 256 * 4
    beyond_centers_and_momentum = bench.measure_peak(configuration, "deferred") - 2 * centers
    assert -(1 << 20) < beyond_centers_and_momentum < 150 << 20


def test_memory_is_what_the_steps_add_to_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps run for real in this process, whose own peak other tests may have raised already."""
    peaks = iter([1000, 1700])
    monkeypatch.setattr(bench, "peak_bytes", lambda device: next(peaks))
    assert bench.run_for_memory(SMALL, "dense baseline") == 700


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_killed_process_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "run_for_memory", kill_itself)
    with pytest.raises(JobError, match="'sparse' was killed"):
        bench.measure_peak(SMALL, "sparse")


def kill_itself(configuration: HeadCase, variant: str) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "--classes is 0"),
        ({"embedding_dim": -1}, "--embedding-dim is -1"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"steps": 0}, "--steps is 0"),
        ({"sample_rate": 1.5}, "--sample-rate is 1.5"),
        ({"sample_rate": float("nan")}, "--sample-rate is nan"),
        ({"device": "abacus"}, "'cpu' or 'cuda'"),
        ({"device": "meta"}, "'cpu' or 'cuda'"),
        ({"device": "cuda:99"}, "'cpu' or 'cuda'"),
        ({"num_classes": 10**10}, "GiB are free: lower --classes"),
        ({"num_classes": 10**10, "baseline": True}, "leave out --baseline or lower --classes"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_allocated(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        next(bench_head(**({"num_classes": 100} | arguments)))


def test_facts_of_the_machine_are_plausible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 << 20 < machine.available_bytes("cpu") < 1 << 50
    facts = machine.describe("cpu")
    assert facts["cpu"]
    assert int(facts["cores"]) >= 1
    # Where there is no /proc, the standard library answers.
    monkeypatch.setattr(machine, "PROC", tmp_path)
    assert machine.describe("cpu")["cpu"]
    assert 1 << 20 < machine.available_bytes("cpu") < 1 << 50
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Abacus: 10 beads\nmodel name\t: other\n")
    (tmp_path / "meminfo").write_text("MemTotal:  64 kB\nMemAvailable:  8 kB\n")
    assert machine.describe("cpu")["cpu"] == "Abacus: 10 beads"
    assert machine.available_bytes("cpu") == 8 * 1024


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_head_is_built_as_training_builds_it(optimizer: Any) -> None:
    options: dict[str, Any] = {"margin": "arcface", "update": "deferred", "dtype": "bfloat16", "state_dtype": "float32"}
    head, rowwise = HeadCase(20, 4, 8, 0.25, "cpu").build(OptimizerConfig(optimizer, lr=0.3), **options)
    assert (head.num_classes, head.embedding_dim, head.sample_rate, head.update) == (20, 4, 0.25, "deferred")
    assert (type(head.loss_config.margin).__name__, head.centers.dtype) == ("ArcFace", torch.bfloat16)
    assert type(rowwise).__name__.lower() == f"rowwise{optimizer}"
    assert rowwise.param_groups[0]["lr"] == 0.3
