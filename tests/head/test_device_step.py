"""A step as a GPU takes it, in Triton's interpreter: padded shapes beside exact ones, and the flag for bad input."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import device_scenarios
from device_scenarios import BAD, RATES, SHARED
from distributed_workers import run_ranks

from partialfc.core.errors import InputError
from partialfc.head import sampled_softmax
from partialfc.head.backends.gpu import GPUBackend
from partialfc.head.backends.torch_chunked import ChunkedBackend
from partialfc.head.inputs import GlobalLabels
from partialfc.head.optim import RowwiseSGD
from partialfc.head.partial_fc import PartialFC

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is switched off beside a GPU")
WORLD_SIZES = [1, 2, 3]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """The results of every rank at every world size."""
    folder = tmp_path_factory.mktemp("device")
    run_ranks(3, device_scenarios.work, folder)
    return {1: [device_scenarios.play()]} | {
        world_size: [torch.load(folder / f"{world_size}-{rank}.pt", weights_only=True) for rank in range(world_size)]
        for world_size in WORLD_SIZES[1:]
    }


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", list(RATES))
def test_padded_classes_give_what_exact_ones_give(
    name: str, world_size: int, found: dict[int, list[dict[str, Any]]]
) -> None:
    for rank in found[world_size]:
        for padded, exact in zip(rank[name]["GPUBackend"], rank[name]["ChunkedBackend"], strict=True):
            largest = float(exact.abs().max()) if exact.numel() else 0.0
            torch.testing.assert_close(padded, exact, rtol=1e-4, atol=2e-5 * largest)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("world_size", "bad"), [(1, bad) for bad in BAD] + [(n, bad) for n in (2, 3) for bad in SHARED]
)
@pytest.mark.parametrize("way", ["check", "next forward"])
def test_bad_input_of_one_rank_changes_nothing_anywhere_and_is_raised(
    bad: str, way: str, world_size: int, found: dict[int, list[dict[str, Any]]]
) -> None:
    for rank in found[world_size]:
        result = rank["flags"][bad][way]
        assert result["untouched"]
        assert result["gradient"] == 0
        label, _ = BAD[bad]
        if label != 1:
            assert result["error"].startswith(f"InputError: label {label} lies outside [0, 149)")
        else:
            assert result["error"].startswith("NonFiniteEmbeddings: embeddings of step 1 contain NaN")
        assert result["still untouched"]
        assert result["trains on"]
        assert result["moves on"]


def head_and_optimizer(monkeypatch: pytest.MonkeyPatch) -> tuple[PartialFC, Any]:
    """The optimizer is not typed, since a scaler gives it attributes that it does not declare."""
    monkeypatch.setattr(sampled_softmax, "select_backend", lambda *arguments: GPUBackend())
    head = PartialFC(40, 4, 1.0, update="deferred")
    return head, RowwiseSGD(head.parameters(), lr=0.1)


def test_a_loss_of_a_bad_batch_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    head, _ = head_and_optimizer(monkeypatch)
    assert bool(head(torch.ones(2, 4), torch.tensor([1, 40])).isnan())
    with pytest.raises(InputError, match="label 40"):
        head.check()


def test_a_bad_micro_step_voids_the_whole_step(monkeypatch: pytest.MonkeyPatch) -> None:
    head, optimizer = head_and_optimizer(monkeypatch)
    before = head.centers.detach().clone()
    embeddings = torch.ones(2, 4, requires_grad=True)
    head(embeddings, torch.tensor([1, 99])).backward()
    with pytest.raises(InputError, match="label 99"):
        head(embeddings, torch.tensor([1, 2]))
    optimizer.step()
    assert torch.equal(before, head.centers)
    head(embeddings, torch.tensor([1, 2])).backward()
    head(embeddings, torch.tensor([1, -7])).backward()
    optimizer.step()
    assert torch.equal(before, head.centers)


def test_the_first_of_two_bad_batches_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    head, _ = head_and_optimizer(monkeypatch)
    head(torch.ones(1, 4), torch.tensor([41]))
    assert head._flag is not None
    head._flag.record(torch.ones(1, 4), torch.tensor([42]), torch.tensor(1))
    with pytest.raises(InputError, match="label 41"):
        head.check()
    head.check()


class LateEvent:
    """An event as a host sees it that is always a step ahead of its GPU: not there when first asked for."""

    def record(self) -> None:
        self.asked = 0

    def query(self) -> bool:
        self.asked += 1
        return self.asked > 1

    def synchronize(self) -> None: ...


def test_a_host_that_is_always_ahead_raises_too(monkeypatch: pytest.MonkeyPatch) -> None:
    head, _ = head_and_optimizer(monkeypatch)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory=False, **options: empty(*sizes, **options))
    monkeypatch.setattr(torch.cuda, "Event", LateEvent)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    head(torch.ones(1, 4), torch.tensor([1]))
    assert head._flag is not None
    head._flag._on_cuda = True
    errors = []
    for label in [1, 41, *[1] * 8]:
        try:
            head(torch.ones(1, 4), torch.tensor([label]))
            errors.append("")
        except InputError as error:
            errors.append(str(error))
    assert errors[:3] == [""] * 3
    assert "label 41" in errors[3]  # its copy had arrived by then
    assert errors[4:] == [""] * 6


def test_a_copy_of_the_head_has_a_flag_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    head, _ = head_and_optimizer(monkeypatch)
    head(torch.ones(1, 4), torch.tensor([41]))
    assert head._flag is not None
    event: Any = threading.Lock()  # cannot be copied, as a GPU's event
    head._flag._pending_copies.append((torch.zeros(3), event))
    copied = copy.deepcopy(head)
    with pytest.raises(InputError, match="label 41"):
        head.check()
    before = copied.centers.detach().clone()
    copied(torch.ones(1, 4, requires_grad=True), torch.tensor([1])).backward()
    RowwiseSGD(copied.parameters()).step()
    assert torch.equal(before, copied.centers)
    with pytest.raises(InputError, match="label 41"):
        copied.check()
    assert copied._flag is not None
    assert not bool(copied.center_state.flag)


def test_a_default_device_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What must lie on the host does so, whatever a user has made the default."""
    head, _ = head_and_optimizer(monkeypatch)
    batch = torch.ones(1, 4), torch.tensor([41])
    with torch.device("meta"):
        head(*batch)
        with pytest.raises(InputError, match="label 41"):
            head(*batch)


@pytest.mark.parametrize("found_inf", [1.0, torch.tensor(1.0), torch.tensor([1.0])])
def test_an_overflow_that_a_scaler_found_changes_nothing(found_inf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    head, optimizer = head_and_optimizer(monkeypatch)
    before = head.centers.detach().clone()
    for overflow in (found_inf, found_inf * 0):
        head(torch.ones(2, 4, requires_grad=True), torch.tensor([1, 2])).backward()
        optimizer.found_inf, optimizer.grad_scale = overflow, torch.tensor(1.0)
        optimizer.step()
        assert torch.equal(before, head.centers) == bool(overflow)


def test_a_scale_that_overflows_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    head, optimizer = head_and_optimizer(monkeypatch)
    before = head.centers.detach().clone()
    for scale in (torch.finfo(torch.float32).max, 2.0**100):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(head(torch.ones(2, 4, requires_grad=True), torch.tensor([1, 2]))).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, head.centers) == (scale > 2.0**100)
        assert (scaler.get_scale() < scale) == (scale > 2.0**100)
    assert bool(head.centers.isfinite().all())


def test_grad_scaler_unscales_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for scale in (1.0, 256.0):
        head, optimizer = head_and_optimizer(monkeypatch)
        (scale * head(torch.ones(2, 4, requires_grad=True), torch.tensor([1, 2]))).backward()
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(0.0), torch.tensor(scale)
        optimizer.step()
        results.append(head.centers.detach())
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64), torch.tensor([0.25])])
def test_a_learning_rate_on_the_device(rate: Tensor, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for lr in (0.25, rate):
        monkeypatch.setattr(sampled_softmax, "select_backend", lambda *arguments: GPUBackend())
        head = PartialFC(40, 4, 1.0, update="deferred", dtype=dtype)
        optimizer = RowwiseSGD(head.parameters(), lr=lr)
        head(torch.ones(2, 4, requires_grad=True), torch.tensor([1, 2])).backward()
        optimizer.step()
        results.append(head.centers.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("counts", [[3], [2, 0], []])
def test_counts_that_do_not_agree_with_the_batch_are_refused(counts: list[int]) -> None:
    labels = torch.tensor([1, 2])
    with pytest.raises(InputError, match="2 for process 0"):
        PartialFC(40, 4, 1.0)(torch.ones(2, 4), labels, global_labels=GlobalLabels(counts, labels))


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter's
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0, 1e25])
@pytest.mark.parametrize("row", [1, 30])
def test_a_center_without_a_direction_changes_nothing_and_is_told_later(
    row: int, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, optimizer = head_and_optimizer(monkeypatch)
    head.centers.data[row] = value
    before, embeddings = head.centers.detach().clone(), torch.ones(2, 4, requires_grad=True)
    loss = head(embeddings, torch.tensor([1, 2]))
    loss.backward()
    optimizer.step()
    assert bool(loss.isnan())
    assert embeddings.grad is not None
    assert bool((embeddings.grad == 0).all())
    assert torch.equal(before.nan_to_num(), head.centers.nan_to_num())
    with pytest.raises(InputError, match="a center that step 0 uses is zero, NaN, infinite"):
        head.check()
    head.centers.data[row] = 1.0
    head(embeddings, torch.tensor([1, 2])).backward()
    optimizer.step()
    head.check()
    assert not torch.equal(before, head.centers)


def test_momentum_zero_needs_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for kernels in (True, False):
        head, _ = head_and_optimizer(monkeypatch)
        if not kernels:
            monkeypatch.setattr(sampled_softmax, "select_backend", lambda *arguments: ChunkedBackend())
        optimizer = RowwiseSGD(head.parameters(), lr=0.1, momentum=0.0)
        for _ in range(2):
            head(torch.ones(2, 4, requires_grad=True), torch.tensor([1, 2])).backward()
            optimizer.step()
        assert not optimizer.row_state(head.centers)
        results.append(head.centers.detach())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
