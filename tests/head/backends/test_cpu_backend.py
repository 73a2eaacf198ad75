"""The CPU backend: its row loops by themselves, and the whole beside the chunked backend and float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.optim import Optimizer

from partialfc.core.threads import run_parallel
from partialfc.head.backends import cpu_kernels, select
from partialfc.head.margins import CosFace, CurricularFace
from partialfc.head.optim import RowwiseAdamW, RowwiseSGD
from partialfc.head.partial_fc import PartialFC

CLASSES, WIDTH, BATCH = 3000, 40, 24


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user without the extra has."""
    monkeypatch.setattr(select, "numba_kernels", lambda: None)


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(BATCH, WIDTH, generator=generator),
        torch.randint(CLASSES, (BATCH,), generator=generator),
    )


def train(head: PartialFC, optimizer: torch.optim.Optimizer, steps: int = 4, micro_steps: int = 1) -> list[Tensor]:
    """Losses and embedding gradients of each micro-step, then the centers."""
    seen = []
    for step in range(steps):
        for micro_step in range(micro_steps):
            embeddings, labels = batch(10 * step + micro_step)
            embeddings.requires_grad_()
            loss = head(embeddings, labels) / micro_steps
            loss.backward()
            seen += [loss.detach(), embeddings.grad]
        optimizer.step()
        optimizer.zero_grad()
    return [*seen, head.centers.detach().clone()]


def small_tiles(**options: object) -> PartialFC:
    """A head whose tiles hold some 80 classes, of which about 1,000 weights an image are kept."""
    return PartialFC(CLASSES, WIDTH, 0.7, scratch_bytes=1 << 17, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("update", ["sparse", "deferred"])
@pytest.mark.parametrize("micro_steps", [1, 3])
@pytest.mark.parametrize("optimizer", [RowwiseSGD, partial(RowwiseAdamW, eps=0.1)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"conflict_threshold": 0.2},
        {"conflict_threshold": 0.2, "conflict_as_zero_logit": True},
        {"conflict_threshold": 0.2, "margin": CurricularFace()},
    ],
)
def test_the_same_as_the_chunked_backend(
    update: str,
    micro_steps: int,
    optimizer: Callable[..., Optimizer],
    options: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = []
    for loops in (select.numba_kernels(), None):
        monkeypatch.setattr(select, "numba_kernels", lambda loops=loops: loops)
        head = small_tiles(update=update, **options)
        results.append(train(head, optimizer(head.parameters(), lr=0.01), micro_steps=micro_steps))
    for compiled_result, chunked_result in zip(*results, strict=True):
        torch.testing.assert_close(compiled_result, chunked_result, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("update", ["sparse", "deferred"])
def test_the_number_of_threads_changes_nothing(dtype: torch.dtype, update: str, three_threads: None) -> None:
    results = []
    for threads in (3, 1):
        torch.set_num_threads(threads)
        head = small_tiles(update=update, operand_dtype=dtype)
        results.append(train(head, RowwiseSGD(head.parameters(), lr=0.01)))
    assert all(torch.equal(several, alone) for several, alone in zip(*results, strict=True))
    assert torch.get_num_threads() == 1


def test_a_worker_computes_alone_and_other_operations_keep_their_threads(three_threads: None) -> None:
    seen = run_parallel(lambda _: torch.get_num_threads(), range(6))
    assert (seen, torch.get_num_threads()) == ([1] * 6, 3)


@pytest.mark.usefixtures("without_numba")
def test_without_numba_the_head_trains() -> None:
    head = small_tiles()
    losses = train(head, RowwiseSGD(head.parameters(), lr=0.1))
    assert torch.isfinite(losses[-1]).all()


def gradients(head: PartialFC, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    embeddings = embeddings.clone().requires_grad_()
    head(embeddings, labels).backward()
    assert embeddings.grad is not None
    assert head.centers.grad is not None
    return embeddings.grad.double(), head.centers.grad.to_dense().double()


@pytest.mark.parametrize("compiled_loops", [True, False])
@pytest.mark.parametrize("target_cosine", [0.2, 0.6, 0.9])
def test_error_budget_of_bfloat16_operands(
    target_cosine: float, compiled_loops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No worse than the plain bfloat16 computation, for embeddings and for centers."""
    if not compiled_loops:
        monkeypatch.setattr(select, "numba_kernels", lambda: None)
    torch.manual_seed(0)
    head = PartialFC(500, 64, 1.0, CosFace(0.4), operand_dtype=torch.bfloat16)
    centers, labels = head.centers.detach().clone(), torch.randint(500, (32,))
    own = functional.normalize(centers)[labels]
    embeddings = 5 * (target_cosine * own + (1 - target_cosine**2) ** 0.5 * functional.normalize(torch.randn(32, 64)))
    exact = embeddings.double().requires_grad_(), centers.double().requires_grad_()
    target = reference.cosface(0.4)
    reference.dense_loss(*exact, labels, torch.arange(500), scale=64.0, target=target).backward()
    for ours, plain, truth in zip(
        gradients(head, embeddings, labels), reference.plain_bfloat16(embeddings, centers, labels), exact, strict=True
    ):
        assert truth.grad is not None
        error = (ours - truth.grad).norm() / truth.grad.norm()
        assert error <= (plain - truth.grad).norm() / truth.grad.norm()
        assert error < 6e-3


def test_kept_and_recomputed_weights_give_the_same_gradient() -> None:
    results = []
    for scratch_bytes in (1 << 12, 1 << 16, 1 << 26):
        head = PartialFC(CLASSES, WIDTH, 0.7, scratch_bytes=scratch_bytes, update="deferred")
        results.append(train(head, RowwiseSGD(head.parameters(), lr=0.1)))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


def test_a_second_forward_pass_does_not_disturb_the_first() -> None:
    """The first pass's weights lie in the head's scratch memory; a forward pass before its backward leaves them."""
    one, other = small_tiles(), small_tiles()
    embeddings, labels = batch(0)
    first = [embeddings.clone().requires_grad_() for _ in range(2)]
    loss = one(first[0], labels)
    one(*batch(1))
    loss.backward()
    other(first[1], labels).backward()
    torch.testing.assert_close(first[0].grad, first[1].grad, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(one.centers.grad.to_dense(), other.centers.grad.to_dense(), rtol=1e-4, atol=1e-7)


def test_exponential_is_exact_to_two_units_in_the_last_place() -> None:
    exponents = torch.linspace(-87.0, 88.0, 200_000)
    result = exponents.clone()[None]
    sums, left_out = np.zeros(len(exponents), np.float32), np.zeros(len(exponents), np.int32)
    # Cosines within (−2, 2] count as such, so the range is reached by scale and shift.
    cosine = (exponents / 64.0).clamp(-1.9, 1.9)[None].contiguous()
    cpu_kernels.exponentials(
        cosine.numpy(), np.float32(64), np.float32(0), np.float32(2), None, np.float32(0), sums, left_out, None
    )
    result = (exponents / 64.0).clamp(-1.9, 1.9).mul(64.0).double().exp()
    assert ((cosine[0].double() - result).abs() / result).max() < 2.5e-7
    assert not left_out.any()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**60), max_value=2.0**60),
        min_size=1,
    )
)
def test_rounding_to_bfloat16_is_that_of_torch(numbers: list[float]) -> None:
    centers = torch.tensor([numbers])
    unit, rounded = torch.empty_like(centers), torch.empty(centers.shape, dtype=torch.bfloat16)
    cpu_kernels.gather_unit_rows(
        centers.numpy(), np.zeros(1, np.int64), unit.numpy(), rounded.view(torch.uint16).numpy()
    )
    # A row of zeros has no direction.
    torch.testing.assert_close(rounded, unit.bfloat16(), rtol=0, atol=0, equal_nan=True)
