"""Images to embeddings."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from partialfc.core.errors import InputError
from partialfc.data.augment import normalise
from partialfc.distributed.activity import report_progress
from partialfc.model.config import ModelConfig
from partialfc.model.files import Model


def embed(
    model: Model,
    images: np.ndarray | Tensor,
    *,
    flip: bool = True,
    batch_size: int = 256,
    between: Callable[[], None] | None = None,
) -> Tensor:
    """Embeddings f(x) + f(flipped x) of aligned images, as the LFW and IJB protocols take them.

    Args:
        model: its backbone is run in evaluation mode, and every part of it put back into the mode it was in.
        images: uint8 (N, S, S, 3) RGB, with S the model's `image_size`.
        flip: add the embedding of the mirrored image.
        batch_size: images in one pass.
        between: called after each pass; what it raises ends the work.

    Returns:
        float32 (N, D), not normalised, on the model's device.

    Raises:
        InputError: the images are of another size than the model's.
    """
    check_images(images, model.config)
    result = torch.empty(len(images), model.config.embedding_dim, device=model.device)
    modes = {module: module.training for module in model.backbone.modules()}
    dtype = next((each.dtype for each in model.backbone.parameters()), torch.float32)
    model.backbone.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(images), batch_size):
                chosen = images[start : start + batch_size]
                pixels = chosen if isinstance(chosen, Tensor) else torch.from_numpy(np.array(chosen))
                batch = prepare(pixels.to(model.device), model.config).to(dtype)
                embeddings = model.backbone(batch)
                if flip:
                    embeddings = embeddings + model.backbone(batch.flip(3))
                result[start : start + batch_size] = embeddings
                report_progress()
                if between is not None:
                    between()
    finally:
        for module, training in modes.items():
            module.training = training
    return result


def check_images(images: np.ndarray | Tensor, config: ModelConfig) -> None:
    """Raise an InputError unless `images` are (N, S, S, 3) with S the `image_size` of `config`."""
    size = config.image_size
    if images.ndim != 4 or tuple(images.shape[1:]) != (size, size, 3):
        found = " × ".join(str(length) for length in images.shape[1:3])
        raise InputError(
            f"The images are {found} pixels but the model takes {size} × {size}: "
            f"align them to {size} × {size}, or use a model trained at their size."
        )


def prepare(images: Tensor, config: ModelConfig) -> Tensor:
    """uint8 (B, S, S, 3) RGB to what the backbone was trained on: float32 (B, 3, S, S)."""
    prepared = normalise(images)
    if config.color_order == "bgr":
        prepared = prepared.flip(1)
    if (config.mean, config.std) != (0.5, 0.5):  # normalise gives (x - 0.5) / 0.5
        prepared = (prepared * 0.5 + (0.5 - config.mean)) / config.std
    return prepared
