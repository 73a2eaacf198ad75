"""Numerics of the head by itself: error budget, gradcheck, tiles, odd sizes, and extremes."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from head_cases import Case, build, pending_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from partialfc.head.margins import ArcFace, CosFace, Margin
from partialfc.head.partial_fc import PartialFC


def gradients(head: PartialFC, embeddings: Tensor, labels: Tensor) -> tuple[float, Tensor, Tensor, Tensor]:
    """Loss, embedding gradient, rows and their gradient."""
    embeddings = embeddings.clone().requires_grad_()
    loss = head(embeddings, labels)
    loss.backward()
    assert embeddings.grad is not None
    return loss.item(), embeddings.grad, *pending_gradient(head)


def dense_float32(embeddings: Tensor, centers: Tensor, labels: Tensor, m: float, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of the plain computation: normalise, linear, subtract the margin, cross entropy."""
    embeddings, centers = embeddings.clone().requires_grad_(), centers.clone().requires_grad_()
    cosine = functional.linear(functional.normalize(embeddings), functional.normalize(centers))
    logits = scale * (cosine - m * functional.one_hot(labels, len(centers)))
    functional.cross_entropy(logits, labels).backward()
    assert embeddings.grad is not None
    assert centers.grad is not None
    return embeddings.grad, centers.grad


@pytest.mark.parametrize("target_cosine", [0.2, 0.5, 0.9, 0.999])
def test_error_budget(target_cosine: float) -> None:
    """For each image alone: float32 is never much worse than the plain dense float32 computation, mostly better."""
    torch.manual_seed(0)
    centers = torch.randn(400, 64) * 0.01
    head = PartialFC(400, 64, 1.0, CosFace(0.4), 64.0)
    head.centers.data.copy_(centers)
    labels = torch.randint(400, (32,))
    unit = functional.normalize(centers.double())[labels]
    other = functional.normalize(torch.randn(32, 64, dtype=torch.float64))
    other = functional.normalize(other - (other * unit).sum(1, keepdim=True) * unit)
    embeddings = (7 * (target_cosine * unit + (1 - target_cosine**2) ** 0.5 * other)).float()
    _, by_embedding, _, by_center = gradients(head, embeddings, labels)
    exact_embeddings, exact_centers = embeddings.double().requires_grad_(), centers.double().requires_grad_()
    reference.dense_loss(
        exact_embeddings, exact_centers, labels, torch.arange(400), scale=64.0, target=reference.cosface(0.4)
    ).backward()
    plain_by_embedding, plain_by_center = dense_float32(embeddings, centers, labels, 0.4, 64.0)
    for ours, plain, leaf in (
        (by_embedding, plain_by_embedding, exact_embeddings),
        (by_center, plain_by_center, exact_centers),
    ):
        exact = leaf.grad
        assert exact is not None
        length = exact.norm(dim=1)
        our_error = (ours.double() - exact).norm(dim=1) / length
        plain_error = (plain.double() - exact).norm(dim=1) / length
        assert float(our_error.mean()) <= 1.5 * float(plain_error.mean())
        assert float(our_error.max()) < 1.5e-5
        if target_cosine >= 0.9:
            # Here logsumexp − target has few digits left or none.
            assert float(our_error.mean()) < 0.1 * float(plain_error.mean())


@pytest.mark.parametrize("update", ["sparse", "deferred"])
@pytest.mark.parametrize("margin", [Margin(), CosFace(0.4), ArcFace(0.5)], ids=["none", "CosFace", "ArcFace"])
def test_gradcheck_of_the_embeddings(margin: Margin, update: Any) -> None:
    torch.manual_seed(0)
    head = PartialFC(23, 6, 0.5, margin, 8.0, update=update, dtype=torch.float64)
    labels = torch.randint(23, (5,))
    embeddings = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda e: head(e, labels), (embeddings,))


@settings(max_examples=40, deadline=None)
@given(
    num_classes=st.integers(1, 90),
    embedding_dim=st.integers(1, 20),
    batch=st.integers(1, 12),
    rate=st.floats(0, 1),
    scratch_bytes=st.integers(0, 20_000),
    threshold=st.none() | st.floats(-0.5, 0.5),
    update=st.sampled_from(["sparse", "deferred"]),
    seed=st.integers(0, 1000),
)
def test_odd_sizes_against_the_oracle(
    num_classes: int,
    embedding_dim: int,
    batch: int,
    rate: float,
    scratch_bytes: int,
    threshold: float | None,
    update: Any,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    head = PartialFC(
        num_classes,
        embedding_dim,
        rate,
        CosFace(0.3),
        16.0,
        threshold,
        update=update,
        seed=seed,
        scratch_bytes=scratch_bytes,
        dtype=torch.float64,
    )
    embeddings = torch.randn(batch, embedding_dim, generator=generator, dtype=torch.float64)
    labels = torch.randint(num_classes, (batch,), generator=generator)
    loss, by_embedding, rows, values = gradients(head, embeddings, labels)
    embeddings.requires_grad_()
    centers = head.centers.detach().clone().requires_grad_()
    expected = reference.dense_loss(
        embeddings, centers, labels, rows, scale=16.0, target=reference.cosface(0.3), conflict_threshold=threshold
    )
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)
    torch.testing.assert_close(by_embedding, embeddings.grad, rtol=1e-7, atol=1e-10)
    assert centers.grad is not None
    torch.testing.assert_close(values, centers.grad[rows], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("scratch_bytes", [0, 3000, 10_000, 100_000])
@pytest.mark.parametrize("update", ["sparse", "deferred"])
def test_scratch_changes_nothing_but_memory(scratch_bytes: int, update: Any) -> None:
    built = build(Case(num_classes=500), 1)
    small, large = (
        gradients(
            PartialFC(500, 19, 0.7, update=update, seed=7, scratch_bytes=size, dtype=torch.float64),
            built.embeddings.double(),
            built.labels,
        )
        for size in (scratch_bytes, 1 << 28)
    )
    assert small[0] == pytest.approx(large[0], rel=1e-13)
    assert torch.equal(small[2], large[2])
    for value, expected in ((small[1], large[1]), (small[3], large[3])):
        assert reference.relative_error(value, expected) < 1e-12


class LargestResult(TorchDispatchMode):
    """The bytes of the largest tensor that any operation gave, the centers themselves aside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.bytes = max(self.bytes, result.numel() * result.element_size())
        return result


def test_no_tile_exceeds_the_scratch_budget() -> None:
    """The largest block that one step allocates stays within the scratch, with many images and with one."""
    for batch in (1, 300):
        head = PartialFC(6000, 32, 1.0, update="deferred", scratch_bytes=1 << 18)
        with LargestResult() as largest:
            head(torch.randn(batch, 32), torch.zeros(batch, dtype=torch.int64))
        assert (1 << 15) < largest.bytes <= (1 << 18)


def test_perfect_and_opposite_embeddings_have_finite_gradients() -> None:
    for margin in (CosFace(0.4), ArcFace(0.5), ArcFace(0.5, "straight_through")):
        head = PartialFC(30, 8, 1.0, margin)
        unit = functional.normalize(head.centers.detach()[:2])
        loss, by_embedding, _, values = gradients(head, torch.stack([unit[0], -unit[1]]), torch.tensor([0, 1]))
        assert torch.isfinite(torch.tensor(loss))
        assert bool(torch.isfinite(by_embedding).all())
        assert bool(torch.isfinite(values).all())


def test_a_sample_without_negatives_has_no_loss_and_no_gradient() -> None:
    head = PartialFC(10, 4, 0.0)
    loss, by_embedding, rows, values = gradients(head, torch.ones(2, 4), torch.tensor([6, 6]))
    assert loss == 0
    assert not by_embedding.any()
    assert rows.tolist() == [6]
    assert not values.any()


def test_an_embedding_of_zeros_has_no_gradient_and_leaves_the_others_theirs() -> None:
    embeddings = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, -1.0, 0.5]])
    head = PartialFC(10, 4, 1.0, seed=1)
    _, by_embedding, _, values = gradients(head, embeddings, torch.tensor([1, 2]))
    assert not by_embedding[0].any()
    assert 0 < float(by_embedding[1].norm()) < 100
    assert bool(torch.isfinite(values).all())


def test_large_losses_do_not_saturate() -> None:
    """The reference's clamp of the probability would stop the loss at 69.08 and the gradient with it."""
    head = PartialFC(2, 2, 1.0, margin=CosFace(0.4), scale=64.0)
    head.centers.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    loss, by_embedding, _, _ = gradients(head, torch.tensor([[-1.0, 0.5]]), torch.tensor([0]))
    assert loss > 128
    assert float(by_embedding.norm()) > 10
