"""What a new run takes over from earlier ones: the weights of a model, and the centers of a trained head."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from partialfc.config.options import TrainConfig
from partialfc.core.errors import InputError
from partialfc.data.loader import Loader
from partialfc.distributed.collectives import Shard
from partialfc.model.files import load_model
from partialfc.training.build import facts_of
from partialfc.training.checkpoint.format import DamagedCheckpoint
from partialfc.training.checkpoint.read import Checkpoint, folder_name, load_latest, steps_in
from partialfc.training.identities import match_identities
from partialfc.training.new_centers import fill_with_class_means
from partialfc.training.replicas import load_weights
from partialfc.training.state import TrainState, check_facts


@dataclass(frozen=True)
class Start:
    """What is known before step 0.

    Attributes:
        weights: state_dict of the backbone, None for fresh weights.
        old_classes: int64 (C,), for each class its number in the run that the head continues, -1 for a new one; None
            without such a run.
        old_centers: (known classes of this rank, D), in their order.
    """

    weights: Mapping[str, Tensor] | None = None
    old_classes: Tensor | None = None
    old_centers: Tensor | None = None


def read_start(config: TrainConfig, loader: Loader) -> Start:
    """Read what `backbone.init` and `head.from_run` name. Two collectives for the latter.

    Raises:
        InputError: it is not there, or does not fit the configuration; the message says in what.
    """
    start = Start()
    if config.head.from_run is not None:
        start = _read_run(Path(config.head.from_run), config, loader)
    if config.backbone.init is not None:
        start = Start(_read_model(config.backbone.init, config, loader), start.old_classes, start.old_centers)
    return start


def check_resumable(root: Path, loader: Loader) -> bool:
    """Whether the run folder has a checkpoint to go on from.

    Raises:
        InputError: its newest whole one belongs to other data.
    """
    checkpoints = root / "checkpoints"
    steps = steps_in(checkpoints) if checkpoints.is_dir() else []
    for step in reversed(steps):
        with contextlib.suppress(DamagedCheckpoint):
            check_facts(Checkpoint(checkpoints / folder_name(step)), facts_of(loader))
            break
    return bool(steps)


def apply_start(start: Start, state: TrainState, config: TrainConfig, loader: Loader) -> None:
    """Put it into the state of step 0; new centers become class means if asked to. A few collectives for those."""
    if start.weights is not None:
        for network in (state.backbone, state.average):
            if network is not None:
                load_weights(network, start.weights)
    if start.old_classes is None or start.old_centers is None:
        return
    shard = state.head.shard
    known = (start.old_classes[shard.start : shard.stop] >= 0).nonzero()[:, 0]
    with torch.no_grad():
        state.head.centers[known.to(state.head.centers.device)] = start.old_centers.to(state.head.centers)
    if config.head.new_centers == "mean":
        fill_with_class_means(state, start.old_classes, loader.source, loader.image_size, config)


def _read_model(path: str, config: TrainConfig, loader: Loader) -> Mapping[str, Tensor]:
    model = load_model(path)
    _compare(
        path,
        ("backbone", model.config.backbone, config.backbone.name),
        ("embedding_dim", model.config.embedding_dim, config.backbone.embedding_dim),
        ("image_size", model.config.image_size, loader.image_size),
        ("color_order", model.config.color_order, "rgb"),
        ("mean", model.config.mean, 0.5),
        ("std", model.config.std, 0.5),
    )
    return model.backbone.state_dict()


def _compare(path: str | Path, *facts: tuple[str, object, object]) -> None:
    for name, theirs, ours in facts:
        if theirs != ours:
            raise InputError(f"{path} has {name} {theirs}, but this run has {ours}: choose a model that fits.")


def _read_run(root: Path, config: TrainConfig, loader: Loader) -> Start:
    def read(checkpoint: Checkpoint) -> Start:
        saved = checkpoint.state["config"]["backbone"]
        shape = checkpoint.row_shapes["centers"]
        _compare(
            root,
            ("backbone", saved["name"], config.backbone.name),
            ("embedding_dim", shape[1], config.backbone.embedding_dim),
            ("image_size", checkpoint.state["facts"]["image_size"], loader.image_size),
            ("centers", shape[0], checkpoint.state["facts"]["classes"]),
        )
        names = checkpoint.document("identities")
        old_classes = match_identities(names, shape[0], loader.source.identities, loader.num_classes)
        if not bool((old_classes >= 0).any()):
            raise InputError(f"None of the identities of {loader.source.path} is in {root}: leave out head.from_run.")
        shard = Shard.of(loader.num_classes)
        return Start(
            checkpoint.tensors("backbone"),
            old_classes,
            _read_centers(checkpoint, old_classes[shard.start : shard.stop]),
        )

    start = load_latest(root / "checkpoints", read)
    if start is None:
        raise InputError(f"{root} has no checkpoint, and head.from_run takes the centers from one: give a run folder.")
    return start


def _read_centers(checkpoint: Checkpoint, old_classes: Tensor) -> Tensor:
    """The centers of the known among `old_classes`, in their order, read in runs of neighbours."""
    known = old_classes[old_classes >= 0]
    if not len(known):
        return torch.empty(0, checkpoint.row_shapes["centers"][1])
    centers = torch.empty(len(known), checkpoint.row_shapes["centers"][1])
    bounds = [0, *((known.diff() != 1).nonzero()[:, 0] + 1).tolist(), len(known)]
    for first, last in itertools.pairwise(bounds):
        checkpoint.read_rows("centers", int(known[first]), centers[first:last])
    return centers
