"""From a configuration to its backbone, head and optimizers: what a training builds and a plan measures."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from partialfc.backbones import create_backbone
from partialfc.backbones.sync_batch_norm import synchronise_batch_norm
from partialfc.config.options import HeadConfig, TrainConfig
from partialfc.config.sample_rate import rate_phases
from partialfc.core.errors import InputError, did_you_mean
from partialfc.head.margins import MARGINS, Margin
from partialfc.head.optim import RowwiseAdamW, RowwiseSGD
from partialfc.head.partial_fc import PartialFC


def build_backbone(config: TrainConfig, image_size: int, *, device: torch.device) -> nn.Module:
    """The network of the configuration with fresh weights.

    Raises:
        InputError: it does not exist, or does not take an option, a value or images of this size.
    """
    options = config.backbone
    with torch.device("meta" if device.type == "meta" else "cpu"):  # weights are drawn on the CPU everywhere
        backbone = create_backbone(
            options.name,
            embedding_dim=options.embedding_dim,
            image_size=image_size,
            seed=config.seed,
            **options.options(),
        )
    if options.sync_batch_norm:
        synchronise_batch_norm(backbone)
    backbone = backbone.to(device, torch.float64 if config.precision == "float64" else None)
    if options.channels_last and device.type != "meta":
        for parameter in backbone.parameters():
            if parameter.ndim == 4:
                # contiguous() leaves the strides of a 1 × 1 kernel as they are, and DDP then copies its gradients.
                values = torch.empty_like(parameter.data, memory_format=torch.channels_last)
                parameter.data = values.copy_(parameter.data)
    return backbone


def build_margin(head: HeadConfig) -> Margin:
    """The margin of the configuration.

    Raises:
        InputError: it does not have an option, or the option's value is out of range.
    """
    kind, options = MARGINS[head.margin], {}
    known = [option.name for option in fields(kind)]
    given: list[tuple[str, str, Any]] = [("head.margin_options", *_option(text)) for text in head.margin_options]
    given.append(("head.margin_value", "m", head.margin_value))
    if head.margin_gradient != "exact":
        given.append(("head.margin_gradient", "gradient", head.margin_gradient))
    for key, name, value in given:
        if value is None:
            continue
        if name not in known:
            takes = f"its options are {', '.join(known)}" if known else "it has none"
            hint = did_you_mean(name, known)
            raise InputError(f"{key}: the margin {head.margin} has no option {name!r}; {takes}.{hint}")
        if name in options:
            raise InputError(f"{key} gives the margin's {name} a second time: leave one out.")
        options[name] = value
    try:
        return kind(**options)
    except InputError as error:
        raise InputError(f"head.margin {head.margin}: {error}") from error


def _option(text: str) -> tuple[str, int | float | str]:
    """Name and value of "name=value", the value as a number if it is one."""
    name, _, value = text.partition("=")
    if not (name and value):
        raise InputError(f"head.margin_options has {text!r}: write options as name=value, such as h=0.333.")
    for number in (int, float):
        with suppress(ValueError):
            return name, number(value)
    return name, value


def build_head(config: TrainConfig, num_classes: int, *, device: torch.device) -> PartialFC:
    """The head of the configuration.

    Raises:
        InputError: a value is out of range; the sentence names the key.
    """
    head = config.head
    margin = build_margin(head)
    if head.from_run is not None and margin.sub_centers > 1:
        raise InputError("head.from_run takes over one center a class: leave it out, or take another head.margin.")
    try:
        return PartialFC(
            num_classes,
            config.backbone.embedding_dim,
            rate_phases(head.sample_rate)[0][1],
            margin,
            head.scale,
            head.conflict_threshold,
            sampler=head.sampler,
            conflict_as_zero_logit=head.conflict_as_zero_logit,
            update=head.update,
            operand_dtype=getattr(torch, head.operand_dtype),
            seed=config.seed,
            device=device,
            dtype=torch.float64 if config.precision == "float64" else getattr(torch, head.dtype),
        )
    except InputError as error:
        raise InputError(f"head.{error}") from error  # its arguments are our keys


def build_optimizers(
    config: TrainConfig, backbone: nn.Module, head: PartialFC
) -> tuple[torch.optim.Optimizer, RowwiseSGD | RowwiseAdamW]:
    """The same rule for the trained parameters of the backbone and, row-wise, for the head."""
    parameters = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    options = config.optimizer
    fused = options.fused or None  # None leaves the choice to PyTorch
    rates: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay}
    dense: torch.optim.Optimizer
    if options.name == "adamw":
        dense = torch.optim.AdamW(parameters, **rates, fused=fused)
    else:
        dense = torch.optim.SGD(parameters, **rates, momentum=options.momentum, fused=fused)
    return dense, build_head_optimizer(config, head)


def build_head_optimizer(config: TrainConfig, head: PartialFC) -> RowwiseSGD | RowwiseAdamW:
    """The row-wise optimizer of the head."""
    rule, state_dtype = config.optimizer, config.head.state_dtype
    options: dict[str, Any] = {"lr": rule.lr, "weight_decay": rule.weight_decay}
    options["state_dtype"] = None if state_dtype is None else getattr(torch, state_dtype)
    options["state_on_host"] = config.head.state_on_host
    if rule.name == "adamw":
        return RowwiseAdamW(head.parameters(), **options)
    return RowwiseSGD(head.parameters(), momentum=rule.momentum, unsampled=config.head.unsampled, **options)
