"""A step on a GPU reads nothing back: shown on the device "meta", whose tensors have a shape but no values.

There nothing works that wants a value, or has a shape that depends on one: `item`, `bool`, `nonzero`, `unique`, a
boolean index, a copy to the host. The kernels are left out; backends/test_gpu_backend.py runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from partialfc.head import optim, sampled_softmax
from partialfc.head.backends import gpu
from partialfc.head.backends.gpu import GPUBackend
from partialfc.head.inputs import InputFlag
from partialfc.head.margins import AdaFace, ArcFace, CombinedMargin, ElasticFace, MagFace, Margin
from partialfc.head.optim import RowwiseAdamW, RowwiseSGD
from partialfc.head.partial_fc import PartialFC
from partialfc.head.sampling import Sampler

CLASSES, WIDTH, BATCH = 20_000, 32, 16


class CurrentDevice:
    """In place of `torch.cuda.device_of`: remembers what it was entered for."""

    entered: ClassVar[list[torch.device]] = []

    def __init__(self, tensor: Tensor) -> None:
        self._device = tensor.device

    def __enter__(self) -> None:
        self.entered.append(self._device)

    def __exit__(self, *reason: object) -> None:
        self.entered.pop()


class NoKernel:
    """In place of a Triton kernel: it runs on any tensors and does nothing, but records the current device."""

    launched: ClassVar[list[tuple[torch.device, tuple[Any, ...]]]] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: self.launched.append((CurrentDevice.entered[-1], arguments))


@pytest.fixture(autouse=True)
def imaginary_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled_softmax, "select_backend", lambda *arguments: GPUBackend())
    for kernel in ("unit_kernel", "weights_kernel", "finish_kernel"):
        monkeypatch.setattr(gpu, kernel, NoKernel())
    monkeypatch.setattr(NoKernel, "launched", [])
    monkeypatch.setattr(torch.cuda, "device_of", CurrentDevice)
    # The asynchronous copy needs page-locked memory and events: test_on_a_gpu.py has both.
    monkeypatch.setattr(InputFlag, "_copy_to_host", lambda flag: None)
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: nullcontext())  # it does not know the device


def head_and_optimizer(make: Any = RowwiseSGD, **options: Any) -> tuple[PartialFC, Any]:
    usual: dict[str, Any] = {"update": "deferred", "sample_rate": 0.1}
    head = PartialFC(CLASSES, WIDTH, device="meta", **(usual | options))
    return head, make(head.parameters(), lr=0.1)


def take_step(head: PartialFC, optimizer: Any, scaled: bool = True) -> None:
    embeddings = torch.randn(BATCH, WIDTH, device="meta", requires_grad=True)
    labels = torch.randint(CLASSES, (BATCH,), device="meta")
    head(embeddings, labels).backward()
    if scaled:  # as GradScaler leaves them
        optimizer.found_inf, optimizer.grad_scale = torch.zeros((), device="meta"), torch.ones((), device="meta")
    optimizer.step()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("operand_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_a_step_of_sgd_reads_nothing(rate: float, operand_dtype: torch.dtype, scaled: bool) -> None:
    options = {"operand_dtype": operand_dtype, "dtype": operand_dtype, "margin": ArcFace(), "conflict_threshold": 0.4}
    head, optimizer = head_and_optimizer(sample_rate=rate, **options)
    take_step(head, optimizer, scaled)
    assert head.step == 1
    assert head.figures is not None
    assert head.figures.sampled.is_meta


@pytest.mark.parametrize("sampler", ["sweep", "runs"])
@pytest.mark.parametrize("margin", [CombinedMargin(), AdaFace(), MagFace(), ElasticFace()])
def test_no_margin_that_the_kernels_take_and_no_sampler_reads(margin: Margin, sampler: Sampler) -> None:
    head, optimizer = head_and_optimizer(margin=margin, sampler=sampler)
    take_step(head, optimizer)
    assert head.step == 1


def test_every_kernel_is_launched_on_the_device_of_the_centers() -> None:
    """Triton takes the current device, whatever its tensors' is: a head on cuda:1 must make that the current one."""
    take_step(*head_and_optimizer())
    assert NoKernel.launched
    assert {device.type for device, _ in NoKernel.launched} == {"meta"}


def test_a_rate_in_a_tensor_on_the_host_goes_to_the_kernel_as_a_number() -> None:
    head, optimizer = head_and_optimizer()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    take_step(head, optimizer)
    given = [argument for _, arguments in NoKernel.launched for argument in arguments]
    assert all(argument.is_meta for argument in given if isinstance(argument, Tensor))
    assert 0.5 in [argument for argument in given if not isinstance(argument, Tensor)]


@pytest.mark.parametrize("make", [RowwiseSGD, RowwiseAdamW])
def test_state_on_the_host_is_waited_for_before_it_is_read(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU writes it some time after the step; a copy on the host would be of old values."""
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(optim, "zero_state", lambda parameter, *options: torch.zeros(parameter.shape))
    head, optimizer = head_and_optimizer(make)
    optimizer.row_state(head.centers)
    if make is RowwiseSGD:
        take_step(head, optimizer)
    assert not waited
    state = optimizer.state_dict()
    for read in (optimizer.flush, optimizer.state_dict, lambda: optimizer.load_state_dict(state)):
        waited.clear()
        read()
        assert waited
        assert {device.type for device in waited} == {"meta"}


@pytest.mark.parametrize(
    ("options", "scaled"),
    [({"update": "sparse"}, True), ({"make": RowwiseAdamW}, True), ({"make": RowwiseAdamW}, False)],
)
def test_what_needs_the_number_of_classes_does_read(options: dict[str, Any], scaled: bool) -> None:
    """So the tests above would notice a read."""
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)meta"):
        take_step(*head_and_optimizer(**options), scaled)


@pytest.mark.parametrize(
    "read",
    [
        lambda labels: labels.unique(),
        lambda labels: labels[labels >= 0],
        lambda labels: labels[: int(labels.max())],
        lambda labels: labels if bool((labels >= 0).all()) else labels + 1,
        lambda labels: labels.cpu().to(labels.device),
        lambda labels: labels[(labels >= 0).nonzero()[:, 0]],
    ],
)
def test_a_read_that_comes_back_is_found(read: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    original = sampled_softmax.sample_padded
    monkeypatch.setattr(sampled_softmax, "sample_padded", lambda labels, **rest: original(read(labels), **rest))
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)meta"):
        take_step(*head_and_optimizer())
