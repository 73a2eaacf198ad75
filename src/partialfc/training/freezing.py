"""Layers that keep their weights: chosen by their names, a layer standing for all below it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from partialfc.core.errors import InputError


def freeze(backbone: nn.Module, names: Sequence[str]) -> None:
    """Take the gradient from the named parameters and from all parameters of the named layers.

    Args:
        names: such as "conv1", "layer1" or "layer1.0.bn1.weight"; "layer1" does not mean "layer10".

    Raises:
        InputError: a name is not in the network, or nothing is left to train.
    """
    parameters = dict(backbone.named_parameters())
    for name in names:
        chosen = [each for each in parameters if _is_below(each, name)]
        if not chosen:
            layers = ", ".join(child for child, _ in backbone.named_children())
            raise InputError(f"backbone.freeze names {name!r}, which the network has not: its layers are {layers}.")
        for each in chosen:
            parameters[each].requires_grad_(False)
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
