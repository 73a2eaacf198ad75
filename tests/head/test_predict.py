"""After training: logits over all classes, the nearest classes, and the loss in eval mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from partialfc import CosFace, InputError, PartialFC, RowwiseSGD
from partialfc.head.inputs import NonFiniteEmbeddings
from partialfc.head.margins import CurricularFace, ElasticFace, MarginBatch, SubCenterArcFace
from partialfc.head.predict import _largest


def make(num_classes: int = 300, **options: Any) -> PartialFC:
    return PartialFC(num_classes, 8, **({"scale": 16.0} | options))


def batch(dtype: torch.dtype = torch.float32, size: int = 9) -> Tensor:
    return torch.randn(size, 8, generator=torch.Generator().manual_seed(2)).to(dtype)


def cosines_of(head: PartialFC, embeddings: Tensor) -> Tensor:
    """(B, C) float64, by definition."""
    unit = torch.nn.functional.normalize(embeddings.double(), dim=1)
    centers = torch.nn.functional.normalize(head.centers.detach().double(), dim=1)
    return (unit @ centers.T).unflatten(1, (-1, head.loss_config.margin.sub_centers)).amax(dim=2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("centers_dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("margin", [CosFace(), CurricularFace(), SubCenterArcFace(), ElasticFace()])
@pytest.mark.parametrize("scratch_bytes", [1, 6000, 256 << 20])
def test_logits_and_nearest_classes(dtype: Any, centers_dtype: Any, margin: Any, scratch_bytes: int) -> None:
    head = make(margin=margin, dtype=centers_dtype, scratch_bytes=scratch_bytes)
    embeddings = batch(dtype)
    expected = cosines_of(head, embeddings)
    logits, (classes, cosines) = head.logits(embeddings), head.predict(embeddings, 5)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (logits.dtype, cosines.dtype, classes.dtype) == (wide, wide, torch.int64)
    tolerance = 1e-14 if wide == torch.float64 else 1e-6
    torch.testing.assert_close(logits.double() / 16, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(cosines.double(), expected.topk(5).values, rtol=0, atol=tolerance)
    torch.testing.assert_close(expected.gather(1, classes), cosines.double(), rtol=0, atol=tolerance)
    assert not logits.requires_grad


def test_asking_changes_nothing() -> None:
    """Neither values nor step, figures, gradients or the next steps, in any mode, under autocast and inference mode."""
    heads = [make(margin=CurricularFace(), update=update) for update in ("sparse", "deferred") for _ in range(2)]
    optimizers = [RowwiseSGD(head.parameters()) for head in heads]
    others, labels = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1), torch.arange(9)
    for step in range(4):
        for number, (head, optimizer) in enumerate(zip(heads, optimizers, strict=True)):
            loss = head(batch().requires_grad_(), labels)
            if number % 2:
                figures = head.figures
                with torch.autocast("cpu", torch.bfloat16):
                    inside = head.logits(batch())
                with torch.inference_mode():
                    head.predict(batch(), 3)
                head.eval()
                assert torch.equal(head.logits(batch()), inside)
                assert head.figures is figures
                with torch.no_grad():
                    head(batch(), labels)
                head.train()
            loss.backward()
            others.step()  # of the backbone, say
            if number % 2:
                head.eval()(batch().requires_grad_(), labels)
                head.train()
            optimizer.step()
            optimizer.zero_grad()
            assert head.step == step + 1
    for quiet, asked in zip(heads[::2], heads[1::2], strict=True):
        assert torch.equal(quiet.centers, asked.centers)
        assert torch.equal(quiet.margin_state()["t"], asked.margin_state()["t"])


def test_lazy_rows_are_brought_up_to_date() -> None:
    head = make(sample_rate=0.05)
    optimizer = RowwiseSGD(head.parameters(), lr=0.5, unsampled="lazy_dense")
    for _ in range(5):
        head(batch(), torch.arange(9)).backward()
        optimizer.step()
        optimizer.zero_grad()
    predicted = head.predict(batch(), 300)[1]
    optimizer.flush()
    expected = cosines_of(head, batch()).sort(descending=True).values
    torch.testing.assert_close(predicted.double(), expected, rtol=0, atol=1e-6)


def test_equal_cosines_are_in_the_order_of_the_classes() -> None:
    head = make(700, scratch_bytes=4000)
    axes = torch.eye(8)
    head.centers.data.copy_(axes[torch.arange(700) % 8])
    classes, cosines = head.predict(3 * axes, 90)
    for axis in range(8):
        own = torch.arange(axis, 700, 8)
        others = torch.arange(700)[torch.arange(700) % 8 != axis]
        assert torch.equal(classes[axis], torch.cat([own, others])[:90])
        assert torch.equal(cosines[axis], (torch.arange(90) < len(own)).float())


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=40), st.integers(1, 45))
@settings(max_examples=50, deadline=None)
def test_the_largest_of_a_row_are_the_first_of_a_stable_sort(values: list[int], k: int) -> None:
    rows = torch.tensor([values, values[::-1]], dtype=torch.float32)
    found, positions = _largest(rows, k)
    expected = rows.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    assert torch.equal(positions, expected)
    assert torch.equal(found, rows.gather(1, expected))


@pytest.mark.parametrize("margin", [CosFace(), SubCenterArcFace()])
def test_odd_sizes(margin: Any) -> None:
    head = make(3, margin=margin)
    assert head.predict(batch(), 10)[0].shape == (9, 3)
    assert torch.equal(head.predict(batch())[0][:, 0], head.logits(batch()).argmax(dim=1))
    assert [part.shape for part in head.predict(batch(size=0), 2)] == [(0, 2), (0, 2)]
    assert head.logits(batch(size=0)).shape == (0, 3)
    assert not head.logits(torch.zeros(1, 8)).any()
    assert head.predict(torch.zeros(1, 8), 2)[0].tolist() == [[0, 1]]


@pytest.mark.parametrize("ask", [lambda head, x: head.logits(x), lambda head, x: head.predict(x, 2)])
def test_bad_input_is_named(ask: Any) -> None:
    head = make()
    with pytest.raises(InputError, match=r"embeddings are \(9, 7\)"):
        ask(head, batch()[:, :7])
    with pytest.raises(NonFiniteEmbeddings):
        ask(head, torch.full((1, 8), torch.nan))
    for k in (0, 1.5, None):
        with pytest.raises(InputError, match=f"k is {k}"):
            head.predict(batch(), k)  # type: ignore[arg-type]
    for value in (torch.nan, torch.inf, -torch.inf, 0.0):
        head.centers.data[7] = value
        with pytest.raises(InputError, match="center of class 7 is zero or not finite"):
            ask(head, batch())


@pytest.mark.parametrize("update", ["sparse", "deferred"])
def test_the_loss_in_eval_mode_is_over_all_classes(update: Any) -> None:
    head = make(sample_rate=0.1, update=update).eval()
    labels = torch.arange(9)
    loss = head(batch(), labels)
    cosines = cosines_of(head, batch())
    target = head.loss_config.margin.target(cosines, MarginBatch(torch.ones(9), torch.tensor(0), {}))
    logits = 16.0 * torch.where(torch.arange(300) == labels[:, None], target, cosines)
    torch.testing.assert_close(loss.double(), torch.nn.functional.cross_entropy(logits, labels), rtol=1e-6, atol=0)
    head.step = 3
    assert torch.equal(head(batch(), labels), loss)
    assert not torch.equal(head.train()(batch(), labels), loss)
