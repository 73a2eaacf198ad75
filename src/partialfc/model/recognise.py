"""Recognise the backbone of a bare state_dict by its keys and shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from partialfc.backbones.iresnet import BLOCKS
from partialfc.backbones.mobilefacenet import BLOCKS_AND_SCALE
from partialfc.backbones.vit import PATCH, WIDTHS_AND_DEPTHS
from partialfc.core.errors import InputError
from partialfc.model.layouts import from_ir_layout, is_ir_layout

# What wrappers put before every name: DistributedDataParallel, torch.compile, Lightning and their like.
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "net.", "network.", "encoder.")
_MAX_DEPTH = 4  # of wrappers around wrappers


def find_backbone(content: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """The backbone's state_dict in what a file holds, and in words where in it that was found, "" for all of it.

    It may stand among other things, below a key such as `state_dict`, and its names may have the prefixes of wrappers.

    Raises:
        InputError: no published backbone, or more than one, was recognised; the message says what is there.
    """
    found: dict[str, dict[str, Tensor]] = {}
    reasons: list[str] = []
    for place, weights in _state_dicts(content):
        try:
            if is_ir_layout(weights):
                weights, place = from_ir_layout(weights), f"{place} with the names of an ir network".strip()
            recognise(weights)
            found[place] = weights
        except InputError as error:
            reasons.append(str(error))
    if len(found) > 1:
        raise InputError(f"it holds several backbones ({', '.join(found)}): save one of them alone")
    if not found:
        almost = [reason for reason in reasons if not reason.startswith("its keys")]
        seen = ", ".join(f"{key} ({_kind(value)})" for key, value in list(content.items())[:6]) or "nothing"
        raise InputError(*almost[:1] or [f"it holds {seen}, and no state_dict of an IResNet, ViT or MobileFaceNet"])
    [(place, weights)] = found.items()
    return weights, place


def _state_dicts(
    content: Mapping[str, Any], place: str = "", depth: int = 0
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Everything in nested mappings that may be a state_dict, and where it is: "state_dict" "model."."""
    if tensors := {key: value for key, value in content.items() if isinstance(value, Tensor)}:
        yield place, tensors
    if depth == _MAX_DEPTH:
        return
    for prefix in _PREFIXES:
        if below := {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}:
            yield from _state_dicts(below, f"{place} {prefix}*".strip(), depth + 1)
    for key, value in content.items():
        if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
            yield from _state_dicts(value, f"{place} {key}".strip(), depth + 1)


def _kind(value: Any) -> str:
    is_group = isinstance(value, Mapping) and value
    return f"{len(value)} entries such as {next(iter(value))}" if is_group else type(value).__name__


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
