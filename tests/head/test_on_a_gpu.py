"""What only a GPU can show of a step: no synchronisation at all, and that a CUDA graph replays it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from partialfc.core.errors import InputError
from partialfc.head.inputs import NonFiniteEmbeddings
from partialfc.head.optim import RowwiseSGD
from partialfc.head.partial_fc import PartialFC
from partialfc.head.sampling import SamplingGraph, sample_classes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CLASSES, WIDTH, BATCH = 50_000, 128, 64


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def make(
    rate: float = 0.1, dtype: torch.dtype = torch.float32, lr: float | Tensor = 0.05, **options: Any
) -> tuple[PartialFC, RowwiseSGD]:
    head = PartialFC(
        CLASSES, WIDTH, rate, update="deferred", operand_dtype=torch.bfloat16, dtype=dtype, seed=1, device="cuda"
    )
    return head, RowwiseSGD(head.parameters(), lr=lr, **options)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(step)
    embeddings = torch.randn(BATCH, WIDTH, device="cuda", generator=generator)
    return embeddings.requires_grad_(), torch.randint(CLASSES, (BATCH,), device="cuda", generator=generator)


def take_step(head: PartialFC, optimizer: RowwiseSGD, embeddings: Tensor, labels: Tensor) -> Tensor:
    loss = head(embeddings, labels)
    loss.backward()
    optimizer.step()
    return loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_a_step_does_not_wait_for_the_device(rate: float, dtype: torch.dtype, no_synchronisation: None) -> None:
    head, optimizer = make(rate, dtype)
    batches = [batch(step) for step in range(4)]
    for number, one in enumerate(batches):
        if number == 2:  # kernels are compiled, and buffers allocated
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        take_step(head, optimizer, *one)
    torch.cuda.set_sync_debug_mode("default")
    head.check()
    assert head.step == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_a_cuda_graph_replays_a_step(rate: float, dtype: torch.dtype) -> None:
    """The same centers as without a graph: other batches, other negatives, another rounding and rate every time."""
    lr = torch.tensor(0.05, device="cuda")
    (head, optimizer), (plain, plain_optimizer) = make(rate, dtype, lr=lr), make(rate, dtype, lr=lr)
    embeddings, labels = batch(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            take_step(head, optimizer, embeddings, labels)
            take_step(plain, plain_optimizer, *batch(0))
    torch.cuda.current_stream().wait_stream(stream)
    embeddings.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = take_step(head, optimizer, embeddings, labels)
    for step in range(2, 6):
        head.step = step
        lr.fill_(0.05 / step)
        new = batch(step)
        with torch.no_grad():
            embeddings.copy_(new[0])
            labels.copy_(new[1])
        graph.replay()
        plain.step = step
        expected = take_step(plain, plain_optimizer, *new)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(embeddings.grad, new[0].grad, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(head.centers, plain.centers, rtol=2e-2, atol=1e-5)
    labels[3] = CLASSES
    before = head.centers.detach().clone()
    graph.replay()
    with pytest.raises(InputError, match=f"label {CLASSES} lies outside"):
        head.check()
    assert torch.equal(before, head.centers)


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_a_replayed_sample_is_that_of_a_cpu(rate: float) -> None:
    """Replays begin with the third batch of a size."""
    options = {"num_classes": CLASSES, "sample_rate": rate, "seed": 1, "start": 5000, "stop": CLASSES - 7}
    sample = SamplingGraph()
    for step, size in enumerate((BATCH, BATCH, BATCH, 2 * BATCH, BATCH, BATCH, BATCH, BATCH)):
        labels = torch.randint(CLASSES, (size,), generator=torch.Generator().manual_seed(step))
        classes, count = sample(labels.cuda(), step=torch.tensor(step, device="cuda"), **options)
        assert torch.equal(classes[: int(count)].cpu(), sample_classes(labels, step=step, **options))
        assert (classes[int(count) :] == options["stop"]).all()


def test_bad_input_is_told_in_the_next_step_at_the_latest_after_it_arrived() -> None:
    head, optimizer = make()
    embeddings, labels = batch(0)
    take_step(head, optimizer, embeddings, labels)
    before = head.centers.detach().clone()
    bad = (embeddings.detach() * torch.nan).requires_grad_()
    take_step(head, optimizer, bad, labels)
    torch.cuda.synchronize()
    assert bad.grad is not None
    assert bool((bad.grad == 0).all())
    with pytest.raises(NonFiniteEmbeddings, match="embeddings of step 1"):
        take_step(head, optimizer, embeddings, labels)
    assert torch.equal(before, head.centers)
    take_step(head, optimizer, embeddings, labels)
    head.check()
    assert not torch.equal(before, head.centers)


def test_state_on_the_host_is_that_on_the_gpu() -> None:
    """It is read right after the step: what reads it waits for the GPU, which writes it over the bus."""
    tables = []
    for on_host in (False, True):
        head, optimizer = make(0.1, state_on_host=on_host)
        for step in range(3):
            take_step(head, optimizer, *batch(step))
        table = optimizer.state_dict()["state"][0]["momentum_buffer"]
        assert table.is_cuda != on_host
        tables.append(table.cpu().clone())
    torch.testing.assert_close(tables[1], tables[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("unsampled", ["freeze", "lazy_dense"])
def test_state_on_the_host_with_every_rule_for_unsampled_rows(unsampled: str) -> None:
    centers = []
    for on_host in (False, True):
        head, optimizer = make(0.1, state_on_host=on_host, unsampled=unsampled)
        for step in range(4):
            take_step(head, optimizer, *batch(step))
        optimizer.flush()
        centers.append(head.centers.detach().clone())
    torch.testing.assert_close(centers[1], centers[0], rtol=1e-4, atol=1e-6)


def test_a_head_can_be_copied_between_steps() -> None:
    head, optimizer = make()
    take_step(head, optimizer, *batch(0))
    copied = copy.deepcopy(head)
    assert torch.equal(copied(*batch(1)), head(*batch(1)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_head_on_another_than_the_present_device() -> None:
    centers = []
    for device in ("cuda:0", "cuda:1"):
        head = PartialFC(CLASSES, WIDTH, 0.1, update="deferred", operand_dtype=torch.bfloat16, seed=1, device=device)
        optimizer = RowwiseSGD(head.parameters(), lr=0.05)
        for step in range(3):
            embeddings, labels = batch(step)
            take_step(head, optimizer, embeddings.detach().to(device).requires_grad_(), labels.to(device))
        centers.append(head.centers.detach().cpu())
    torch.testing.assert_close(centers[1], centers[0], rtol=1e-4, atol=1e-6)
