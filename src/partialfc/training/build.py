"""Build the parts of a run from its configuration: data, networks, optimizers."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from partialfc.config.build import build_backbone, build_head, build_optimizers
from partialfc.config.options import TrainConfig
from partialfc.config.sample_rate import rate_phases
from partialfc.core.device import compute_dtype
from partialfc.core.errors import InputError
from partialfc.data.images import UnreadableImage
from partialfc.data.loader import Loader
from partialfc.data.sources import open_source
from partialfc.data.sources.base import Source, is_procedural, mapping_of, order_digest, reading_notes
from partialfc.data.sources.subset import SubsetSource
from partialfc.distributed.collectives import rank_of, world_size_of
from partialfc.model.config import UNKNOWN_DATA, ModelConfig, read_config, training_phrase
from partialfc.model.files import find_model
from partialfc.training.nonfinite import LossScale
from partialfc.training.replicas import shard_over_processes
from partialfc.training.state import TrainState
from partialfc.training.weights import freeze, set_frozen_layers_eval

_SAMPLES = 256
_FEW_IDENTITIES = 50
_FEW_CLASSES = 5_000  # docs/studies/rates.md: of 3,000 faces a tenth learns less
_COUNTED = 100_000


def open_loader(config: TrainConfig) -> Loader:
    """The training data; the loader reads this rank's share of every batch.

    Raises:
        InputError: they cannot be read, or show a single identity.
    """
    data = config.data
    source: Source = open_source(data.path, num_classes=data.num_classes, overlay=data.overlay)
    if data.min_images:
        source = SubsetSource(source, data.min_images)
    if _classes_with_images(source) < 2:
        raise InputError(
            f"{source.path} shows one identity, and a training needs at least two: give the folder that holds all "
            "identity folders, or correct the labels."
        )
    return Loader(
        source,
        global_batch_size=data.global_batch_size,
        micro_batch_size=data.micro_batch_size,
        seed=config.seed,
        rank=rank_of(),
        world_size=world_size_of(),
        workers=data.workers,
        max_unreadable=data.max_unreadable,
        color_order=data.color_order,
        micro_steps=config.micro_steps(),
    )


def data_signature(loader: Loader) -> dict[str, int | str | None]:
    """What must be the same on all ranks, and when a run is resumed."""
    return {
        "images": len(loader),
        "classes": loader.num_classes,
        "image_size": loader.image_size,
        "overlay_or_mixture": mapping_of(loader.source),
        "names_of_identities": hashlib.sha256(json.dumps(loader.source.identities).encode()).hexdigest()[:16],
        "order_of_the_samples": f"{loader.source.format} {order_digest(loader.source)}",
    }


def data_facts(loader: Loader) -> dict[str, Any]:
    """What a checkpoint knows of the data: the signature, and `samples`, by which a resumed run knows moved images.

    They are label and digest of 256 images that are spread evenly over the set. An unreadable one is left out, so that
    new damage does not end a run.
    """
    found: list[list[int | str]] = []
    for index in np.unique(np.linspace(0, len(loader) - 1, _SAMPLES, dtype=np.int64)).tolist():
        with contextlib.suppress(UnreadableImage):
            sample = loader.source.read(index)
            found.append([sample.label, hashlib.sha256(sample.encoded).hexdigest()[:16]])
    return {**data_signature(loader), "samples": found}


def remarks(loader: Loader, config: TrainConfig) -> list[str]:
    """What the user should know of the data before a training, a sentence each."""
    source, classes = loader.source, loader.num_classes
    sentences = reading_notes(source)
    if classes < _FEW_IDENTITIES and not (config.backbone.init or config.head.from_run):
        sentences.append(
            f"{source.path} has only {classes} identities, from which a network learns little about other people: "
            f"train a model further with partialfc finetune MODEL {source.path}"
        )
    elif classes < _FEW_CLASSES and (rate := rate_phases(config.head.sample_rate)[-1][1]) < 1:
        sentences.append(f"a step uses {rate:g} of only {classes:,} classes: with so few, --sample-rate 1 learns more")
    if empty := classes - _classes_with_images(source):
        sentences.append(
            f"{empty:,} of the {classes:,} classes of {source.path} {'has' if empty == 1 else 'have'} no image but "
            "centers in the head: --data.min-images 1 numbers the others without gaps"
        )
    return sentences


def _classes_with_images(source: Source) -> int:
    """Their number; of large sets, whose labels take long to read, only if the classes are many for their images."""
    if len(source) > _COUNTED and 2 * source.num_classes <= len(source):
        return source.num_classes
    return len(np.setdiff1d(source.labels(), [-1]))


def check_config(config: TrainConfig) -> None:
    """Check a configuration before any data is opened.

    Backbone and head refuse their own options as they are built: here on the meta device, and for a single class.

    Raises:
        InputError: for values that no run can have, naming the key.
    """
    config.check()
    if not config.data.path:
        raise InputError("data.path is missing: give the training images, as in `partialfc train DATA`.")
    freeze(build_backbone(config, 112, device=torch.device("meta")), config.backbone.freeze)
    build_head(config, 1, device=torch.device("cpu"))


def build_state(config: TrainConfig, loader: Loader, device: torch.device) -> TrainState:
    """Networks and optimizers at step 0: functions of the configuration, the data's classes and its image size."""
    backbone = build_backbone(config, loader.image_size, device=device)
    freeze(backbone, config.backbone.freeze)
    head = build_head(config, loader.num_classes, device=device)
    average = copy.deepcopy(backbone).eval().requires_grad_(False) if config.optimizer.ema_decay else None
    skeleton = None
    if config.processes.backbone == "fsdp" and world_size_of() > 1:
        skeleton = build_backbone(config, loader.image_size, device=torch.device("meta"))
        for network in (backbone, average):
            if network is not None:
                shard_over_processes(network, device, getattr(torch, config.processes.gradients))
    optimizers = build_optimizers(config, backbone, head)
    scaled = compute_dtype(config.precision, device) == torch.float16
    return TrainState(
        backbone,
        head,
        *optimizers,
        data_facts(loader),
        identities=loader.source.identities,
        loss_scale=LossScale() if scaled else None,
        average=average,
        skeleton=skeleton,
    )


def check_batch(config: TrainConfig, loader: Loader) -> None:
    """Check that every process has enough images of each micro-batch for the network's batch statistics.

    Raises:
        InputError: on all ranks alike, if one has not, or if the network does not take its options or the image size.
    """
    network = build_backbone(config, loader.image_size, device=torch.device("meta")).train()
    set_frozen_layers_eval(network, config.backbone.freeze)
    fewest = min(count for number in range(loader.micro_steps) for count in loader.counts(number))
    # A single value a channel has no variance; BatchNorm2d has many values of one image.
    if fewest < 2 and any(isinstance(layer, nn.BatchNorm1d) and layer.training for layer in network.modules()):
        raise InputError(
            f"data.global_batch_size {config.data.global_batch_size} in {loader.micro_steps} micro-steps on "
            f"{world_size_of()} processes leaves one of them {fewest} images at a time, but BatchNorm needs 2: take a "
            "larger batch, fewer micro-steps or processes, or backbone.sync_batch_norm true."
        )


def model_config_of(config: TrainConfig, loader: Loader) -> ModelConfig:
    """The configuration of the model that this run trains, which has seen what its first weights have, and the data."""
    source, seen = loader.source, []
    for path in (config.head.from_run, config.backbone.init):  # the weights are those of the last one
        if path is not None:
            seen = [UNKNOWN_DATA]
            with contextlib.suppress(InputError):  # a file of weights, or a folder that has moved since
                seen = list(read_config(find_model(Path(path))).trained_on) or seen
    facts = (Path(config.data.path or source.path).resolve().name, loader.num_classes, len(source))
    seen.append(training_phrase(*facts, procedural=is_procedural(source)))
    name, width, flip = config.backbone.name, config.backbone.embedding_dim, config.data.flip
    return ModelConfig(name, width, loader.image_size, flip=flip, trained_on=tuple(seen))
