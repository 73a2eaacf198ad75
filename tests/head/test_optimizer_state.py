"""State of row-wise optimizers: what torch's optimizers saved, tables that momentum 0 does not need, missed steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from partialfc.core.errors import InputError
from partialfc.head import lazy_sgd
from partialfc.head.backends import select
from partialfc.head.optim import RowwiseAdamW, RowwiseSGD
from partialfc.head.partial_fc import PartialFC

CLASSES, DIM = 41, 6


def trained_by_torch(make: Any) -> tuple[nn.Parameter, dict[str, Any]]:
    """Centers and state after a few dense steps."""
    centers = nn.Parameter(PartialFC(CLASSES, DIM, 1.0).centers.detach().clone())
    optimizer = make([centers])
    for step in range(3):
        centers.grad = torch.full_like(centers, 0.1 * (step + 1))
        optimizer.step()
    return centers, optimizer.state_dict()


@pytest.mark.parametrize(
    ("torchs", "ours"),
    [
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-3), RowwiseSGD),
        (lambda p: torch.optim.SGD(p, 0.1), RowwiseSGD),
        (lambda p: torch.optim.AdamW(p, 0.01, betas=(0.8, 0.9), foreach=False), RowwiseAdamW),
    ],
)
def test_the_state_of_the_same_optimizer_of_torch_is_taken(torchs: Any, ours: Any) -> None:
    """The next step is that of torch's optimizer, with all rows sampled."""
    centers, state = trained_by_torch(torchs)
    head = PartialFC(CLASSES, DIM, 1.0)
    with torch.no_grad():
        head.centers.copy_(centers)
    optimizer, dense = ours(head.parameters()), torchs([centers])
    optimizer.load_state_dict(state)
    dense.load_state_dict(state)
    head(torch.randn(3, DIM), torch.tensor([1, 2, 3])).backward()
    centers.grad = head.centers.grad.to_dense()
    optimizer.step()
    dense.step()
    torch.testing.assert_close(head.centers, centers)
    assert optimizer.param_groups[0]["lr"] == dense.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("torchs", "ours", "message"),
    [
        (
            lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
            RowwiseSGD,
            "it has nesterov; begin",
        ),
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.5), RowwiseSGD, "it has dampening"),
        (lambda p: torch.optim.SGD(p, 0.1, maximize=True), RowwiseSGD, "it has maximize"),
        (lambda p: torch.optim.AdamW(p, 0.1, amsgrad=True), RowwiseAdamW, "it has amsgrad, has max_exp_avg_sq"),
        (lambda p: torch.optim.Adam(p, 0.1), RowwiseAdamW, "couples its weight decay"),
        (lambda p: torch.optim.SGD(p, 0.1), RowwiseAdamW, "than RowwiseAdamW: it lacks betas, lacks eps"),
        (lambda p: torch.optim.AdamW(p, 0.1), RowwiseSGD, "it has exp_avg, has exp_avg_sq, has step, lacks momentum"),
        (lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9), RowwiseSGD, "it has square_avg, has step"),
    ],
)
def test_the_state_of_another_optimizer_is_refused(torchs: Any, ours: Any, message: str) -> None:
    optimizer = ours(PartialFC(CLASSES, DIM, 1.0).parameters())
    with pytest.raises(InputError, match=message):
        optimizer.load_state_dict(trained_by_torch(torchs)[1])
    assert not optimizer.state


def test_a_state_of_unknown_tensors_is_refused() -> None:
    optimizer = RowwiseSGD(PartialFC(CLASSES, DIM, 1.0).parameters())
    state = optimizer.state_dict() | {"state": {0: {"square": torch.zeros(CLASSES, DIM)}}}
    with pytest.raises(InputError, match="it has square; begin"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("unsampled", ["freeze", "lazy_dense"])
@pytest.mark.parametrize("update", ["sparse", "deferred"])
@pytest.mark.parametrize(
    ("dtype", "loops"), [(torch.float32, True), (torch.float32, False), (torch.float64, True), (torch.bfloat16, True)]
)
def test_momentum_zero_needs_no_table(
    loops: bool, dtype: torch.dtype, update: Any, unsampled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And gives the centers of a table of zeros that is never used."""
    if not loops:
        monkeypatch.setattr(select, "numba_kernels", lambda: None)
    trained = []
    for table in (False, True):
        head = PartialFC(CLASSES, DIM, 0.2, update=update, dtype=dtype)
        optimizer = RowwiseSGD(head.parameters(), lr=0.1, momentum=0.0, weight_decay=0.1, unsampled=unsampled)
        if table:
            optimizer.state[head.centers]["momentum_buffer"] = torch.zeros_like(head.centers)
        for step in range(4):
            torch.manual_seed(step)
            head(torch.randn(3, DIM), torch.tensor([1, 2, 3])).backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.flush()
        assert bool(optimizer.state_dict()["state"].get(0)) == table
        trained.append(head.centers.detach().float())
    torch.testing.assert_close(*trained, rtol=1e-6, atol=1e-7 if dtype != torch.bfloat16 else 0.05)


def test_momentum_may_begin_later() -> None:
    head = PartialFC(CLASSES, DIM, 1.0)
    optimizer = RowwiseSGD(head.parameters(), momentum=0.0)
    for momentum in (0.0, 0.9, 0.0):
        optimizer.param_groups[0]["momentum"] = momentum
        head(torch.randn(3, DIM), torch.tensor([1, 2, 3])).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert "momentum_buffer" in optimizer.row_state(head.centers)
    other = RowwiseSGD(head.parameters(), momentum=0.0)
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(
        other.row_state(head.centers)["momentum_buffer"], optimizer.row_state(head.centers)["momentum_buffer"]
    )


@pytest.mark.parametrize("lr", [0.0, 0.1])
def test_missed_steps_are_forgotten_before_they_are_many(lr: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of positives only, whose other rows miss every step."""
    trained = []
    for most in (1 << 12, 16):
        monkeypatch.setattr(lazy_sgd, "_MOST_STEPS", most)
        head = PartialFC(CLASSES, DIM, 0.0, dtype=torch.float64)
        optimizer = RowwiseSGD(head.parameters(), lr=lr, weight_decay=0.1, unsampled="lazy_dense")
        for step in range(70):
            torch.manual_seed(step)
            head(torch.randn(3, DIM), torch.tensor([1, 2, 3])).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert len(optimizer._missed[head.centers]._history) == 3 * (70 % most)
        optimizer.flush()
        trained.append(head.centers.detach())
    torch.testing.assert_close(*trained, rtol=1e-10, atol=1e-12)
