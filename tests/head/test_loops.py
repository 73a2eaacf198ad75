"""The head in loops that are not ours: what goes wrong in one works, or raises a sentence that names the remedy."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from partialfc.core.errors import InputError
from partialfc.head.margins import CurricularFace, Margin
from partialfc.head.optim import RowwiseAdamW, RowwiseSGD
from partialfc.head.partial_fc import PartialFC

CLASSES, DIM, RATE = 300, 8, 0.1
LABELS = torch.arange(6)
both_updates = pytest.mark.parametrize("update", ["sparse", "deferred"])
both_optimizers = pytest.mark.parametrize("make", [RowwiseSGD, RowwiseAdamW])


class Model(nn.Module):
    """What people write: backbone and head in one module."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(5, DIM)
        self.head = PartialFC(CLASSES, DIM, **{"sample_rate": RATE} | options)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images), LABELS)


def images(seed: int = 0) -> Tensor:
    return torch.randn(len(LABELS), 5, generator=torch.Generator().manual_seed(seed))


def sampled(model: Model) -> frozenset[int]:
    """The classes of the step that the gradient of the centers belongs to."""
    deferred = model.head.center_state.deferred
    return frozenset((deferred[-1].batch.classes if deferred else model.head.centers.grad._indices()[0]).tolist())


# -- who steps the centers -------------------------------------------------------------------------------------------


@both_updates
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-3, nesterov=True),
        lambda p: torch.optim.SparseAdam(p, 0.1),
        lambda p: torch.optim.Adagrad(p, 0.1),
        lambda p: torch.optim.AdamW(p, 0.1),
        lambda p: torch.optim.AdamW(p, 0.1, foreach=False),
        lambda p: torch.optim.RMSprop(p, 0.1),
    ],
)
@pytest.mark.parametrize("everything", [False, True])
def test_another_optimizer_is_refused_at_its_first_step(everything: bool, make: Any, update: Any) -> None:
    model = Model(update=update)
    if not everything:
        model.backbone.requires_grad_(False)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    before = copy.deepcopy(model.state_dict())
    model(images()).backward()
    with pytest.raises(InputError, match=f"{type(optimizer).__name__} holds the centers .* RowwiseSGD or RowwiseAdamW"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_optimizers_without_centers_that_train_are_left_alone() -> None:
    model = Model()
    model.head.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(images()).backward()
    optimizer.step()


def test_a_scheduler_and_a_scaler_change_nothing_of_that() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(model(images())).backward()
    with pytest.raises(InputError, match="SGD holds the centers"):
        scaler.step(optimizer)


@both_updates
@pytest.mark.parametrize("zero", [lambda model: None, lambda model: model.zero_grad(), lambda m: m.head.zero_grad()])
def test_centers_that_nobody_steps_are_refused(zero: Callable[[Model], None], update: Any) -> None:
    model = Model(update=update)
    optimizer = torch.optim.SGD(model.backbone.parameters(), 0.1)
    for _ in range(3):  # accumulation does not count
        model(images()).backward()
    optimizer.step()
    zero(model)
    with pytest.raises(InputError, match=r"no optimizer steps the centers .* RowwiseSGD .* freeze .* head.step \+= 1"):
        model(images())
    if update == "sparse":
        model.head.requires_grad_(False)
    else:
        RowwiseSGD(model.head.parameters())
    model(images())


@both_updates
def test_an_optimizer_that_is_never_stepped_repeats_no_negatives(update: Any) -> None:
    model = Model(update=update)
    RowwiseSGD(model.head.parameters())
    optimizer = torch.optim.SGD(model.backbone.parameters(), 0.1)
    seen = set()
    for _ in range(5):
        model(images()).backward()
        seen.add(sampled(model))
        optimizer.step()
        model.zero_grad()
    assert len(seen) == 5


@both_updates
def test_frozen_centers_in_eval_mode_use_all_classes(update: Any) -> None:
    model = Model(update=update)
    model.head.requires_grad_(False).eval()
    for _ in range(2):
        model(images()).backward()
        assert int(model.head.figures.sampled) == CLASSES


@both_updates
def test_frozen_centers_draw_new_negatives(update: Any) -> None:
    model = Model(update=update)
    model.head.requires_grad_(False)
    before = model.head.centers.clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = set()
    for step in range(5):
        assert model.head.step == step
        loss = model(images())
        loss.backward()
        losses.add(float(loss.detach()))
    optimizer.step()
    assert len(losses) == 5
    assert torch.equal(model.head.centers, before)


def by_hand(head: PartialFC, way: str) -> None:
    gradient = head.centers.grad.coalesce()
    with torch.no_grad():
        if way == "rows":
            head.centers[gradient.indices()[0]] -= 0.1 * gradient.values()
        elif way == "add":
            head.centers.sub_(gradient, alpha=0.1)
        else:
            head.centers.data.sub_(gradient, alpha=0.1)
    head.centers.grad = None


@pytest.mark.parametrize("way", ["rows", "add", "data"])
def test_centers_that_a_loop_steps_by_hand(way: str) -> None:
    head = PartialFC(CLASSES, DIM, RATE)
    seen = set()
    for step in range(5):
        head(torch.randn(6, DIM), LABELS).backward()
        assert head.step == step
        seen.add(frozenset(head.centers.grad._indices()[0].tolist()))
        by_hand(head, way)
    assert len(seen) == 5


@pytest.mark.parametrize("way", ["rows", "add", "data"])
def test_steps_by_hand_beside_an_optimizer_of_the_backbone(way: str) -> None:
    """An update through `data` leaves no trace, so it has to be counted."""
    model = Model()
    optimizer = torch.optim.SGD(model.backbone.parameters(), 0.1)
    for step in range(4):
        model(images()).backward()
        assert model.head.step == step
        optimizer.step()
        by_hand(model.head, way)
        if way == "data":
            model.head.step += 1


@pytest.mark.parametrize("way", ["data", "add"])
def test_a_deferred_gradient_cannot_be_applied_by_hand(way: str) -> None:
    head = PartialFC(CLASSES, DIM, RATE, update="deferred")
    head(torch.randn(6, DIM), LABELS).backward()
    by_hand(head, way)
    with pytest.raises(InputError, match="no optimizer steps the centers"):
        head(torch.randn(6, DIM), LABELS)


@both_updates
@both_optimizers
def test_accumulation_and_evaluation_are_no_steps(make: Any, update: Any) -> None:
    model = Model(update=update)
    optimizers = torch.optim.SGD(model.backbone.parameters(), 0.1), make(model.head.parameters())
    for step in range(3):
        seen = set()
        for _ in range(4):
            model(images()).backward()
            seen.add(sampled(model))
            model(images())  # a loss without backward
            model.eval()
            with torch.no_grad():
                model(images())
            with torch.inference_mode():
                model(images())
            model.train()
        assert len(seen) == 1
        assert model.head.step == step
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert model.head.step == 3


@both_updates
def test_a_step_that_the_loop_skips_is_not_counted(update: Any) -> None:
    model = Model(update=update)
    optimizer = RowwiseSGD(model.head.parameters())
    for _ in range(3):
        model(images()).backward()
        model.zero_grad()
        optimizer.zero_grad()
    assert model.head.step == 0
    model(images()).backward()
    optimizer.step()
    assert model.head.step == 1


# -- what becomes of a gradient --------------------------------------------------------------------------------------


def drop(way: str, model: Model) -> None:
    """Have a loss whose gradient is not wanted."""
    loss, centers, weights = model(images(2)), model.head.centers, list(model.backbone.parameters())
    if way == "no backward":
        return
    if way.startswith("autograd.grad"):
        for _ in range(2 if way.endswith("twice") else 1):
            torch.autograd.grad(loss, weights, retain_graph=True)
        return
    loss.backward(inputs=weights if way == "backward(inputs=)" else None)
    if way == "zero_grad of the model":
        model.zero_grad()
    elif way == "zero_grad to zeros":
        model.zero_grad(set_to_none=False)
    elif way == "zero_grad of the head":
        model.head.zero_grad()
    elif way == "grad = None":
        centers.grad = None
    elif way == "del grad":
        del centers.grad


DROPS = (
    *("zero_grad of the model", "zero_grad to zeros", "zero_grad of the head", "grad = None", "del grad"),
    *("autograd.grad", "autograd.grad, twice", "backward(inputs=)", "no backward"),
)


@both_updates
@both_optimizers
@pytest.mark.parametrize("way", DROPS)
@pytest.mark.parametrize("late", [False, True])
def test_a_dropped_gradient_leaves_nothing_behind(late: bool, way: str, make: Any, update: Any) -> None:
    """Nor does the second of two losses bring back the first, which was dropped in between."""
    trained = []
    for drops in (False, True):
        model = Model(update=update)
        optimizer = make(model.head.parameters(), lr=0.1)
        loss = model(images(1)) if late else None
        if drops:
            drop(way, model)
            model.backbone.zero_grad()
        (model(images(1)) if loss is None else loss).backward()
        optimizer.step()
        assert model.head.step == 1
        assert not model.head.center_state.deferred
        if update == "deferred":
            optimizer.step()  # a deferred gradient is applied once
        trained.append(model.head.centers.detach())
    assert torch.equal(*trained)


@both_updates
def test_two_losses_of_one_backward_add_up(update: Any) -> None:
    trained = []
    for at_once in (False, True):
        model = Model(update=update, sample_rate=1.0)
        optimizer = RowwiseSGD(model.head.parameters())
        losses = [model(images(seed)) for seed in range(2)]
        if at_once:
            (losses[0] + losses[1]).backward()
        else:
            for loss in losses:
                loss.backward()
        optimizer.step()
        trained.append(model.head.centers.detach())
    torch.testing.assert_close(*trained, rtol=1e-6, atol=1e-7)


def test_the_gradient_of_the_centers_from_autograd_grad() -> None:
    model = Model()
    (gradient,) = torch.autograd.grad(model(images()), [model.head.centers])
    model(images()).backward(inputs=[model.head.centers])
    assert torch.equal(gradient.to_dense(), model.head.centers.grad.to_dense())
    assert model.backbone.weight.grad is None
    deferred = Model(update="deferred")
    with pytest.raises(InputError, match=r"has no gradient of the centers for torch\.autograd\.grad"):
        torch.autograd.grad(deferred(images()), [deferred.head.centers])
    moved = {"centers": deferred.head.centers * 2.0}
    loss = torch.func.functional_call(deferred.head, moved, (torch.randn(6, DIM), LABELS))
    with pytest.raises(InputError, match="or functional_call"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("create_graph", [False, True])
def test_backward_onto_the_centers_alone_is_enough_for_a_deferred_step(create_graph: bool) -> None:
    model = Model(update="deferred")
    optimizer, before = RowwiseSGD(model.head.parameters()), model.head.centers.detach().clone()
    model(images()).backward(inputs=[model.head.centers], create_graph=create_graph)
    optimizer.step()
    assert not torch.equal(before, model.head.centers)


@both_updates
@both_optimizers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_step_between_forward_and_backward_is_refused(dtype: torch.dtype, make: Any, update: Any) -> None:
    head = PartialFC(CLASSES, DIM, 1.0, update=update, dtype=dtype)
    optimizer = make(head.parameters())
    one, two = head(torch.randn(6, DIM), LABELS), head(torch.randn(6, DIM), LABELS)
    one.backward()
    optimizer.step()
    with pytest.raises(InputError, match=r"call backward\(\) on all losses before optimizer.step"):
        two.backward()
    head(torch.randn(6, DIM), LABELS).backward()
    optimizer.step()
    assert head.step == 2


def test_a_graph_that_is_used_up_is_torchs_own_error() -> None:
    loss = Model()(images())
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def scale_in_place(model: Model) -> None:
    model.head.centers.grad.mul_(0.5)


def replace_gradient(model: Model) -> None:
    model.head.centers.grad = model.head.centers.grad.clone()


def add_dense(model: Model) -> None:
    model.head.centers.square().sum().backward()


def add_sparse(model: Model) -> None:
    nn.functional.embedding(torch.tensor([3, 5]), model.head.centers, sparse=True).sum().backward()


def change_centers(model: Model) -> None:
    with torch.no_grad():
        model.head.centers.div_(model.head.centers.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("touch", [scale_in_place, replace_gradient, add_dense, add_sparse, change_centers])
def test_what_a_deferred_gradient_cannot_take_is_refused(touch: Callable[[Model], None]) -> None:
    model = Model(update="deferred")
    optimizer = RowwiseSGD(model.head.parameters())
    model(images()).backward()
    touch(model)
    before = model.head.centers.detach().clone()
    with pytest.raises(InputError, match=r"update='sparse'|the centers changed between backward and optimizer\.step"):
        optimizer.step()
    assert torch.equal(before, model.head.centers)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_second_derivative_is_refused() -> None:
    for update in ("sparse", "deferred"):
        model = Model(update=update)
        embeddings = model.backbone(images())
        loss = model.head(embeddings, LABELS)
        (slope,) = torch.autograd.grad(loss, [embeddings], create_graph=True)
        with pytest.raises(InputError, match="no second derivative"):
            slope.square().sum().backward()
        model(images()).backward(create_graph=True)  # by itself it is none
        model.zero_grad()
        features = torch.randn(6, DIM)  # of another model: no gradient of its own
        head = PartialFC(CLASSES, DIM, 1.0)
        (slope,) = torch.autograd.grad(head(features, LABELS), [head.centers], create_graph=True)
        with pytest.raises(InputError, match="no second derivative"):
            slope.to_dense().square().sum().backward()


def test_features_of_inference_mode_train_a_head() -> None:
    with torch.inference_mode():
        features = torch.randn(6, DIM)
    head = PartialFC(CLASSES, DIM, 1.0)
    head(features, LABELS).backward()
    assert head.centers.grad is not None


# -- GradScaler ------------------------------------------------------------------------------------------------------


@both_updates
@both_optimizers
def test_a_scaler_with_nothing_but_the_head(make: Any, update: Any) -> None:
    """A scale that has grown too large shrinks until steps are taken again."""
    head = PartialFC(CLASSES, DIM, RATE, update=update)
    optimizer, before = make(head.parameters(), lr=0.01), head.centers.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-8)
    scales = []
    for _ in range(4):
        scaler.scale(head(torch.randn(6, DIM), LABELS)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    assert scales[:2] == [2.0**119, 2.0**111]
    assert scales[-1] == scales[-2]
    assert 0 < head.step < 4
    assert bool(head.centers.isfinite().all())
    assert not torch.equal(before, head.centers)


# -- torch.compile, copies -------------------------------------------------------------------------------------------


def three_steps(update: Any, compiled: str | None) -> list[Tensor]:
    """Losses and centers, with some part of the loop compiled."""
    torch.compiler.reset()
    model = Model(update=update)
    optimizers = torch.optim.SGD(model.backbone.parameters(), 0.1), RowwiseSGD(model.head.parameters())

    def compile_if(name: str, function: Any) -> Any:
        return torch.compile(function, backend="eager") if compiled == name else function

    head = compile_if("head", model.head)
    model.head.forward = compile_if("forward", model.head.forward)  # type: ignore[method-assign]
    both = compile_if("model", model)

    def step() -> Tensor:
        loss = head(model.backbone(images()), LABELS) if compiled == "head" else both(images())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    step = compile_if("step", step)
    return [*(step() for _ in range(3)), model.head.centers.detach(), torch.tensor(model.head.step)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # dynamo's
@both_updates
@pytest.mark.parametrize("what", ["head", "forward", "model", "step"])
def test_a_compiled_loop_does_what_it_does_uncompiled(what: str, update: Any) -> None:
    for plain, other in zip(three_steps(update, None), three_steps(update, what), strict=True):
        torch.testing.assert_close(plain, other)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_of_another_optimizer_works_as_before() -> None:
    """The hook that looks for centers in other optimizers is global."""
    torch.compiler.reset()
    linear = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    step = torch.compile(optimizer.step, backend="eager")
    before = linear.weight.detach().clone()
    linear(torch.ones(1, 3)).sum().backward()
    step()
    assert not torch.equal(before, linear.weight)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),  # noqa: S301
}


@both_updates
@pytest.mark.parametrize(
    "make",
    [
        RowwiseAdamW,
        RowwiseSGD,
        lambda p: RowwiseSGD(p, momentum=0.0),
        lambda p: RowwiseSGD(p, state_dtype=torch.bfloat16),
        lambda p: RowwiseSGD(p, unsampled="lazy_dense"),
    ],
)
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("steps", [0, 3])
def test_copies_of_head_and_optimizer_train_alike(steps: int, way: str, make: Any, update: Any) -> None:
    model = Model(update=update)
    optimizer = make(model.head.parameters())

    def train(model: Model, optimizer: Any, first: int) -> Tensor:
        for seed in range(first, first + steps + 1):
            model(images(seed)).backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.flush()
        return model.head.centers.detach()

    train(model, optimizer, 0)
    model(images()).backward()  # a copy has no pending gradient
    copied, copied_optimizer = COPIES[way]((model, optimizer))
    copied.zero_grad()
    model.zero_grad()
    assert type(copied_optimizer) is type(optimizer)
    assert copied.head.step == model.head.step
    assert torch.equal(train(copied, copied_optimizer, 5), train(model, optimizer, 5))
    assert copied_optimizer.row_state(copied.head.centers).keys() == optimizer.row_state(model.head.centers).keys()


def test_a_copied_or_saved_head_has_no_updates_pending() -> None:
    model = Model()
    optimizer = RowwiseSGD(model.head.parameters(), weight_decay=0.5, unsampled="lazy_dense")
    for seed in range(4):
        model(images(seed)).backward()
        optimizer.step()
        optimizer.zero_grad()
    saved, copied = model.state_dict()["head.centers"].clone(), copy.deepcopy(model).head.centers.detach()
    optimizer.flush()
    assert torch.equal(saved, model.head.centers)
    assert torch.equal(copied, model.head.centers)


# -- centers without a direction -------------------------------------------------------------------------------------


@both_updates
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0, 1e25])
@pytest.mark.parametrize("row", [1, 50])
@pytest.mark.parametrize("margin", [None, Margin()])
@pytest.mark.parametrize("backend", ["compiled", "chunked"])
def test_a_center_without_a_direction_is_refused(
    backend: str, margin: Any, row: int, value: float, update: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "chunked":
        monkeypatch.setattr("partialfc.head.backends.select.numba_kernels", lambda: None)
    head = PartialFC(100, DIM, 1.0, margin, update=update)
    head.centers.data[row] = value
    with pytest.raises(InputError, match="a center that step 0 uses is zero, NaN, infinite or longer"):
        head(torch.randn(6, DIM), LABELS)
    head.centers.data[row] = 1e15
    head(torch.randn(6, DIM), LABELS).backward()


def test_a_sum_of_raised_negatives_that_underflows_is_refused() -> None:
    head = PartialFC(2, 2, 1.0, CurricularFace(), 64.0)
    head.centers.data.copy_(torch.tensor([[-1.0, 0.0], [-1.0, 1e-3]]))
    with pytest.raises(InputError, match="lower the scale"):
        head(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert (
        float(PartialFC(2, 2, 0.0, CurricularFace(), 64.0)(torch.tensor([[1.0, 0.0]]), torch.tensor([0])).detach())
        == 0.0
    )
