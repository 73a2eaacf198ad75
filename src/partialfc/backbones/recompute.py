"""Gradient checkpointing: activations computed again in the backward pass rather than kept (Chen, 1604.06174)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recomputed(module: nn.Module, *inputs: Any) -> Tensor:
    """`module(*inputs)`, keeping only the inputs for the backward pass; running statistics move once, not twice.

    The module must draw no random numbers except as a function of its inputs, because no generator is put back.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _still_statistics(module)

    result: Tensor = checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    return result


@contextmanager
def _still_statistics(module: nn.Module) -> Iterator[None]:
    """Batch normalisation that computes as before but leaves its running statistics alone."""
    norms = [each for each in module.modules() if isinstance(each, _BatchNorm)]
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
