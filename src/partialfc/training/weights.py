"""The backbone's weights beside the optimizer: layers that are frozen, and the exponential moving average."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from partialfc.core.errors import InputError
from partialfc.distributed.sharded import local_shard


def freeze(backbone: nn.Module, names: Sequence[str]) -> None:
    """Exclude the named parameters, and all parameters of the named layers, from training.

    Args:
        names: such as "conv1", "layer1" or "layer1.0.bn1.weight"; "layer1" does not mean "layer10".

    Raises:
        InputError: a name is not in the network, or nothing is left to train.
    """
    parameters = dict(backbone.named_parameters())
    for name in names:
        frozen = [key for key in parameters if _is_below(key, name)]
        if not frozen:
            layers = ", ".join(child for child, _ in backbone.named_children())
            raise InputError(f"backbone.freeze names {name!r}, which the network has not: its layers are {layers}.")
        for key in frozen:
            parameters[key].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise InputError("backbone.freeze leaves no layer to train: name fewer.")


def set_frozen_layers_eval(backbone: nn.Module, names: Sequence[str]) -> None:
    """Put the named layers into evaluation mode, so that their batch statistics stay too; after `backbone.train()`."""
    if not names:
        return
    for layer_name, layer in backbone.named_modules():
        if any(_is_below(layer_name, name) for name in names):
            layer.training = False


def _is_below(name: str, layer: str) -> bool:
    return name == layer or name.startswith(layer + ".")


def averaged_copy(backbone: nn.Module) -> nn.Module:
    """A copy of the backbone to average into, in evaluation mode and without gradients."""
    return copy.deepcopy(backbone).eval().requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, backbone: nn.Module, decay: float, steps: int) -> None:
    """average = d · average + (1 - d) · backbone, after `steps` earlier steps.

    d = min(decay, (1 + steps) / (10 + steps)), so that the first weights are soon forgotten. Running statistics are
    averaged as the weights are, since they belong to them; integers are copied.
    """
    decay = min(decay, (1 + steps) / (10 + steps))
    states = zip(average.state_dict().values(), backbone.state_dict().values(), strict=True)
    pairs = [(local_shard(mean), local_shard(current)) for mean, current in states]
    floating = [pair for pair in pairs if pair[0].is_floating_point()]
    torch._foreach_lerp_([mean for mean, _ in floating], [current for _, current in floating], 1.0 - decay)
    for mean, current in pairs:
        if not mean.is_floating_point():
            mean.copy_(current)
