"""Build the parts of a run from its configuration: data, networks, optimizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from partialfc.backbones import create_backbone
from partialfc.backbones.sync_batch_norm import synchronise_batch_norm
from partialfc.config.options import TrainConfig
from partialfc.core.device import compute_dtype
from partialfc.core.errors import InputError
from partialfc.data.loader import Loader
from partialfc.data.sources import open_source
from partialfc.data.sources.subset import SubsetSource
from partialfc.distributed.collectives import rank_of, world_size_of
from partialfc.head.optim import RowwiseAdamW, RowwiseSGD
from partialfc.head.partial_fc import PartialFC
from partialfc.training.nonfinite import LossScale
from partialfc.training.replicas import shard_over_processes
from partialfc.training.state import TrainState
from partialfc.training.weights import averaged_copy, freeze, set_frozen_layers_eval


def open_loader(config: TrainConfig) -> Loader:
    """The training data; the loader reads this rank's share of every batch."""
    data = config.data
    source = open_source(data.path, num_classes=data.num_classes)
    return Loader(
        SubsetSource(source, data.min_images) if data.min_images else source,
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


def data_signature(loader: Loader) -> dict[str, int]:
    """What must be the same on all ranks, and when a run is resumed."""
    return {"images": len(loader), "classes": loader.num_classes, "image_size": loader.image_size}


def build_state(config: TrainConfig, loader: Loader, device: torch.device) -> TrainState:
    """Networks and optimizers at step 0: functions of the configuration, the data's classes and its image size."""
    backbone = build_backbone(config, loader.image_size, device=device)
    freeze(backbone, config.backbone.freeze)
    for parameter in backbone.parameters():
        if parameter.ndim == 4 and config.backbone.channels_last:
            # contiguous() leaves the strides of a 1 × 1 kernel as they are, and DDP then copies its gradients.
            values = torch.empty_like(parameter.data, memory_format=torch.channels_last)
            parameter.data = values.copy_(parameter.data)
    head = PartialFC(
        loader.num_classes,
        config.backbone.embedding_dim,
        config.head.sample_rate,
        config.head.build_margin(),
        config.head.scale,
        config.head.conflict_threshold,
        conflict_as_zero_logit=config.head.conflict_as_zero_logit,
        update=config.head.update,
        operand_dtype=getattr(torch, config.head.operand_dtype),
        seed=config.seed,
        device=device,
        dtype=torch.float64 if config.precision == "float64" else getattr(torch, config.head.dtype),
    )
    average = averaged_copy(backbone) if config.optimizer.ema_decay else None
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
        data_signature(loader),
        identities=loader.source.identities,
        loss_scale=LossScale() if scaled else None,
        average=average,
        skeleton=skeleton,
    )


def build_backbone(config: TrainConfig, image_size: int, *, device: torch.device) -> nn.Module:
    """The network of the configuration with fresh weights; InputError for an option that it does not take."""
    chosen = config.backbone
    with torch.device("meta" if device.type == "meta" else "cpu"):  # weights are drawn on the CPU everywhere
        backbone = create_backbone(
            chosen.name,
            embedding_dim=chosen.embedding_dim,
            image_size=image_size,
            seed=config.seed,
            **chosen.options(),
        )
    if chosen.sync_batch_norm:
        synchronise_batch_norm(backbone)
    return backbone.to(device, torch.float64 if config.precision == "float64" else None)


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


def build_optimizers(
    config: TrainConfig, backbone: nn.Module, head: PartialFC
) -> tuple[torch.optim.Optimizer, RowwiseSGD | RowwiseAdamW]:
    """The same rule for backbone and head, row-wise for the head."""
    parameters = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    chosen, kept = config.optimizer, config.head
    fused = chosen.fused or None  # None leaves the choice to PyTorch
    state_dtype = None if kept.state_dtype is None else getattr(torch, kept.state_dtype)
    storage: dict[str, Any] = {"state_dtype": state_dtype, "state_on_host": kept.state_on_host}
    rates: dict[str, Any] = {"lr": chosen.lr, "weight_decay": chosen.weight_decay}
    if chosen.name == "adamw":
        dense = torch.optim.AdamW(parameters, **rates, fused=fused)
        return dense, RowwiseAdamW(head.parameters(), **rates, **storage)
    return (
        torch.optim.SGD(parameters, **rates, momentum=chosen.momentum, fused=fused),
        RowwiseSGD(head.parameters(), **rates, momentum=chosen.momentum, unsampled=kept.unsampled, **storage),
    )
