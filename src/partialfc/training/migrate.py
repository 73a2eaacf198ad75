"""A run of the published code (arXiv 2203.15565) becomes one of ours, which `--resume` continues.

Its checkpoint is a file for each rank, `checkpoint_gpu_0.pt` and so on, with the whole backbone, the rank's classes,
the optimizer's state by number, and the state of a learning-rate scheduler.
Tensors are mapped from the files and written from there, so that memory holds one copy of the centers at most.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from partialfc.checkpoint.write import Snapshot, save_checkpoint
from partialfc.config.build import build_backbone, build_head, build_optimizers
from partialfc.config.options import TrainConfig
from partialfc.config.published import Conversion
from partialfc.core.console import Progress
from partialfc.core.device import dtype_name
from partialfc.core.errors import InputError
from partialfc.core.files import atomic_folder, output_errors, write_file
from partialfc.data.loader import Loader
from partialfc.model.files import describe_differences, read_torch_file
from partialfc.model.recognise import recognise
from partialfc.training.build import data_facts, open_loader
from partialfc.training.nonfinite import LossScale
from partialfc.training.run.read import RunFolder
from partialfc.training.state import TrainState

_NAME = re.compile(r"checkpoint_gpu_(\d+)\.pt")
_KEYS = {
    "epoch": int,
    "global_step": int,
    "state_dict_backbone": dict,
    "state_dict_softmax_fc": dict,
    "state_optimizer": dict,
    "state_lr_scheduler": dict,
}
_COMPARED = 1 << 16  # the most elements of a parameter that is compared between ranks
_ROW_STATE = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}


@dataclass(frozen=True)
class RankFile:
    """The checkpoint of one rank, checked for what every such file has.

    Attributes:
        weights: the backbone's state_dict.
        centers: (classes of the rank, D).
        groups: the optimizer's parameter groups, backbone and head.
        center_state: the optimizer's state of the centers, {} before the first step.
    """

    path: Path
    content: Mapping[str, Any]

    @property
    def weights(self) -> dict[str, Tensor]:
        return self.content["state_dict_backbone"]

    @property
    def centers(self) -> Tensor:
        return self.content["state_dict_softmax_fc"]["weight"]

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.content["state_optimizer"]["param_groups"]

    @property
    def center_state(self) -> dict[str, Any]:
        return _state_of(self, self.groups[1]["params"][0])


# -- the files of the ranks --------------------------------------------------------------------------------------------


def rank_files(folder: Path) -> list[Path]:
    """The checkpoint files of a folder in rank order, [] if it has none.

    Raises:
        InputError: one is missing between others; the message names it.
    """
    ranks = {int(match[1]): path for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))}
    missing = [rank for rank in range(max(ranks, default=0)) if rank not in ranks]
    if missing:
        raise InputError(
            f"{folder} has no checkpoint_gpu_{missing[0]}.pt, but {ranks[max(ranks)].name}: bring the others."
        )
    return [ranks[rank] for rank in sorted(ranks)]


def read_rank_file(path: Path) -> RankFile:
    """Read one file, and check that it has what such a file holds.

    Raises:
        InputError: it cannot be read, or is none.
    """
    content = read_torch_file(path, mapped=True)
    for key, kind in _KEYS.items():
        if not isinstance(content.get(key), kind):
            raise InputError(f"{path} has no {key}, which every file of a published checkpoint has: write it again.")
    weight, groups = content["state_dict_softmax_fc"].get("weight"), content["state_optimizer"].get("param_groups")
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise InputError(f"{path} has no class centers in state_dict_softmax_fc (a tensor `weight` of rows).")
    if not (isinstance(groups, list) and len(groups) == 2 and len(groups[1].get("params", [])) == 1):
        raise InputError(
            f"{path} has an optimizer without the two groups of backbone and head: it cannot be taken over."
        )
    return RankFile(path, content)


def _check_same_run(first: RankFile, other: RankFile) -> None:
    """Raise InputError if two ranks' files are of different runs or steps.

    Parameters are the same on all ranks; batch statistics are not, since each rank has its own.
    """
    for key in ("epoch", "global_step", "state_lr_scheduler"):
        if first.content[key] != other.content[key]:
            both = f"{key} {other.content[key]}, and {first.path.name} has {first.content[key]}"
            raise InputError(f"{other.path} has {both[:200]}: the files must be of one run and step.")
    names = _parameter_names(first.weights)
    if other.weights.keys() != first.weights.keys():
        raise InputError(f"{other.path} holds another network than {first.path.name}: the files must be of one run.")
    for name in names:
        if first.weights[name].numel() <= _COMPARED and not torch.equal(first.weights[name], other.weights[name]):
            raise InputError(f"{other.path} has another {name} than {first.path.name}: the files must be of one run.")


def _parameter_names(weights: Mapping[str, Tensor]) -> list[str]:
    """The parameters of a state_dict: they and `parameters()`, which numbers an optimizer's state, have one order."""
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    return [name for name in weights if name.rpartition(".")[2] not in buffers]


def _state_of(file: RankFile, number: int) -> dict[str, Any]:
    """The optimizer's state of a parameter, without what is None."""
    state = file.content["state_optimizer"].get("state", {}).get(number, {})
    return {key: value for key, value in state.items() if value is not None}


def published_share(num_classes: int, world_size: int, rank: int) -> tuple[int, int]:
    """The classes [start, stop) of a published rank: the first C mod W ranks have one more."""
    each, rest = divmod(num_classes, world_size)
    start = rank * each + min(rank, rest)
    return start, start + each + (rank < rest)


# -- the head ----------------------------------------------------------------------------------------------------------


def gather_rows(
    paths: Sequence[Path], first: RankFile, num_classes: int, config: TrainConfig, *, quiet: bool
) -> dict[str, Tensor]:
    """The centers and their optimizer state, in the order of the classes; no state if a file lacks it.

    A file is read and released before the next, so that one copy of the rows is in memory beside one file.

    Raises:
        InputError: a rank's file is of another run, or has other rows than its share of the classes.
    """
    width, names = config.backbone.embedding_dim, _ROW_STATE[config.optimizer.name]
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    gathered: dict[str, Tensor] = {}
    lost: list[str] = []
    with Progress("reading", len(paths), unit="file", quiet=quiet) as progress:
        for rank, path in enumerate(paths):
            file = first if rank == 0 else read_rank_file(path)
            _check_same_run(first, file)
            start, stop = published_share(num_classes, len(paths), rank)
            if tuple(file.centers.shape) != (stop - start, width):
                raise InputError(
                    f"{path} has centers of shape {tuple(file.centers.shape)}, but rank {rank} of {len(paths)} has "
                    f"{stop - start:,} of {num_classes:,} classes with {width} values each: a file is missing or "
                    "foreign, or config.num_classes or config.embedding_size is another run's."
                )
            rows: dict[str, Any] = {"centers": file.centers, **{name: file.center_state.get(name) for name in names}}
            for name, values in rows.items():
                if not isinstance(values, Tensor) or values.shape != file.centers.shape:
                    lost.append(name)  # an optimizer that has not stepped, or holds the rows of one sample
                elif len(paths) == 1:
                    gathered[name] = values.to(dtype)
                else:
                    gathered.setdefault(name, torch.empty(num_classes, width, dtype=dtype))[start:stop] = values
            progress.update(rank + 1)
    if lost:
        return {"centers": gathered["centers"]}
    if config.optimizer.name == "adamw":
        gathered["step"] = torch.full((num_classes,), int(first.center_state["step"]), dtype=torch.int32)
    return gathered


# -- backbone and schedule ---------------------------------------------------------------------------------------------


def backbone_state(file: RankFile) -> dict[str, Tensor]:
    """The optimizer's state of the backbone as `<parameter name>.<state key>`.

    Raises:
        InputError: the optimizer has another number of parameters than the network.
    """
    names, numbers = _parameter_names(file.weights), file.groups[0]["params"]
    if len(names) != len(numbers):
        raise InputError(
            f"{file.path} has an optimizer of {len(numbers)} parameters for a network of {len(names)}: it was not "
            "written by the published training, and its momentum cannot be taken over."
        )
    tensors: dict[str, Tensor] = {}
    for name, number in zip(names, numbers, strict=True):
        for key, value in _state_of(file, number).items():
            tensor = torch.as_tensor(value, dtype=torch.float32) if key == "step" else value
            if not isinstance(tensor, Tensor) or (key != "step" and tensor.shape != file.weights[name].shape):
                raise InputError(f"{file.path} has a {key} for {name} that does not fit it: the file is damaged.")
            tensors[f"{name}.{key}"] = tensor
    return tensors


def continued_config(file: RankFile, conversion: Conversion, loader: Loader) -> tuple[TrainConfig, int, list[str]]:
    """The configuration with the rates and steps of the checkpoint, the steps done, and what differs.

    Published steps are counted in micro-batches of which `gradient_acc` make one of ours.

    Raises:
        InputError: the scheduler is not the published one.
    """
    config, scheduler = conversion.config, file.content["state_lr_scheduler"]
    total = scheduler.get("total_iters", scheduler.get("max_steps"))
    warmup = scheduler.get("warmup_iters", scheduler.get("warmup_steps"))
    rates, power = scheduler.get("base_lrs"), scheduler.get("power")
    if not (type(total) is int and type(warmup) is int and type(power) in (int, float) and isinstance(rates, list)):
        raise InputError(
            f"{file.path} has a learning-rate scheduler that is not the polynomial one of the published code."
        )
    parts, epoch = conversion.accumulated, loader.steps_per_epoch
    backbone_group, head_group = file.groups
    adam = "betas" in backbone_group
    values = {
        "optimizer.name": "adamw" if adam else "sgd",
        "optimizer.lr": float(rates[0]),
        "optimizer.head_lr_factor": float(rates[1] / rates[0]) if len(rates) > 1 and rates[0] else 1.0,
        "optimizer.weight_decay": float(backbone_group["weight_decay"]),
        **({} if adam else {"optimizer.momentum": float(backbone_group["momentum"])}),
        "schedule.epochs": total / parts / epoch,
        "schedule.warmup_epochs": max(0, warmup) / parts / epoch,
        "schedule.power": float(power),
    }
    if file.centers.dtype == torch.float64:
        values["precision"] = "float64"
    before = {key: getattr(getattr(config, key.partition(".")[0]), key.partition(".")[2]) for key in _RATES}
    notes = [
        f"{key} is {values[key]:g} as in the checkpoint; the configuration has {before[key]:g}"
        for key in _RATES
        if key in values and values[key] != before[key]
    ]
    options = ("weight_decay", "momentum", "betas", "eps", "amsgrad", "nesterov", "dampening")
    expected = {"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False, "nesterov": False, "dampening": 0}
    for group in (backbone_group, head_group):
        for name in options:
            here = expected.get(name, backbone_group.get(name))
            if name in group and group[name] != here:
                notes.append(f"the optimizer's {name} was {group[name]}, and is {here} here")
    done = file.content["global_step"] // parts
    if warmup > 0 and file.content["global_step"] <= warmup:
        notes.append("the rest of the warm-up has the rates of one step later than the published schedule")
    if "max_steps" in scheduler:
        notes.append("the published scheduler ran one step late, so every rate comes one step earlier here")
    return config.with_values(values), done, notes


_RATES = ("optimizer.lr", "optimizer.weight_decay", "optimizer.momentum", "schedule.power")


# -- all of it ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MigratedRun:
    """What was taken over: steps done and in all, sentences about what differs, and the configuration."""

    steps: int
    total_steps: int
    num_classes: int
    tensors: int
    config: TrainConfig
    notes: list[str]


def migrate_run(folder: Path, conversion: Conversion, out: Path, *, quiet: bool = False) -> MigratedRun:
    """Write a published checkpoint as a run folder that `train --resume` continues.

    Args:
        folder: with the files of all ranks.
        conversion: the converted configuration of the run, with the training images in `data.path`.
        out: a new folder.

    Raises:
        InputError: files are missing, foreign or damaged, or do not fit the configuration or the images; nothing is
            written.
    """
    paths, config = rank_files(folder), conversion.config
    first = read_rank_file(paths[0])
    try:
        found = recognise(first.weights)
    except InputError as error:
        raise InputError(f"The backbone in {first.path} was not recognised: {error}.") from error
    wanted = (config.backbone.name, config.backbone.embedding_dim)
    if found[:2] != wanted:
        raise InputError(
            f"{first.path} holds {found[0]} with {found[1]} values an embedding, but the configuration says "
            f"{wanted[0]} with {wanted[1]}: give the configuration of this run."
        )
    loader = open_loader(config)
    if loader.image_size != found[2]:
        sizes = f"takes images of {found[2]} pixels, and those of {loader.source.path} have {loader.image_size}"
        raise InputError(f"The network in {first.path} {sizes}: give the images of this run.")
    num_classes = config.data.num_classes or loader.num_classes
    config, done, notes = continued_config(first, conversion, loader)
    config.check()
    rows = gather_rows(paths, first, num_classes, config, quiet=quiet)
    if len(rows) == 1:
        notes.append("the files have no optimizer state of all centers, which starts from zero")
    snapshot = _snapshot(first, rows, config, loader, done)
    with output_errors(out), atomic_folder(out) as new:
        run = RunFolder(new)
        save_checkpoint(run.checkpoints, snapshot)
        write_file(run.config, config.to_yaml())
    count = sum(len(group) for group in snapshot.tensors.values()) + len(snapshot.rows)
    total = config.total_steps(len(loader))
    return MigratedRun(done, total, num_classes, count, config, [*conversion.notes, *notes])


def _snapshot(first: RankFile, rows: dict[str, Tensor], config: TrainConfig, loader: Loader, done: int) -> Snapshot:
    """The checkpoint that a run of ours would have written, with these tensors.

    It is taken of a state without memory, and tensors are then put in its places, of which none stays empty.

    Raises:
        InputError: a tensor is missing, left over, or of another shape.
    """
    meta = torch.device("meta")
    backbone, head = (
        build_backbone(config, loader.image_size, device=meta),
        build_head(config, len(rows["centers"]), device=meta),
    )
    head.step = done
    scale = LossScale() if config.precision == "float16" else None
    state = TrainState(
        backbone,
        head,
        *build_optimizers(config, backbone, head),
        data_facts(loader),
        identities=loader.source.identities,
        loss_scale=scale,
        done=done,
    )
    empty = state.snapshot(config.to_dict())
    if len(rows) == 1:
        rows = rows | {
            name: torch.zeros(one.shape, dtype=one.dtype) for name, one in empty.rows.items() if name != "centers"
        }
    tensors = {"backbone": first.weights, "backbone-optimizer": backbone_state(first)}
    for placed, places in ((first.weights, empty.tensors["backbone"]), (rows, empty.rows)):
        if differences := describe_differences(placed, places):
            raise InputError(f"The tensors in {first.path.parent} do not fit the configuration: {differences}.")
    for name, tensor in first.weights.items():
        if tensor.dtype != (expected := empty.tensors["backbone"][name].dtype):
            kinds = f"{dtype_name(tensor.dtype)}, not {dtype_name(expected)}"
            raise InputError(f"{first.path} holds {name} in {kinds}: save it in that type.")
    return replace(empty, tensors=tensors, rows=rows)
