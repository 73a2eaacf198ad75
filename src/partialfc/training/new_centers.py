"""Centers for identities that a trained head has not seen: the mean direction of their embeddings."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from partialfc.config.options import TrainConfig
from partialfc.data.images import UnreadableImage
from partialfc.data.sources.base import Source, read_image
from partialfc.distributed.collectives import all_reduce, rank_of, world_size_of
from partialfc.model.config import ModelConfig
from partialfc.model.embed import embed
from partialfc.model.files import Model
from partialfc.training.replicas import whole_network
from partialfc.training.state import TrainState

_IMAGES_PER_CLASS = 10
_CLASSES_AT_ONCE = 16384
_IMAGES_AT_ONCE = 256


@torch.no_grad()
def fill_with_class_means(
    state: TrainState, old_classes: Tensor, source: Source, image_size: int, config: TrainConfig
) -> None:
    """Give each new class the mean of its unit embeddings, at the mean length of the old centers.

    Of an identity at most its first 10 images are read. One that has none keeps its random center. The ranks share the
    images: one collective for every 16,384 new classes, and one for the length.

    Args:
        old_classes: int64 (C,), -1 for new classes.
    """
    shard, centers = state.head.shard, state.head.centers
    new = (old_classes < 0).nonzero()[:, 0]
    if not len(new):
        return
    own_old = (old_classes[shard.start : shard.stop] >= 0).to(centers.device)
    lengths = centers[own_old].double().norm(dim=1)
    total = all_reduce(torch.stack([lengths.sum(), own_old.sum().double()]), group=shard.group)
    backbone = whole_network(state.backbone, state.skeleton)
    model = Model(backbone, ModelConfig(config.backbone.name, config.backbone.embedding_dim, image_size))
    labels = source.labels()
    for classes in new.split(_CLASSES_AT_ONCE):
        sums = _embedding_sums(model, source, labels, classes, reverse=config.data.color_order == "bgr")
        all_reduce(sums, group=shard.group)
        means = F.normalize(sums, dim=1) * (total[0] / total[1])
        mine = (classes >= shard.start) & (classes < shard.stop) & (sums.cpu() != 0).any(dim=1)
        centers[(classes[mine] - shard.start).to(centers.device)] = means[mine.to(means.device)].to(centers.dtype)


def _embedding_sums(model: Model, source: Source, labels: np.ndarray, classes: Tensor, *, reverse: bool) -> Tensor:
    """Sums of the unit embeddings of this rank's part of the images: float64 (classes, D)."""
    sums = torch.zeros(len(classes), model.config.embedding_dim, dtype=torch.float64, device=model.device)
    indices = _first_images(labels, classes.numpy())[rank_of() :: world_size_of()]
    for start in range(0, len(indices), _IMAGES_AT_ONCE):
        images, rows = [], []
        for index in indices[start : start + _IMAGES_AT_ONCE].tolist():
            try:
                image = read_image(source, index)[1]
            except UnreadableImage:
                continue
            images.append(image[..., ::-1] if reverse else image)
            rows.append(int(np.searchsorted(classes.numpy(), labels[index])))
        if images:
            embeddings = F.normalize(embed(model, np.stack(images)).double(), dim=1)
            sums.index_add_(0, torch.tensor(rows, device=model.device), embeddings)
    return sums


def _first_images(labels: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Indices of the first images of each of `classes` (sorted), grouped by class."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    starts = np.searchsorted(ordered, classes)
    place = np.arange(len(ordered)) - starts[np.minimum(np.searchsorted(classes, ordered), len(classes) - 1)]
    return order[np.isin(ordered, classes) & (place < _IMAGES_PER_CLASS)]
