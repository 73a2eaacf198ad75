"""The row-wise optimizers beside torch's own, under GradScaler, and what they refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from partialfc.core.errors import InputError
from partialfc.head.backends import select
from partialfc.head.margins import CosFace
from partialfc.head.optim import RowwiseAdamW, RowwiseSGD
from partialfc.head.partial_fc import PartialFC

CLASSES, DIM = 41, 6
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-3}
ADAMW: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
both_updates = pytest.mark.parametrize("update", ["sparse", "deferred"])
both_optimizers = pytest.mark.parametrize("make", [RowwiseSGD, RowwiseAdamW])


class DenseHead(nn.Module):
    """The same loss by one linear layer and autograd."""

    def __init__(self, centers: Tensor) -> None:
        super().__init__()
        self.centers = nn.Parameter(centers.clone())

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        cosine = functional.linear(functional.normalize(embeddings), functional.normalize(self.centers))
        own = functional.one_hot(labels, CLASSES).to(cosine.dtype)
        return functional.cross_entropy(16.0 * (cosine - 0.2 * own), labels)


def batches(steps: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(8, 5, generator=generator).to(dtype), torch.randint(CLASSES, (8,), generator=generator))
        for _ in range(steps)
    ]


def train(
    head: PartialFC | DenseHead, optimizer_of: Callable[[Any], torch.optim.Optimizer], steps: int = 50
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, final centers and final weights of a small net below the head; the rate of learning falls."""
    torch.manual_seed(4)
    dtype = head.centers.dtype
    net = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, DIM)).to(dtype)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9), optimizer_of(head.parameters())]
    schedules = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: 1 / (1 + step / 20)) for one in optimizers]
    losses = []
    for images, labels in batches(steps, dtype=dtype):
        loss = head(net(images), labels)
        loss.backward()
        losses.append(loss.detach())
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return torch.stack(losses), head.centers.detach(), nn.utils.parameters_to_vector(net.parameters()).detach()


@both_updates
@pytest.mark.parametrize(
    ("ours", "torchs"),
    [
        (lambda p: RowwiseSGD(p, **SGD), lambda p: torch.optim.SGD(p, **SGD)),
        (lambda p: RowwiseAdamW(p, **ADAMW), lambda p: torch.optim.AdamW(p, **ADAMW)),
    ],
    ids=["SGD", "AdamW"],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-11)])
def test_fifty_steps_at_rate_one_are_those_of_a_dense_layer(
    update: Any, ours: Any, torchs: Any, dtype: torch.dtype, tolerance: float
) -> None:
    head = PartialFC(CLASSES, DIM, 1.0, CosFace(0.2), 16.0, update=update, dtype=dtype)
    dense = DenseHead(head.centers.detach())
    for value, expected in zip(train(head, ours), train(dense, torchs), strict=True):
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
    assert head.step == 50


@both_updates
@both_optimizers
def test_micro_steps_of_a_split_batch_are_one_step(make: Any, update: Any) -> None:
    """With all classes sampled, n forwards with loss / n do what one does with the whole batch."""
    images, labels = torch.randn(12, DIM, dtype=torch.float64), torch.randint(CLASSES, (12,))
    trained = []
    for parts in (1, 2, 3):
        head = PartialFC(CLASSES, DIM, 1.0, update=update, dtype=torch.float64)
        optimizer = make(head.parameters(), lr=0.01)
        for _ in range(2):
            for some_images, some_labels in zip(images.chunk(parts), labels.chunk(parts), strict=True):
                (head(some_images, some_labels) / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(head.centers.detach())
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(trained[2], trained[0], rtol=1e-10, atol=1e-12)


@both_optimizers
def test_both_updates_do_the_same(make: Any) -> None:
    trained = [
        train(
            PartialFC(CLASSES, DIM, 0.3, CosFace(0.2), 16.0, update=update, dtype=torch.float64),
            lambda p: make(p, lr=0.01),
        )
        for update in ("sparse", "deferred")
    ]
    for sparse, deferred in zip(*trained, strict=True):
        torch.testing.assert_close(sparse, deferred, rtol=1e-10, atol=1e-12)


@both_updates
def test_micro_steps_share_their_negatives_and_steps_do_not(update: Any) -> None:
    head = PartialFC(2000, DIM, 0.1, update=update)
    optimizer = RowwiseSGD(head.parameters())
    per_step = []
    for _ in range(2):
        rows = []
        for label in (3, 1500):
            head.zero_grad()
            head(torch.randn(1, DIM), torch.tensor([label])).backward()
            deferred = head.center_state.deferred
            gradient = head.centers.grad
            rows.append(set((deferred[0].batch.classes if deferred else gradient._indices()[0]).tolist()))
        optimizer.step()
        per_step.append(rows)
    for first, second in per_step:
        # Each adds its own positive in place of one negative of the positive's block.
        assert len(first ^ second) <= 4
    assert len(per_step[0][0] & per_step[1][0]) < 60


@both_updates
@both_optimizers
def test_found_inf_skips_the_step_and_forgets_it(make: Any, update: Any) -> None:
    head = PartialFC(CLASSES, DIM, 1.0, update=update)
    optimizer = make(head.parameters())
    before = head.centers.detach().clone()
    head(torch.randn(3, DIM), torch.tensor([1, 2, 3])).backward()
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.grad_scale = torch.tensor(1024.0)
    optimizer.step()
    assert torch.equal(head.centers, before)
    assert head.step == 0
    assert not head.center_state.deferred
    assert not optimizer.state


def scaled_training(update: Any, make: Any, scaler: torch.amp.GradScaler | None) -> tuple[Tensor, int]:
    head = PartialFC(CLASSES, DIM, 0.5, update=update, dtype=torch.float64)
    torch.manual_seed(0)
    net = nn.Linear(5, DIM).double()
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1), make(head.parameters(), lr=0.01)]
    for images, labels in batches(3, dtype=torch.float64):
        loss = head(net(images), labels)
        (loss if scaler is None else scaler.scale(loss)).backward()
        for optimizer in optimizers:
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
    return head.centers.detach(), head.step


@both_updates
@both_optimizers
def test_grad_scaler_unscales(make: Any, update: Any) -> None:
    plain, _ = scaled_training(update, make, None)
    scaled, steps = scaled_training(update, make, torch.amp.GradScaler("cpu", init_scale=4096.0))
    assert steps == 3
    torch.testing.assert_close(scaled, plain, rtol=1e-12, atol=1e-14)


@both_optimizers
def test_grad_scaler_skips_an_overflow_and_goes_on(make: Any) -> None:
    head = PartialFC(CLASSES, DIM, 1.0)
    optimizer = make(head.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=float(torch.finfo(torch.float32).max), growth_interval=100)
    before = head.centers.detach().clone()
    scaler.scale(head(100 * torch.randn(3, DIM), torch.tensor([1, 2, 3]))).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(head.centers, before)
    assert head.step == 0
    optimizer.zero_grad()
    scaler.update(64.0)
    scaler.scale(head(torch.randn(3, DIM), torch.tensor([1, 2, 3]))).backward()
    scaler.step(optimizer)
    assert not torch.equal(head.centers, before)
    assert head.step == 1


@both_updates
@both_optimizers
@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("micro_steps", [1, 2])
def test_a_scale_that_overflows_poisons_nothing(
    micro_steps: int, loops: bool, make: Any, update: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale that is never too large for the backbone grows until it is too large for float32."""
    if not loops:
        monkeypatch.setattr(select, "numba_kernels", lambda: None)
    head, net = PartialFC(CLASSES, DIM, 1.0, update=update), nn.Linear(DIM, DIM)
    optimizers = make(head.parameters(), lr=1e-3), torch.optim.SGD(net.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=float(torch.finfo(torch.float32).max), backoff_factor=2.0**-20)
    before = head.centers.detach().clone()
    for skipped in (True, False):
        for _ in range(micro_steps):
            scaler.scale(head(net(torch.randn(3, DIM)), torch.tensor([1, 2, 3]))).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        assert torch.equal(head.centers, before) == skipped
        assert head.step == (not skipped)
    assert bool(head.centers.isfinite().all())


def test_unscaling_by_hand_works_on_sparse_gradients_and_is_refused_where_there_are_none() -> None:
    for update in ("sparse", "deferred"):
        head = PartialFC(CLASSES, DIM, 1.0, update=update)
        plain = copy.deepcopy(head)
        optimizer = RowwiseSGD(head.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        batch = torch.randn(3, DIM), torch.tensor([1, 2, 3])
        scaler.scale(head(*batch)).backward()
        scaler.unscale_(optimizer)
        if update == "deferred":
            before = head.centers.detach().clone()
            with pytest.raises(InputError, match="leave it out for the head's optimizer"):
                scaler.step(optimizer)
            assert torch.equal(head.centers, before)
        else:
            scaler.step(optimizer)
            plain(*batch).backward()
            RowwiseSGD(plain.parameters()).step()
            torch.testing.assert_close(head.centers, plain.centers)


@pytest.mark.parametrize("whose", ["optimizer", "head"])
@both_updates
def test_zero_grad_forgets(whose: str, update: Any) -> None:
    head = PartialFC(CLASSES, DIM, 1.0, update=update)
    optimizer = RowwiseSGD(head.parameters())
    before = head.centers.detach().clone()
    head(torch.randn(3, DIM), torch.tensor([1, 2, 3])).backward()
    (optimizer if whose == "optimizer" else head).zero_grad()
    optimizer.step()
    assert torch.equal(head.centers, before)
    assert head.step == 0


@both_updates
def test_frozen_centers_stay(update: Any) -> None:
    head = PartialFC(CLASSES, DIM, 1.0, update=update)
    head.centers.requires_grad_(False)
    optimizer = RowwiseSGD(head.parameters())
    before = head.centers.clone()
    embeddings = torch.randn(3, DIM, requires_grad=True)
    head(embeddings, torch.tensor([1, 2, 3])).backward()
    optimizer.step()
    assert torch.equal(head.centers, before)
    assert embeddings.grad is not None
    assert bool(embeddings.grad.any())


def test_step_runs_a_closure_and_returns_its_loss() -> None:
    head = PartialFC(CLASSES, DIM, 1.0)
    optimizer = RowwiseSGD(head.parameters())

    def closure() -> Tensor:
        loss = head(torch.ones(2, DIM), torch.tensor([1, 2]))
        loss.backward()
        return loss.detach()

    assert float(optimizer.step(closure)) > 0  # type: ignore[arg-type]
    assert head.step == 1


@both_updates
@both_optimizers
def test_copy_and_state_dict_continue_alike(make: Any, update: Any) -> None:
    def step(head: PartialFC, optimizer: Any, number: int) -> Tensor:
        images, labels = batches(1, seed=number)[0]
        loss = head(functional.pad(images, (0, 1)), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    head = PartialFC(CLASSES, DIM, 0.4, update=update)
    optimizer = make(head.parameters(), lr=0.02)
    for number in range(3):
        step(head, optimizer, number)
    copied = copy.deepcopy(head)
    loaded = PartialFC(CLASSES, DIM, 0.4, update=update)
    loaded.load_state_dict(head.state_dict())
    loaded.step = head.step
    twins = []
    for twin in (copied, loaded):
        twin_optimizer = make(twin.parameters(), lr=0.02)
        twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        twins.append((twin, twin_optimizer))
    for number in range(3, 6):
        expected = step(head, optimizer, number)
        for twin, twin_optimizer in twins:
            assert torch.equal(step(twin, twin_optimizer, number), expected)
    for twin, twin_optimizer in twins:
        assert torch.equal(twin.centers, head.centers)
        for name, value in optimizer.row_state(head.centers).items():
            assert torch.equal(twin_optimizer.row_state(twin.centers)[name], value)
            assert twin_optimizer.row_state(twin.centers)[name].dtype == value.dtype


@both_optimizers
def test_state_of_other_rows_is_refused(make: Any) -> None:
    larger, smaller = PartialFC(CLASSES, DIM, 1.0), PartialFC(CLASSES - 1, DIM, 1.0)
    saved, optimizer = make(larger.parameters()), make(smaller.parameters())
    saved.row_state(larger.centers)
    with pytest.raises(InputError, match="has 41 rows, but its centers 40"):
        optimizer.load_state_dict(saved.state_dict())
    assert not optimizer.state


@both_updates
@both_optimizers
def test_bfloat16_centers_train(make: Any, update: Any) -> None:
    head = PartialFC(CLASSES, DIM, 1.0, update=update, dtype=torch.bfloat16)
    optimizer = make(head.parameters(), lr=0.01)
    before = head.centers.detach().clone()
    head(torch.randn(3, DIM), torch.tensor([1, 2, 3])).backward()
    optimizer.step()
    assert head.centers.dtype == torch.bfloat16
    assert bool(torch.isfinite(head.centers).all())
    assert not torch.equal(head.centers, before)


@both_optimizers
def test_dense_gradients_are_refused(make: Any) -> None:
    linear = nn.Linear(3, 2)
    optimizer = make(linear.parameters())
    linear(torch.ones(1, 3)).sum().backward()
    before = linear.weight.detach().clone()
    with pytest.raises(InputError, match="dense gradient"):
        optimizer.step()
    assert torch.equal(linear.weight, before)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (RowwiseSGD, {"lr": -1.0}),
        (RowwiseSGD, {"lr": float("nan")}),
        (RowwiseSGD, {"momentum": 1.0}),
        (RowwiseSGD, {"weight_decay": -0.1}),
        (RowwiseAdamW, {"lr": -1.0}),
        (RowwiseAdamW, {"betas": (0.9, 1.0)}),
        (RowwiseAdamW, {"betas": (-0.1, 0.9)}),
        (RowwiseAdamW, {"eps": -1.0}),
        (RowwiseAdamW, {"weight_decay": float("nan")}),
    ],
)
def test_impossible_options_are_refused(make: Any, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{make.__name__} needs"):
        make(PartialFC(2, 2, 1.0).parameters(), **options)
