"""Rows that were not sampled, as dense SGD would have moved them."""

from __future__ import annotations

import copy

import pytest
import reference
import torch
from torch import Tensor

from partialfc.core.errors import InputError
from partialfc.head.backends import select
from partialfc.head.margins import CosFace
from partialfc.head.optim import RowwiseSGD
from partialfc.head.partial_fc import PartialFC

CLASSES, WIDTH, BATCH, SCALE = 60, 8, 6, 16.0


def head_of(dtype: torch.dtype, update: str = "sparse") -> PartialFC:
    """Its centers have length 3 or so: from 0.03 the first steps are so large that float32 and float64 part ways."""
    head = PartialFC(CLASSES, WIDTH, 0.1, CosFace(0.2), SCALE, dtype=dtype, update=update)  # type: ignore[arg-type]
    head.centers.data.mul_(100)
    return head


def learning_rate(step: int) -> float:
    return 0.05 * (1 - step / 400) * (1 + 0.5 * (step % 7))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    # A tenth of the classes has nearly all images: the others are behind for long.
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    return torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64), labels


def dense_centers(start: Tensor, sampled: list[Tensor], steps: int) -> tuple[Tensor, Tensor]:
    """What torch.optim.SGD makes of all centers in float64 when the loss is over the sampled classes."""
    centers = start.double().requires_grad_()
    optimizer = torch.optim.SGD([centers], lr=0.1, momentum=0.9, weight_decay=0.02)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        embeddings, labels = batch(step)
        reference.dense_loss(
            embeddings, centers, labels, sampled[step], scale=SCALE, target=reference.cosface(0.2)
        ).backward()
        optimizer.step()
        optimizer.zero_grad()
    return centers.detach(), optimizer.state[centers]["momentum_buffer"]


def train(head: PartialFC, optimizer: RowwiseSGD, first: int, last: int) -> list[Tensor]:
    """The sampled classes of each step."""
    sampled = []
    for step in range(first, last):
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        embeddings, labels = batch(step)
        head(embeddings.to(head.centers.dtype).requires_grad_(), labels).backward()
        gradient = head.centers.grad
        waiting = head.center_state.deferred
        sampled.append((waiting[0].batch.classes if waiting else gradient._indices()[0]).clone())
        optimizer.step()
        optimizer.zero_grad()
    return sampled


def optimizer_of(head: PartialFC) -> RowwiseSGD:
    return RowwiseSGD(head.parameters(), momentum=0.9, weight_decay=0.02, unsampled="lazy_dense")


@pytest.mark.parametrize("update", ["sparse", "deferred"])
@pytest.mark.parametrize(
    ("dtype", "loops", "tolerance"),
    [(torch.float32, True, 1e-5), (torch.float32, False, 1e-5), (torch.float64, False, 1e-12)],
)
def test_100_steps_equal_dense_sgd(
    update: str, dtype: torch.dtype, loops: bool, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not loops:
        monkeypatch.setattr(select, "numba_kernels", lambda: None)
    head = head_of(dtype, update)
    start, optimizer = head.centers.detach().clone(), optimizer_of(head)
    sampled = train(head, optimizer, 0, 100)
    assert max(len(classes) for classes in sampled) < CLASSES / 3
    optimizer.flush()
    centers, momentum = dense_centers(start, sampled, 100)
    buffer = optimizer.row_state(head.centers)["momentum_buffer"]
    assert (head.centers.double() - centers).norm() / centers.norm() < tolerance
    assert (buffer.double() - momentum).norm() / momentum.norm() < 10 * tolerance


def test_without_the_option_rows_rest() -> None:
    """The other rule gives other centers: what the test above compares is not the same by chance."""
    heads = []
    for unsampled in ("freeze", "lazy_dense"):
        head = head_of(torch.float64)
        optimizer = RowwiseSGD(head.parameters(), momentum=0.9, weight_decay=0.02, unsampled=unsampled)
        train(head, optimizer, 0, 30)
        optimizer.flush()
        heads.append(head.centers.detach())
    assert (heads[0] - heads[1]).norm() / heads[1].norm() > 1e-3


def test_a_saved_state_goes_on_like_the_whole_run() -> None:
    whole, saved = head_of(torch.float64), head_of(torch.float64)
    optimizers = optimizer_of(whole), optimizer_of(saved)
    train(whole, optimizers[0], 0, 40)
    train(saved, optimizers[1], 0, 25)
    other = head_of(torch.float64)
    other.load_state_dict(saved.state_dict())
    optimizer = optimizer_of(other)
    optimizer.load_state_dict(optimizers[1].state_dict())
    # The state is read first: it brings the rows up to date.
    other.centers.data.copy_(saved.centers)
    other.step = saved.step
    train(other, optimizer, 25, 40)
    optimizers[0].flush()
    optimizer.flush()
    torch.testing.assert_close(other.centers, whole.centers, rtol=1e-11, atol=1e-13)


def test_a_state_goes_back_into_the_optimizer_it_came_from() -> None:
    head = head_of(torch.float64)
    optimizer = optimizer_of(head)
    train(head, optimizer, 0, 20)
    state, centers = copy.deepcopy(optimizer.state_dict()), head.centers.detach().clone()
    results = []
    for _ in range(2):
        train(head, optimizer, 20, 40)
        optimizer.flush()
        results.append(head.centers.detach().clone())
        optimizer.load_state_dict(state)
        head.centers.data.copy_(centers)
        head.step = 20
    assert torch.equal(*results)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.slow
def test_bfloat16_rows_that_rest_decay_too(state_dtype: torch.dtype) -> None:
    """Weight decay alone, far below half a unit in the last place from one sampling to the next."""
    lengths = []
    for dtype in (torch.float32, torch.bfloat16):
        head = PartialFC(600, WIDTH, 0.2, CosFace(0.2), SCALE, dtype=dtype)
        optimizer = RowwiseSGD(
            head.parameters(), lr=0.1, weight_decay=1e-4, unsampled="lazy_dense", state_dtype=state_dtype
        )
        start = head.centers.detach().clone().float()
        for step in range(200):
            embeddings, labels = batch(step)
            (0.0 * head(embeddings.float(), labels)).backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.flush()
        lengths.append(float(head.centers.detach().float().norm() / start.norm()))
    assert lengths[0] < 0.985
    assert lengths[1] == pytest.approx(lengths[0], abs=1e-3)


@pytest.mark.parametrize("loops", [True, False])
def test_two_forward_passes_before_a_backward_pass(loops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one brings rows up to date, but none that the first has read."""
    if not loops:
        monkeypatch.setattr(select, "numba_kernels", lambda: None)
    head = head_of(torch.float32)
    optimizer = optimizer_of(head)
    train(head, optimizer, 0, 5)
    first, second = (head(embeddings.float(), labels) for embeddings, labels in (batch(5), batch(6)))
    (first + second).backward()
    optimizer.step()
    assert head.step == 6


def test_a_copy_of_the_head_leaves_the_original_alone() -> None:
    head = head_of(torch.float64, "deferred")
    optimizer = optimizer_of(head)
    train(head, optimizer, 0, 20)
    head(*batch(20)).backward()  # waits for the optimizer of the original
    copied, before = copy.deepcopy(head), head.centers.detach().clone()
    assert copied.step == head.step
    rest = RowwiseSGD(copied.parameters())
    rest.step()
    assert torch.equal(copied.centers, before)
    for step in range(21, 25):
        copied(*batch(step)).backward()
        rest.step()
    assert torch.equal(head.centers, before)


def test_needs_a_head() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4, 2))
    optimizer = RowwiseSGD([parameter], unsampled="lazy_dense")
    parameter.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), (4, 2), check_invariants=True)
    with pytest.raises(InputError, match="PartialFC head"):
        optimizer.step()
    with pytest.raises(InputError, match="'freeze' or 'lazy_dense'"):
        RowwiseSGD([parameter], unsampled="dense")  # type: ignore[arg-type]
