"""The module: what it refuses, what it reports, and how it behaves in other people's loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from head_cases import pending_gradient
from torch import Tensor, nn

from partialfc.core.errors import InputError
from partialfc.head.backends import select
from partialfc.head.inputs import NonFiniteEmbeddings
from partialfc.head.margins import AdaFace, ArcFace, CosFace, CurricularFace, ElasticFace, Margin
from partialfc.head.optim import RowwiseSGD
from partialfc.head.partial_fc import PartialFC

LABELS = torch.tensor([0, 4, 4])


def embeddings(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(-1, 1, 24).view(3, 8).sin().to(dtype)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "at least 1 class"),
        ({"embedding_dim": 0}, "at least 1 class and 1 dimension"),
        ({"sample_rate": -0.1}, "sample_rate is -0.1"),
        ({"sample_rate": 1.1}, "from 0 .positives only. to 1"),
        ({"sample_rate": math.nan}, "sample_rate is nan"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"scale": math.inf}, "scale is inf"),
        ({"scale": 101.0}, "scale 101.0 would underflow"),
        ({"num_classes": 2, "scale": 85.9}, "171.6 for 2 classes; the scale is at most 85.8"),
        (
            {"num_classes": 1_000_000, "embedding_dim": 1, "scale": 79.3},
            "for 1000000 classes; the scale is at most 79.2",
        ),
        ({"scale": "64"}, "scale is '64'"),
        ({"num_classes": 5.0}, "num_classes is 5.0; it is a whole number"),
        ({"num_classes": True}, "num_classes is True"),
        ({"embedding_dim": "8"}, "embedding_dim is '8'"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"scratch_bytes": 1e6}, "scratch_bytes is 1000000.0"),
        ({"sample_rate": "0.1"}, "sample_rate is '0.1'"),
        ({"margin": 0.4}, r"margin is 0.4; it is a Margin, such as CosFace\(0.4\)"),
        ({"margin": "arcface"}, "margin is 'arcface'"),
        ({"margin": ArcFace}, "it is a Margin"),
        ({"dtype": torch.float16}, "dtype is torch.float16; centers are"),
        ({"dtype": torch.int64}, "dtype is torch.int64"),
        ({"operand_dtype": "bfloat16"}, "operand_dtype is bfloat16"),
        ({"group": [0, 1]}, "no member of the head's group"),
        ({"conflict_threshold": "0.4"}, "conflict_threshold is '0.4'"),
        ({"margin": CurricularFace(), "scale": 70.0}, "with CurricularFace the logits spread over 210"),
        ({"conflict_threshold": 1.5}, "conflict_threshold is 1.5"),
        ({"conflict_threshold": math.nan}, "conflict_threshold is nan"),
        ({"update": "defered"}, "update is 'defered'; it is 'sparse' or 'deferred'"),
        ({"sampler": "swep"}, "sampler is 'swep'; it is one of uniform, sweep, runs"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PartialFC(**({"num_classes": 5, "embedding_dim": 8} | arguments))


@pytest.mark.parametrize("update", ["sparse", "deferred"])
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((embeddings()[:, :7], LABELS), r"embeddings are \(3, 7\)"),
        ((embeddings()[0], LABELS), r"embeddings are \(8,\)"),
        ((embeddings().numpy(), LABELS), "embeddings are a ndarray; the head expects a torch.Tensor"),
        ((embeddings(), LABELS.tolist()), "labels are a list; the head expects a torch.Tensor"),
        ((embeddings(), LABELS.float()), r"of torch.float32; the head expects int64 of \(3,\), as labels.long\(\)"),
        ((embeddings().long(), LABELS), "expects floating point"),
        ((embeddings().to(torch.float8_e4m3fn), LABELS), "e4m3fn; the head expects floating point of 16"),
        ((embeddings(), LABELS[:2]), r"labels are \(2,\)"),
        ((embeddings(), LABELS.int()), "expects int64"),
        ((embeddings(), LABELS[:, None]), r"labels are \(3, 1\)"),
        ((embeddings(), torch.tensor([0, 4, 5])), r"label 5 lies outside \[0, 5\): the data has more"),
        ((embeddings(), torch.tensor([0, -1, 4])), r"label -1 lies outside \[0, 5\): labels count from 0"),
        ((embeddings() / 0, LABELS), "NaN or infinity"),
        ((embeddings().to("meta"), LABELS), "embeddings are on meta"),
        ((embeddings(), LABELS.to("meta")), "labels on meta"),
        ((embeddings()[:0], LABELS[:0]), "batch is empty"),
    ],
)
def test_bad_batches_are_refused_and_nothing_is_touched(
    batch: tuple[Tensor, Tensor], message: str, update: Any
) -> None:
    head = PartialFC(5, 8, 1.0, margin=CurricularFace(), scale=32.0, update=update)
    optimizer = RowwiseSGD(head.parameters())
    before = {name: value.clone() for name, value in head.state_dict().items()}
    with pytest.raises(InputError, match=message):
        head(*batch)
    optimizer.step()
    assert head.step == 0
    for name, value in head.state_dict().items():
        assert torch.equal(value, before[name])


def test_non_finite_embeddings_have_an_error_of_their_own() -> None:
    head = PartialFC(5, 8, 1.0)
    head.step = 12
    with pytest.raises(NonFiniteEmbeddings, match="embeddings of step 12"):
        head(torch.full((3, 8), math.nan), LABELS)


def test_a_replica_and_a_resharded_parameter_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    replica = PartialFC(5, 8, 1.0)
    monkeypatch.setattr(replica, "_is_replica", True, raising=False)
    resharded = PartialFC(5, 8, 1.0)
    resharded.centers = nn.Parameter(resharded.centers[:3].detach())
    for head in (replica, resharded):
        with pytest.raises(InputError, match="stands inside a parallel wrapper"):
            head(embeddings(), LABELS)


def test_initial_centers_are_a_function_of_the_seed() -> None:
    first, again, other = (
        PartialFC(700, 64, 1.0, seed=1),
        PartialFC(700, 64, 1.0, seed=1),
        PartialFC(700, 64, 1.0, seed=2),
    )
    assert torch.equal(first.centers, again.centers)
    assert not torch.equal(first.centers, other.centers)
    assert float(first.centers.detach().std()) == pytest.approx(0.01, rel=0.02)
    # A head of more classes begins with the same ones.
    assert torch.equal(PartialFC(900, 64, 1.0, seed=1).centers[:700], first.centers)


def test_initial_centers_do_not_depend_on_how_many_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = PartialFC(700, 64, 1.0).centers
    monkeypatch.setattr("partialfc.head.sampling._ELEMENTS_AT_ONCE", 1000)
    assert torch.equal(PartialFC(700, 64, 1.0).centers, whole)


def test_global_generators_are_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    head = PartialFC(300, 8, 0.1)
    head(embeddings().requires_grad_(), LABELS).backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_of_loss_and_gradients(dtype: torch.dtype) -> None:
    head = PartialFC(5, 8, 1.0)
    batch = embeddings(dtype).requires_grad_()
    loss = head(batch, LABELS)
    loss.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert batch.grad is not None
    assert batch.grad.dtype == dtype
    assert head.centers.grad is not None
    assert head.centers.grad.dtype == torch.float32


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("update", ["sparse", "deferred"])
def test_autocast_changes_nothing(update: Any, loops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not loops:
        monkeypatch.setattr(select, "numba_kernels", lambda: None)
    results = []
    for enabled in (False, True):
        head = PartialFC(50, 8, 1.0, update=update)
        batch = embeddings().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = head(batch, LABELS)
            loss.backward()
            RowwiseSGD(head.parameters()).step()
        results.append((loss.detach(), batch.grad, head.centers.detach()))
    for plain, autocast in zip(*results, strict=True):
        assert torch.equal(plain, autocast)


def test_inputs_may_be_columns_of_something_wider() -> None:
    """Without a warning of PyTorch's, which tests make an error."""
    head = PartialFC(50, 8, 0.5)
    wide = torch.stack([embeddings(), embeddings()], dim=2)[:, :, 0]
    loss = head(wide, torch.stack([LABELS, LABELS], dim=1)[:, 0])
    assert torch.equal(loss, head(embeddings(), LABELS))


def test_without_gradients_it_is_a_metric() -> None:
    for update in ("sparse", "deferred"):
        head = PartialFC(50, 8, 0.5, update=update)
        with torch.no_grad():
            loss = head(embeddings(), LABELS)
        assert not loss.requires_grad
        assert head.figures is not None
        assert not head.center_state.deferred
        assert torch.equal(loss, head(embeddings(), LABELS).detach())


@pytest.mark.parametrize("update", ["sparse", "deferred"])
@pytest.mark.parametrize("operand_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("margin", [CosFace(), CurricularFace()])
def test_it_trains_after_inference_mode(margin: Margin, operand_dtype: torch.dtype, update: Any) -> None:
    """The first batch of all, whose form no other test has, allocates what later ones reuse."""
    head = PartialFC(50, 8, 1.0, margin=margin, scale=32.0, operand_dtype=operand_dtype, update=update)
    optimizer = RowwiseSGD(head.parameters())
    batch, labels = torch.randn(13, 8), torch.arange(13)
    with torch.inference_mode():
        before = head(batch, labels)
    head.eval()
    with torch.inference_mode():
        assert not head(batch, labels).requires_grad
    head.train()
    for _ in range(2):
        loss = head(batch, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) < float(before)


def test_running_figures_move_in_training_only() -> None:
    head = PartialFC(50, 8, 1.0, margin=CurricularFace(), scale=32.0).eval()
    head(embeddings(), LABELS)
    assert float(head.margin_state()["t"]) == 0
    head.train()
    head(embeddings(), LABELS)
    assert head.figures is not None
    expected = 0.01 * float(head.figures.target_cosine)
    assert float(head.margin_state()["t"]) == pytest.approx(expected)
    assert "margin_t" in head.state_dict()


def test_scaled_loss_scales_the_gradients() -> None:
    results = []
    for factor in (1.0, -3.0):
        head = PartialFC(20, 8, 0.5, ArcFace(), dtype=torch.float64)
        batch = embeddings(torch.float64).requires_grad_()
        (factor * head(batch, LABELS)).backward()
        assert batch.grad is not None
        results.append((batch.grad / factor, pending_gradient(head)[1] / factor))
    for plain, scaled in zip(*results, strict=True):
        torch.testing.assert_close(scaled, plain)


def test_it_can_be_moved_to_another_dtype() -> None:
    head = PartialFC(20, 8, 1.0, margin=CosFace(), update="deferred")
    optimizer = RowwiseSGD(head.parameters())
    head(embeddings(), LABELS).backward()
    optimizer.step()
    head = head.double()
    head(embeddings(torch.float64), LABELS).backward()
    RowwiseSGD(head.parameters()).step()
    assert head.step == 2


def test_running_figures_stay_float64_when_the_head_changes_its_dtype() -> None:
    losses = []
    for change in (lambda head: head, lambda head: head.float(), lambda head: head.to(torch.float32)):
        head = PartialFC(50, 8, margin=AdaFace(), sample_rate=1.0)
        losses.append(float(change(head)(embeddings(), LABELS).detach()))
        assert {value.dtype for value in head.margin_state().values()} == {torch.float64}
    assert losses == losses[:1] * 3
    head = PartialFC(50, 8, margin=AdaFace()).bfloat16()
    assert math.isfinite(float(head(embeddings(), LABELS).detach()))


def test_negatives_that_underflow_beside_a_close_target_cost_nothing() -> None:
    """Two identities that a margin with raised negatives has parted: the embedding is opposite of the other center."""
    head = PartialFC(2, 8, margin=CurricularFace(), sample_rate=1.0)
    with torch.no_grad():
        head.centers.copy_(torch.stack([torch.ones(8), -torch.ones(8)]))
    rows = torch.ones(1, 8).requires_grad_()
    loss = head(rows, torch.tensor([0]))
    loss.backward()
    assert float(loss.detach()) < 1e-30  # the true loss is about exp(-64 * (cos 0.5 + 1))
    assert rows.grad is not None
    assert not rows.grad.any()
    with torch.no_grad():
        head.centers.copy_(-torch.ones(2, 8))
    with pytest.raises(InputError, match="the scale"):  # both opposite: what is lost would decide the gradient
        head(rows, torch.tensor([0]))


def test_negatives_that_underflow_beside_a_target_as_small_are_an_error() -> None:
    """A cosine of 0 and a margin of 0.5 make a target logit of -31, and many negatives at -33 count beside it."""
    head = PartialFC(100_000, 8, margin=CurricularFace(0.5), sample_rate=0.0)
    with torch.no_grad():
        head.centers[0] = torch.tensor([0.0, 1.0, *[0.0] * 6])
        head.centers[1] = torch.tensor([-0.52, (1 - 0.52**2) ** 0.5, *[0.0] * 6])
    rows = torch.zeros(2, 8)
    rows[:, 0] = 1.0
    with pytest.raises(InputError, match="the scale"):
        head(rows, torch.tensor([0, 1]))


def test_extra_repr_names_what_matters() -> None:
    assert "num_classes=20, embedding_dim=8, sample_rate=0.3" in repr(PartialFC(20, 8, 0.3))


def test_noise_and_classes_of_a_micro_step_are_those_of_the_whole_step() -> None:
    head = PartialFC(60, 8, 0.2, ElasticFace("cos", 0.3, 0.1))
    embeddings, labels = torch.randn(6, 8), torch.tensor([3, 9, 27, 40, 41, 59])
    whole = head(embeddings, labels)
    sampled = head.figures.sampled
    losses = []
    for part in (slice(0, 2), slice(2, 6)):
        losses.append(head(embeddings[part], labels[part], step_labels=labels, first_sample=part.start))
        assert head.figures.sampled == sampled
    torch.testing.assert_close((2 * losses[0] + 4 * losses[1]) / 6, whole)
    assert not torch.isclose(head(embeddings[2:], labels[2:], step_labels=labels), losses[1])


def test_labels_of_the_step_are_looked_at_too() -> None:
    for labels in ([1], LABELS.int(), LABELS[:, None]):
        with pytest.raises(InputError, match="step_labels are"):
            PartialFC(5, 8)(embeddings(), LABELS, step_labels=labels)


@pytest.mark.parametrize("classes", [2, 150, 1_000_000])
def test_no_scale_that_is_allowed_underflows(classes: int) -> None:
    """All negatives opposite to the embedding, at the largest scale, beside the exact loss."""
    scale = math.floor((85.0 + 87.3 - math.log(classes)) / 2 * 100) / 100
    head = PartialFC(classes, 2, 0.0 if classes > 1000 else 1.0, CosFace(0.4), scale)
    with torch.no_grad():
        head.centers[:] = torch.tensor([-1.0, 0.0])
    sampled = min(classes, 150)
    labels = torch.tensor([0]) if classes <= 1000 else torch.arange(150)
    loss = head(torch.tensor([[1.0, 0.0]]).repeat(len(labels), 1), labels)
    excess = math.log(sampled - 1) - scale + scale * 1.4
    assert float(loss.detach()) == pytest.approx(excess + math.log1p(math.exp(-excess)), rel=1e-5)
    assert PartialFC(50, 2, margin=CurricularFace(), scale=64.0).loss_config.scale == 64.0


def test_a_conflict_threshold_of_one_keeps_duplicates() -> None:
    """Rounding puts the cosine of some equal vectors above 1."""
    torch.manual_seed(0)
    batch = torch.randn(64, 8)
    losses = []
    for threshold in (None, 1.0):
        head = PartialFC(64, 8, 1.0, conflict_threshold=threshold)
        with torch.no_grad():
            head.centers.copy_(batch[torch.arange(64) // 2 * 2])
        losses.append(head(batch, torch.arange(64)).detach())
        assert head.figures is not None
        assert float(head.figures.conflict_share) == 0.0
    assert torch.equal(*losses)
