"""What a new run takes over from earlier ones: the weights of a model, and the centers of a trained head."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from partialfc.checkpoint.format import DamagedCheckpoint
from partialfc.checkpoint.read import Checkpoint, folder_name, load_latest, steps_in
from partialfc.config.options import TrainConfig
from partialfc.core.errors import InputError
from partialfc.core.files import write_file
from partialfc.data.images import UnreadableImage
from partialfc.data.loader import Loader
from partialfc.data.sources.base import Source, read_image
from partialfc.distributed.collectives import Shard, all_reduce, rank_of, world_size_of
from partialfc.model.config import ModelConfig
from partialfc.model.embed import embed
from partialfc.model.files import Model, load_model
from partialfc.training.build import data_facts, model_config_of
from partialfc.training.replicas import load_weights, whole_network
from partialfc.training.state import TrainState, check_data_matches

IDENTITIES_NAME = "identities.json"
_IMAGES_PER_CLASS = 10
_CLASSES_AT_ONCE = 16384
_IMAGES_AT_ONCE = 256


def is_resumable(root: Path, loader: Loader) -> bool:
    """Whether the run folder has a checkpoint to resume from.

    Raises:
        InputError: its newest whole one belongs to other data.
    """
    checkpoints = root / "checkpoints"
    steps = steps_in(checkpoints)
    for step in reversed(steps):
        with contextlib.suppress(DamagedCheckpoint):
            checkpoint = Checkpoint(checkpoints / folder_name(step))
            check_data_matches(checkpoint, data_facts(loader), loader.source.identities)
            break
    return bool(steps)


def initialize(state: TrainState, config: TrainConfig, loader: Loader) -> Tensor | None:
    """Put what `backbone.init` and `head.from_run` name into the state of step 0. Two collectives for the latter.

    Returns:
        int64 (C,), for each class its number in the run whose head is continued, -1 for a new one, which has its random
        center still; None for random weights.

    Raises:
        InputError: there is no such model or run, or it does not fit the configuration; the message says in what.
    """
    weights, old_classes = None, None
    if config.head.from_run is not None:
        weights, old_classes, old_centers = _read_run(Path(config.head.from_run), config, loader)
        shard, centers = state.head.shard, state.head.centers
        known = (old_classes[shard.start : shard.stop] >= 0).nonzero()[:, 0]
        with torch.no_grad():
            centers[known.to(centers.device)] = old_centers.to(centers)
    if config.backbone.init is not None:
        weights = _read_model(config.backbone.init, config, loader)
        if old_classes is None:
            old_classes = torch.full((loader.num_classes,), -1)
    for network in (state.backbone, state.average):
        if weights is not None and network is not None:
            load_weights(network, weights)
    return old_classes


def _read_model(path: str, config: TrainConfig, loader: Loader) -> Mapping[str, Tensor]:
    model = load_model(path)
    _check_fit(
        path,
        ("backbone", model.config.backbone, config.backbone.name),
        ("embedding_dim", model.config.embedding_dim, config.backbone.embedding_dim),
        ("image_size", model.config.image_size, loader.image_size),
    )
    check_trains_on_its_images(path, model.config)
    return model.backbone.state_dict()


def check_trains_on_its_images(path: str | Path, model: ModelConfig) -> None:
    """InputError if the model at `path` expects channels or values other than those that training gives."""
    _check_fit(path, ("color_order", model.color_order, "rgb"), ("mean", model.mean, 0.5), ("std", model.std, 0.5))


def _check_fit(path: str | Path, *properties: tuple[str, object, object]) -> None:
    for name, theirs, ours in properties:
        if theirs != ours:
            raise InputError(f"{path} has {name} {theirs}, but this run has {ours}: choose a model that fits.")


def _read_run(root: Path, config: TrainConfig, loader: Loader) -> tuple[Mapping[str, Tensor], Tensor, Tensor]:
    """The weights of a run's backbone, the old number of each class, and this rank's old centers."""

    def read(checkpoint: Checkpoint) -> tuple[Mapping[str, Tensor], Tensor, Tensor]:
        old_backbone, old_data = checkpoint.state["config"]["backbone"], checkpoint.state["data"]
        num_classes, width = checkpoint.row_shapes["centers"]
        _check_fit(
            root,
            ("backbone", old_backbone["name"], config.backbone.name),
            ("embedding_dim", width, config.backbone.embedding_dim),
            ("image_size", old_data["image_size"], loader.image_size),
            ("centers", num_classes, old_data["classes"]),
        )
        names = checkpoint.document("identities")
        old_classes = match_identities(names, num_classes, loader.source.identities, loader.num_classes)
        if not bool((old_classes >= 0).any()):
            raise InputError(f"None of the identities of {loader.source.path} is in {root}: leave out head.from_run.")
        shard = Shard.of(loader.num_classes)
        centers = _read_centers(checkpoint, old_classes[shard.start : shard.stop])
        return checkpoint.tensors("backbone"), old_classes, centers

    result = load_latest(root / "checkpoints", read)
    if result is None:
        raise InputError(f"{root} has no checkpoint, and head.from_run takes the centers from one: give a run folder.")
    return result


def _read_centers(checkpoint: Checkpoint, old_classes: Tensor) -> Tensor:
    """The centers of those of `old_classes` that are not new, in their order, read in runs of adjacent rows."""
    known = old_classes[old_classes >= 0]
    dtype = checkpoint.row_dtypes["centers"]
    centers = torch.empty(len(known), checkpoint.row_shapes["centers"][1], dtype=dtype)
    bounds = [0, *((known.diff() != 1).nonzero()[:, 0] + 1).tolist(), len(known)] if len(known) else []
    for first, last in itertools.pairwise(bounds):
        checkpoint.read_rows("centers", int(known[first]), centers[first:last])
    return centers


# -- identities ------------------------------------------------------------------------------------------------------


def match_identities(
    old_names: list[str] | None, old_classes: int, new_names: list[str] | None, new_classes: int
) -> Tensor:
    """For each new class its old one, -1 if it is new: int64 (new_classes,).

    By name where both have names, else by number. Names that are plain numbers, as `data.min_images` gives to the
    classes of a set without names, also match the numbers of a side without names.
    """
    if old_names is None and _are_numbers(new_names):
        old_names = [str(number) for number in range(old_classes)]
    if new_names is None and _are_numbers(old_names):
        new_names = [str(number) for number in range(new_classes)]
    if old_names is None or new_names is None:
        numbers = torch.arange(new_classes)
        return torch.where(numbers < old_classes, numbers, -1)
    old_numbers = {name: number for number, name in enumerate(old_names[:old_classes])}
    result = torch.full((new_classes,), -1, dtype=torch.int64)
    matches = [old_numbers.get(name, -1) for name in new_names[:new_classes]]
    result[: len(matches)] = torch.tensor(matches, dtype=torch.int64)
    return result


def _are_numbers(names: list[str] | None) -> bool:
    return names is not None and all(name.isdecimal() and str(int(name)) == name for name in names)


def write_identities(folder: Path, identities: list[str] | None) -> None:
    """Write the names, in the order of the classes, beside a model; without names, remove an old file."""
    path = folder / IDENTITIES_NAME
    if identities is None:
        path.unlink(missing_ok=True)
    else:
        write_file(path, json.dumps({"schema_version": 1, "identities": identities}, indent=0, ensure_ascii=False))


# -- centers of new identities ---------------------------------------------------------------------------------------


@torch.no_grad()
def fill_with_class_means(state: TrainState, old_classes: Tensor, config: TrainConfig, loader: Loader) -> None:
    """Give each new class the mean of its unit embeddings, at the mean length of the old centers, or of random ones.

    At most the first 10 images of an identity are read. One without readable images keeps its random center. The ranks
    share the images: one collective for every 16,384 new classes, and one for the length.

    Args:
        old_classes: int64 (C,), -1 for new classes.
    """
    shard, centers = state.head.shard, state.head.centers
    new = (old_classes < 0).nonzero()[:, 0]
    if not len(new):
        return
    measured = old_classes >= 0 if len(new) < len(old_classes) else old_classes < 0
    measured = measured[shard.start : shard.stop].to(centers.device)
    lengths = centers[measured].double().norm(dim=1)
    total = all_reduce(torch.stack([lengths.sum(), measured.sum().double()]), group=shard.group)
    backbone = whole_network(state.backbone, state.skeleton)
    model = Model(backbone, model_config_of(config, loader))
    labels = loader.source.labels()
    for classes in new.split(_CLASSES_AT_ONCE):
        sums = _embedding_sums(model, loader.source, labels, classes, is_bgr=config.data.color_order == "bgr")
        all_reduce(sums, group=shard.group)
        means = F.normalize(sums, dim=1) * (total[0] / total[1])
        own = (classes >= shard.start) & (classes < shard.stop) & (sums.cpu() != 0).any(dim=1)
        centers[(classes[own] - shard.start).to(centers.device)] = means[own.to(means.device)].to(centers.dtype)


def _embedding_sums(model: Model, source: Source, labels: np.ndarray, classes: Tensor, *, is_bgr: bool) -> Tensor:
    """Sums of the unit embeddings of this rank's part of the images: float64 (classes, D)."""
    sums = torch.zeros(len(classes), model.config.embedding_dim, dtype=torch.float64, device=model.device)
    indices = _first_images(labels, classes.numpy())[rank_of() :: world_size_of()]
    for start in range(0, len(indices), _IMAGES_AT_ONCE):
        images, rows = [], []
        for index in indices[start : start + _IMAGES_AT_ONCE].tolist():
            with contextlib.suppress(UnreadableImage):
                image = read_image(source, index)[1]
                images.append(image[..., ::-1] if is_bgr else image)
                rows.append(int(np.searchsorted(classes.numpy(), labels[index])))
        if images:
            embeddings = F.normalize(embed(model, np.stack(images)).double(), dim=1)
            sums.index_add_(0, torch.tensor(rows, device=model.device), embeddings)
    return sums


def _first_images(labels: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Indices of the first images of each of `classes` (sorted), grouped by class."""
    order = np.argsort(labels, kind="stable")
    starts, stops = (np.searchsorted(labels, classes, side, sorter=order) for side in ("left", "right"))
    bounds = zip(starts, np.minimum(stops, starts + _IMAGES_PER_CLASS), strict=True)
    return np.concatenate([order[start:stop] for start, stop in bounds])
