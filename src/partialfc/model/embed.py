"""Images to embeddings."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import torch
from torch import Tensor

from partialfc.core.errors import InputError
from partialfc.data.augment import normalise
from partialfc.distributed.activity import report_progress
from partialfc.model.config import ModelConfig
from partialfc.model.files import Model


def embed(model: Model, images: np.ndarray | Tensor, *, flip: bool = True, batch_size: int = 256) -> Tensor:
    """Embeddings f(x) + f(flipped x) of aligned images, as the LFW and IJB protocols take them.

    Args:
        model: its backbone runs in evaluation mode; afterwards each of its layers is in the mode it was in.
        images: uint8 (N, S, S, 3) RGB, with S the model's `image_size`.
        flip: add the embedding of the mirrored image.
        batch_size: images in one pass.

    Returns:
        float32 (N, D), not normalised, on the model's device.

    Raises:
        InputError: the images are of another size than the model's.
    """
    result = torch.empty(len(images), model.config.embedding_dim, device=model.device)
    for number, embeddings in enumerate(embed_batches(model, images, flip=flip, batch_size=batch_size)):
        result[number * batch_size : (number + 1) * batch_size] = embeddings
    return result


def embed_batches(
    model: Model, images: np.ndarray | Tensor, *, flip: bool = True, batch_size: int = 256
) -> Generator[Tensor, None, None]:
    """The same embeddings, (B, D) a batch. The backbone is in evaluation mode until the iterator ends or is closed."""
    check_images(images, model.config)
    modes = {module: module.training for module in model.backbone.modules()}
    dtype = next((parameter.dtype for parameter in model.backbone.parameters()), torch.float32)
    model.backbone.eval()
    try:
        for start in range(0, len(images), batch_size):
            embeddings = _embed_batch(model, images[start : start + batch_size], dtype, flip)
            report_progress()
            yield embeddings
    finally:
        for module, training in modes.items():
            module.training = training


@torch.inference_mode()
def _embed_batch(model: Model, images: np.ndarray | Tensor, dtype: torch.dtype, flip: bool) -> Tensor:
    pixels = images if isinstance(images, Tensor) else torch.from_numpy(np.array(images))
    inputs = prepare(pixels.to(model.device), model.config).to(dtype)
    embeddings: Tensor = model.backbone(inputs)
    if flip:
        embeddings = embeddings + model.backbone(inputs.flip(3))
    return embeddings.float()


def check_images(images: np.ndarray | Tensor, config: ModelConfig) -> None:
    """Raise an InputError unless `images` are (N, S, S, 3) with S the `image_size` of `config`."""
    size = config.image_size
    if images.ndim != 4 or tuple(images.shape[1:]) != (size, size, 3):
        size_found = " × ".join(str(length) for length in images.shape[1:3])
        raise InputError(
            f"The images are {size_found} pixels but the model takes {size} × {size}: "
            f"align them to {size} × {size}, or use a model trained at their size."
        )


def prepare(images: Tensor, config: ModelConfig) -> Tensor:
    """Normalise images as the backbone's training did: uint8 (B, S, S, 3) RGB to float32 (B, 3, S, S)."""
    prepared = normalise(images)
    if config.color_order == "bgr":
        prepared = prepared.flip(1)
    if (config.mean, config.std) != (0.5, 0.5):  # normalise gives (x - 0.5) / 0.5
        prepared = (prepared * 0.5 + (0.5 - config.mean)) / config.std
    return prepared
