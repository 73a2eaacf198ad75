"""What a backbone costs: counted by running it on tensors without values, so that nothing is allocated."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from partialfc.config.build import build_backbone
from partialfc.config.options import BackboneConfig, TrainConfig
from partialfc.plan.workload import Workload


@dataclass(frozen=True)
class NetworkSize:
    """Numbers of elements.

    Attributes:
        parameters, buffers: all of them.
        trained: parameters with a gradient.
        largest: elements of the largest parameter.
    """

    parameters: int
    buffers: int
    trained: int
    largest: int


@dataclass(frozen=True)
class NetworkPass:
    """Forward and backward pass of one batch.

    Attributes:
        saved_bytes: alive between forward and backward, images included.
        peak_bytes: the most alive at any time, gradients included.
        working_bytes: the most alive at any time, without finished gradients.
    """

    saved_bytes: int
    peak_bytes: int
    working_bytes: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations inside the context allocate, while they are alive.

    Attributes:
        now: alive at present.
        peak: the most at any time.
        working_peak: the most at any time, without gradients of the module's parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = self.working_peak = 0
        self._gradients = 0
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._set_aside)
        self._known = {value.untyped_storage()._cdata for value in (*module.parameters(), *module.buffers())}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor) and not value.is_sparse:  # whose parts are tensors of their own
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        self.working_peak = max(self.working_peak, self.now - self._gradients)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _set_aside(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is not None:
            parts = (gradient._indices(), gradient._values()) if gradient.is_sparse else (gradient,)
            self._gradients += sum(part.nbytes for part in parts)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def network_size(workload: Workload) -> NetworkSize:
    """Parameters and buffers of the backbone; InputError for an option that it does not take."""
    return _size(*_cost_key(workload))


def network_pass(workload: Workload) -> NetworkPass:
    """Memory of one micro-batch, of 2 images at least."""
    return _pass(*_cost_key(workload), max(2, workload.batch_size), workload.dtype)


def network_flops(workload: Workload) -> int:
    """Operations of a micro-batch's forward pass; backward takes twice as many, recomputed activations as many again.

    The micro-batch has 2 images at least.
    """
    return _flops(*_cost_key(workload)) * max(2, workload.batch_size) // 2


def _cost_key(workload: Workload) -> tuple[BackboneConfig, int]:
    """What the cost of a network depends on; lists cannot be keys of a cache, and frozen layers are built alike."""
    return replace(workload.config.backbone, freeze=()), workload.image_size  # type: ignore[arg-type]


def _build(backbone: BackboneConfig, image_size: int) -> nn.Module:
    return build_backbone(TrainConfig(backbone=backbone), image_size, device=torch.device("meta"))


@cache
def _size(backbone: BackboneConfig, image_size: int) -> NetworkSize:
    module = _build(backbone, image_size)
    sizes = [parameter.numel() for parameter in module.parameters()]
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return NetworkSize(sum(sizes), sum(buffer.numel() for buffer in module.buffers()), trained, max(sizes))


@cache
def _flops(backbone: BackboneConfig, image_size: int) -> int:
    """Operations of the forward pass of 2 images."""
    images = torch.zeros(2, 3, image_size, image_size, device="meta")
    network = _build(backbone, image_size)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.eval()  # statistics of batches take longer to trace than all else, and count no operations
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(images, torch.zeros(2, dtype=torch.int64, device="meta"))
    return int(counter.get_total_flops())


@cache
def _pass(backbone: BackboneConfig, image_size: int, images: int, dtype: torch.dtype) -> NetworkPass:
    """Both passes with tensors that have shapes and no values; autocast is the CPU's, since no GPU may be there."""
    built = _build(backbone, image_size)
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = built.to_empty(device="cpu")
        keys = torch.zeros(images, dtype=torch.int64)
        with LiveBytes(module) as live:
            batch = torch.zeros(images, 3, image_size, image_size)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                embeddings = module(batch, keys).float()
            saved = live.now
            embeddings.backward(torch.ones_like(embeddings))
        return NetworkPass(saved, live.peak, live.working_peak)
