"""The same figures as in metrics.jsonl for TensorBoard and for Weights & Biases, where they are asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from partialfc.config.options import OutputConfig
from partialfc.core.errors import InputError


class Tracker(Protocol):
    """Takes lines of metrics."""

    def write(self, line: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class TensorBoardTracker:
    """Writes event files to `folder`; those of steps that a resumed run takes again are hidden."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        module = _import("torch.utils.tensorboard", "output.tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)

    def write(self, line: Mapping[str, Any]) -> None:
        for name, value in _scalars(line):
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """Writes a run of Weights & Biases to `folder`/wandb, and over the network in the mode "online" only."""

    def __init__(self, folder: Path, config: Mapping[str, Any], mode: str) -> None:
        module = _import("wandb", "output.wandb", "wandb")
        self._run = module.init(
            project="partialfc", name=folder.name, dir=str(folder), config=dict(config), mode=mode, resume="allow"
        )

    def write(self, line: Mapping[str, Any]) -> None:
        self._run.log({**dict(_scalars(line)), "step": line["step"]})

    def close(self) -> None:
        self._run.finish()


def open_trackers(output: OutputConfig, folder: Path, config: Mapping[str, Any], resume_step: int) -> list[Tracker]:
    """The trackers that the configuration asks for, on the rank that writes."""
    trackers: list[Tracker] = []
    if output.tensorboard:
        trackers.append(TensorBoardTracker(folder / "tensorboard", resume_step))
    if output.wandb != "off":
        trackers.append(WandbTracker(folder, config, output.wandb))
    return trackers


def check_trackers(output: OutputConfig) -> None:
    """Raise an InputError that says what to install, if a package that the trackers need is missing."""
    if output.tensorboard:
        _import("torch.utils.tensorboard", "output.tensorboard", "tensorboard")
    if output.wandb != "off":
        _import("wandb", "output.wandb", "wandb")


def _import(module: str, option: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{option} needs the package {extra}, which is not installed: pip install 'partialfc[{extra}]', or leave "
            "the option out."
        ) from error


def _scalars(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a line, under "train/" or the name of their benchmark."""
    prefix = line.get("benchmark") or line.get("kind", "train")
    for name, value in line.items():
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}/{name}", float(value)
