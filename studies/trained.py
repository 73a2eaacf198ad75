"""What a finished run holds: its checkpoints, its centers, and how its training images stand to them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from sets import Prepared, Values
from torch import Tensor

from partialfc.checkpoint.read import Checkpoint, steps_in
from partialfc.data.images import decode_image
from partialfc.model.embed import embed
from partialfc.model.files import load_model


@dataclass(frozen=True)
class Trained:
    """
    Attributes:
        centers: (C, D), of length 1.
        images: (C,), training images of each class.
        passive: (C,), the steps so far that changed a center without an image of its class.
        labels: (n,), of training images spread evenly over the set.
        embeddings: (n, D), theirs, of length 1.
    """

    centers: Tensor
    images: np.ndarray
    passive: np.ndarray
    labels: np.ndarray
    embeddings: Tensor


def centers(run: Path) -> Tensor:
    """The centers of a finished run, (C, D), of length 1."""
    return _centers(_checkpoint(run, 1.0))


def read(run: Path, prepared: Prepared, damage: Values | None, shown: int, part: float = 1.0) -> Trained:
    """The state of a run after a part of it, and the embeddings of about `shown` of its training images.

    Of the checkpoints that the run has kept, the one closest to that part is taken.
    """
    checkpoint = _checkpoint(run, part)
    found = _centers(checkpoint)
    source = prepared.source(damage)
    every = source.labels()
    chosen = np.flatnonzero(every >= 0)
    chosen = chosen[:: max(1, len(chosen) // shown)]
    images = np.stack([decode_image(source.read(int(index)).encoded) for index in chosen])
    model = load_model(run)
    model.backbone.load_state_dict(checkpoint.tensors("backbone"))
    embeddings = torch.nn.functional.normalize(embed(model, images, flip=False), dim=1)
    images_of = np.bincount(every[every >= 0], minlength=len(found))
    steps = steps_in(run / "checkpoints")
    epochs = yaml.safe_load((run / "config.yaml").read_text())["schedule"]["epochs"] * checkpoint.step / steps[-1]
    passive = checkpoint.rows("step", 0, len(found)).numpy() - epochs * images_of
    return Trained(found, images_of, passive, every[chosen], embeddings)


def _checkpoint(run: Path, part: float) -> Checkpoint:
    root = run / "checkpoints"
    steps = steps_in(root)
    step = min(steps, key=lambda step: abs(step - part * steps[-1]))
    return Checkpoint(root / f"step-{step:08d}")


def _centers(checkpoint: Checkpoint) -> Tensor:
    classes = checkpoint.row_shapes["centers"][0]
    return torch.nn.functional.normalize(checkpoint.rows("centers", 0, classes).float(), dim=1)
