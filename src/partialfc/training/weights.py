"""The exponential moving average of the backbone's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from partialfc.distributed.sharded import local_shard


def averaged_copy(backbone: nn.Module) -> nn.Module:
    """A copy of the backbone to average into, in evaluation mode and without gradients."""
    return copy.deepcopy(backbone).eval().requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, backbone: nn.Module, decay: float, steps: int) -> None:
    """average = d · average + (1 - d) · backbone, after `steps` earlier steps.

    d = min(decay, (1 + steps) / (10 + steps)), so that the first weights are soon forgotten. Running statistics are
    averaged like weights, since they belong to them; what is no floating point number is copied.
    """
    decay = min(decay, (1 + steps) / (10 + steps))
    states = zip(average.state_dict().values(), backbone.state_dict().values(), strict=True)
    pairs = [(local_shard(mean), local_shard(now)) for mean, now in states]
    floating = [pair for pair in pairs if pair[0].is_floating_point()]
    torch._foreach_lerp_([mean for mean, _ in floating], [now for _, now in floating], 1.0 - decay)
    for mean, now in pairs:
        if not mean.is_floating_point():
            mean.copy_(now)
