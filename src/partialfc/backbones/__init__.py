"""Backbones: networks from aligned face images to embeddings, by name.

Each takes images (B, 3, S, S), normalised to [-1, 1], and optionally `keys`, int64 (B,), one random number per sample
that seeds its random parts; each returns embeddings (B, embedding_dim), not normalised. One file per family, on top of
`layers`; `sync_batch_norm` replaces the normalisation of any of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from partialfc.backbones import iresnet, mini, mobilefacenet, timm_adapter, vit
from partialfc.core.errors import InputError, did_you_mean
from partialfc.core.keyed_random import derive_key

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    **{name: partial(iresnet.IResNet, blocks) for name, blocks in iresnet.BLOCKS.items()},
    **{name: partial(mobilefacenet.MobileFaceNet, size) for name, size in mobilefacenet.BLOCKS_AND_SCALE.items()},
    **{name: partial(vit.ViT, size) for name, size in vit.WIDTHS_AND_DEPTHS.items()},
    "mini": mini.Mini,
}


def check_backbone(name: str) -> None:
    """Raise an InputError that lists the choices and offers the nearest, unless `name` is a backbone."""
    if name in BACKBONES or name.startswith(timm_adapter.PREFIX):
        return
    hint = did_you_mean(name, BACKBONES)
    raise InputError(f"There is no backbone {name!r}: choose one of {', '.join(BACKBONES)}.{hint}")


def create_backbone(
    name: str, *, embedding_dim: int = 512, image_size: int = 112, seed: int = 0, **options: Any
) -> nn.Module:
    """A backbone with fresh weights, in training mode.

    Args:
        name: a key of BACKBONES, or `timm:` and the name of one of timm's networks.
        embedding_dim: D, the width of the output.
        image_size: S, the side of the square input.
        seed: the weights are a pure function of it; the global generator is left unchanged.
        options: further options of this backbone, for instance `dropout=0.4` for an IResNet.

    Raises:
        InputError: unknown name, unknown option, or a value that this backbone does not accept.
    """
    check_backbone(name)
    if name.startswith(timm_adapter.PREFIX):
        builder: Callable[..., nn.Module] = partial(timm_adapter.TimmBackbone, name.removeprefix(timm_adapter.PREFIX))
    else:
        builder = BACKBONES[name]
        accepted = [key for key in inspect.signature(builder).parameters if key not in ("embedding_dim", "image_size")]
        for option in options:
            if option not in accepted:
                choices = f"its options are {', '.join(accepted)}" if accepted else "it has no options of its own"
                raise InputError(f"Backbone {name} does not take the option {option!r}: {choices}.")
    if embedding_dim < 1:
        raise InputError(f"embedding_dim {embedding_dim} is not a width: choose a positive number.")
    # torch's layers draw initial weights from the global generator, whose state is restored afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_key(seed, "backbone", name))
        return builder(embedding_dim=embedding_dim, image_size=image_size, **options)
