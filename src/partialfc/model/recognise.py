"""Recognise the backbone of a bare state_dict by its keys and shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from partialfc.backbones.iresnet import BLOCKS
from partialfc.backbones.mobilefacenet import BLOCKS_AND_SCALE
from partialfc.backbones.vit import PATCH, WIDTHS_AND_DEPTHS
from partialfc.core.errors import InputError

_PREFIXES = ("module.", "_orig_mod.", "backbone.")


def without_prefixes(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights without the prefixes that wrappers put before every name."""
    plain = dict(weights)
    while prefix := next((p for p in _PREFIXES if plain and all(key.startswith(p) for key in plain)), None):
        plain = {key.removeprefix(prefix): tensor for key, tensor in plain.items()}
    return plain


def recognise(weights: Mapping[str, Tensor]) -> tuple[str, int, int]:
    """Name of the backbone, embedding_dim and image_size of a state_dict without prefixes.

    Raises:
        InputError: no published backbone has these keys and shapes; the message names the difference.
    """
    try:
        if "layer4.0.conv1.weight" in weights:
            return _iresnet(weights)
        if "patch_embed.proj.weight" in weights:
            return _vit(weights)
        if "conv_sep.layers.0.weight" in weights:
            return _mobilefacenet(weights)
    except (KeyError, IndexError) as error:
        raise InputError(f"it lacks or misshapes {error}, which its other weights call for") from error
    first = ", ".join(list(weights)[:3])
    raise InputError(f"its keys ({first}, ...) are those of no IResNet, ViT or MobileFaceNet")


def _children(weights: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered parts stand below `prefix`."""
    depth = prefix.count(".")
    return len({key.split(".")[depth] for key in weights if key.startswith(prefix)})


def _iresnet(weights: Mapping[str, Tensor]) -> tuple[str, int, int]:
    blocks = tuple(_children(weights, f"layer{stage}.") for stage in (1, 2, 3, 4))
    name = next((name for name, known in BLOCKS.items() if known == blocks), None)
    if name is None:
        raise InputError(f"it is an IResNet with {blocks} blocks, which is none of {', '.join(BLOCKS)}")
    embedding_dim, features = weights["fc.weight"].shape[0], weights["fc.weight"].shape[1]
    return name, embedding_dim, 16 * math.isqrt(features // 512)


def _vit(weights: Mapping[str, Tensor]) -> tuple[str, int, int]:
    width, depth = weights["patch_embed.proj.weight"].shape[0], _children(weights, "blocks.")
    name = next((name for name, known in WIDTHS_AND_DEPTHS.items() if known == (width, depth)), None)
    if name is None:
        raise InputError(f"it is a ViT of width {width} and depth {depth}, none of {', '.join(WIDTHS_AND_DEPTHS)}")
    side = math.isqrt(weights["pos_embed"].shape[1])
    # Several image sizes have this number of whole patches: 112 if it is among them, else the smallest.
    return name, weights["feature.2.weight"].shape[0], 112 if side == 112 // PATCH else side * PATCH


def _mobilefacenet(weights: Mapping[str, Tensor]) -> tuple[str, int, int]:
    blocks = _children(weights, "layers.3.layers.")
    name = next((name for name, (known, _) in BLOCKS_AND_SCALE.items() if known[1] == blocks), None)
    if name is None:
        raise InputError(f"it is a MobileFaceNet of {blocks} blocks in stage 2, none of {', '.join(BLOCKS_AND_SCALE)}")
    side = weights["features.layers.0.layers.0.weight"].shape[2]
    return name, weights["features.layers.2.weight"].shape[0], 16 * side
