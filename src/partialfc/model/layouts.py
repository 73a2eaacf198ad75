"""IResNets under the names of other projects: the `ir_18` to `ir_101` of AdaFace and CVLface as our r18 to r100.

Their blocks stand in one list, `body`, and each has a list of layers. They compute what ours do, except that the first
block shortens its shortcut by taking every second pixel, where ours has a convolution: that becomes one with identity
weights. Networks whose blocks have other layers (`ir_152`, `ir_se_50`) are not ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from partialfc.backbones.iresnet import WIDTHS
from partialfc.core.errors import InputError

_STEM = {"input_layer.0": "conv1", "input_layer.1": "bn1", "input_layer.2": "prelu"}
_STEM |= {"output_layer.0": "bn2", "output_layer.3": "fc", "output_layer.4": "features"}
_LAYERS = ("bn1", "conv1", "bn2", "prelu", "conv2", "bn3")
_BLOCK = re.compile(r"body\.(\d+)\.(res_layer|shortcut_layer)\.(\w+)")
_EPS = 1e-5  # of batch normalisation


def is_ir_layout(weights: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of an `ir` network."""
    return "input_layer.0.weight" in weights and "body.0.res_layer.1.weight" in weights


def from_ir_layout(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same network under our names.

    Raises:
        InputError: its blocks have other layers than ours.
    """
    place = _places(weights)
    renamed: dict[str, Tensor] = {}
    for key, value in weights.items():
        layer, _, parameter = key.rpartition(".")
        match = _BLOCK.fullmatch(layer)
        if match is None:
            name = _STEM.get(layer)
        elif match[2] == "shortcut_layer":
            name = f"{place[int(match[1])]}.downsample.{match[3]}"
        else:
            number = int(match[3]) if match[3].isdecimal() else len(_LAYERS)
            name = f"{place[int(match[1])]}.{_LAYERS[number]}" if number < len(_LAYERS) else None
        if name is None:
            raise InputError(f"it is an `ir` network with the layer {layer}, which an IResNet has not")
        renamed[f"{name}.{parameter}"] = value
    width, dtype = WIDTHS[0], weights["input_layer.0.weight"].dtype
    zero, one = torch.zeros(width, dtype=dtype), torch.ones(width, dtype=dtype)
    # Batch normalisation divides by √(variance + eps): with this weight it changes nothing.
    shortcut = {"weight": one * (1 + _EPS) ** 0.5, "bias": zero, "running_mean": zero.clone(), "running_var": one}
    renamed["layer1.0.downsample.0.weight"] = torch.eye(width, dtype=dtype)[:, :, None, None]
    renamed |= {f"layer1.0.downsample.1.{name}": value for name, value in shortcut.items()}
    mean = renamed.get("features.running_mean", zero)  # their last normalisation has no weight and no bias
    return {"features.weight": torch.ones_like(mean), "features.bias": torch.zeros_like(mean), **renamed}


def _places(weights: Mapping[str, Tensor]) -> list[str]:
    """The stage and number of each block of `body`: a stage begins where the shortcut has a convolution."""
    numbers = {int(match[1]) for key in weights if (match := _BLOCK.match(key))}
    places, stage, first = [], 1, 0
    for number in range(max(numbers) + 1):
        if f"body.{number}.shortcut_layer.0.weight" in weights:
            stage, first = stage + 1, number
        places.append(f"layer{stage}.{number - first}")
    return places
