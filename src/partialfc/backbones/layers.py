"""What several backbones share: check of the image size, shortcut, leaving autocast, recomputed activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from partialfc.core.errors import InputError


def check_image_size(image_size: int, network: str) -> None:
    """Raise an InputError unless `image_size` is a positive multiple of 16."""
    if image_size < 16 or image_size % 16:
        raise InputError(f"image_size {image_size} does not suit {network}: choose a multiple of 16.")


def shortcut(in_channels: int, channels: int, stride: int) -> nn.Sequential | None:
    """The shortcut of a residual block where it changes size or width, a 1 × 1 convolution with BN; else None."""
    if stride == 1 and in_channels == channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels))


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast; an empty one on a device that has none (meta)."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def recomputed(module: nn.Module, *inputs: Any) -> Tensor:
    """`module(*inputs)` with activations recomputed in the backward pass rather than kept (Chen et al., 1604.06174).

    Running statistics are updated once. The module must not draw from a random generator, whose state is not restored.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _fixed_statistics(module)

    result: Tensor = checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    return result


@contextmanager
def _fixed_statistics(module: nn.Module) -> Iterator[None]:
    """Batch normalisation by batch statistics that leaves the running statistics unchanged."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    before = [(norm.momentum, None if (n := norm.num_batches_tracked) is None else n.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        with torch.no_grad():
            for norm, (momentum, count) in zip(norms, before, strict=True):
                norm.momentum = momentum
                if count is not None and norm.num_batches_tracked is not None:
                    norm.num_batches_tracked.copy_(count)
