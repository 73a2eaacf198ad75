"""Backbones of timm by name, as `timm:NAME`; timm is an extra, imported when such a backbone is created."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn

from partialfc.core.errors import InputError

PREFIX = "timm:"


class TimmBackbone(nn.Module):
    """The network `name` of timm with fresh weights and a linear layer to `embedding_dim`, for timm's own image size.

    Raises:
        InputError: timm is missing, or does not know `name` or one of the options.
    """

    def __init__(self, name: str, *, embedding_dim: int = 512, image_size: int = 112, **options: Any) -> None:
        super().__init__()
        try:
            timm = importlib.import_module("timm")
        except ImportError as error:
            raise InputError(
                f"Backbone {PREFIX}{name} needs timm ({error}): install timm and its torchvision."
            ) from error
        try:
            self.network = timm.create_model(name, pretrained=False, num_classes=embedding_dim, **options)
        except (RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"timm cannot make the backbone {name!r}: {error}.") from error

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Embeddings (B, D) of images (B, 3, S, S); `keys` are ignored: timm draws from torch's generator."""
        embeddings: Tensor = self.network(images)
        return embeddings
