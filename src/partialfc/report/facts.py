"""What the folder of a run says: its settings, its course, and how far it came. Whatever is missing is None or empty.

A run that still goes on, or was cut off, has a report too, and no value that a file holds is trusted to be a number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from partialfc.core.errors import InputError
from partialfc.model.config import ModelConfig, read_config
from partialfc.model.files import find_model
from partialfc.training.checkpoint.read import Checkpoint, folder_name, steps_in
from partialfc.training.run.folder import RunFolder
from partialfc.training.run.log import read_metrics

# Numbers outside these sizes are as good as infinite or zero, and would leave the range of floats in an axis.
_MOST, _LEAST = 1e100, 1e-100


@dataclass(frozen=True)
class Evaluation:
    """One line of metrics.jsonl about a benchmark: figures by name, such as accuracy and accuracy_std."""

    benchmark: str
    step: int
    figures: Mapping[str, Any]

    def __getitem__(self, name: str) -> float | None:
        return as_number(self.figures.get(name))


@dataclass(frozen=True)
class RunFacts:
    """A run as its folder tells it.

    Attributes:
        name: of the folder.
        settings: the nested configuration, {} if there is none; `settings_text` is the file as it stands.
        lines: the training lines of metrics.jsonl, by ascending step.
        evaluations: the last one of each benchmark and step, by ascending step.
        counts: "images", "classes" and "image_size" as the newest readable checkpoint has them.
        model: the configuration of the stored model.
    """

    name: str
    settings: dict[str, Any]
    settings_text: str
    lines: list[dict[str, Any]]
    evaluations: list[Evaluation]
    counts: dict[str, Any]
    model: ModelConfig | None

    def setting(self, key: str) -> Any:
        """The value of a dotted key, None if it is not set."""
        value: Any = self.settings
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of a figure of the training lines; values that are no finite number are NaN."""
        known = [(float(line["step"]), as_number(line[name])) for line in self.lines if name in line]
        return [(step, math.nan if value is None else value) for step, value in known]

    def last(self, name: str) -> float | None:
        """The newest value of a figure of the training lines."""
        return as_number(self.lines[-1].get(name)) if self.lines else None

    @property
    def benchmarks(self) -> list[str]:
        """Names of all benchmarks that were run on the way."""
        return list(dict.fromkeys(evaluation.benchmark for evaluation in self.evaluations))

    @property
    def steps(self) -> int:
        """Optimizer steps that the log knows of."""
        return max([line["step"] for line in self.lines] + [each.step for each in self.evaluations], default=0)

    @property
    def images(self) -> float | None:
        """Images of the training set: as counted, or from the epoch that a step belongs to."""
        counted, batch = as_number(self.counts.get("images")), as_number(self.setting("data.global_batch_size"))
        epoch = self.last("epoch")
        if counted is None and batch is not None and epoch:
            return float(round(self.lines[-1]["step"] * batch / epoch))
        return counted

    @property
    def total_steps(self) -> int | None:
        """Steps that the run was planned for, by the rule of the training loop."""
        images, batch = self.images, as_number(self.setting("data.global_batch_size"))
        epochs = as_number(self.setting("schedule.epochs"))
        if not images or not batch or not epochs:
            return None
        return max(1, round(epochs * (images / batch)))

    @property
    def seconds(self) -> float | None:
        """Time of the training steps alone, from the images and the images/s of each line."""
        batch, before, seconds = as_number(self.setting("data.global_batch_size")), 0, 0.0
        for line in self.lines:
            speed = as_number(line.get("images_per_second"))
            if batch is None or not speed or speed < 0:
                return None
            seconds += (line["step"] - before) * batch / speed
            before = line["step"]
        return seconds if self.lines else None

    @property
    def best_step(self) -> int | None:
        """The first step with the best mean accuracy over the benchmarks: that of the stored best model."""
        scores: dict[int, list[float]] = {}
        for evaluation in self.evaluations:
            scores.setdefault(evaluation.step, []).append(evaluation["accuracy"] or 0.0)
        return max(scores, key=lambda step: sum(scores[step]) / len(scores[step])) if scores else None


def read_run(root: Path) -> RunFacts:
    """Read the folder of a run.

    Raises:
        InputError: there is no run, or its configuration or its metrics are damaged.
    """
    folder = RunFolder(root)
    if not folder.config.is_file() and not folder.metrics.is_file():
        inner = root / "run"
        hint = f"did you mean {inner}?" if (inner / "config.yaml").is_file() else "give the folder of a training run."
        raise InputError(f"{root} holds no run, neither config.yaml nor metrics.jsonl: {hint}")
    text, settings = _read_settings(folder.config)
    lines = read_metrics(folder.metrics) if folder.metrics.is_file() else []
    lines = [line for line in lines if 0 <= line["step"] < 1 << 53]
    return RunFacts(
        name=root.resolve().name,
        settings=settings,
        settings_text=text,
        lines=_by_step((line["step"], line) for line in lines if line.get("kind") == "train"),
        evaluations=_read_evaluations(lines),
        counts=_read_counts(folder.checkpoints),
        model=_read_model(root),
    )


def as_number(value: Any) -> float | None:
    """A finite number of reasonable size, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_MOST < value < _MOST:
        return None
    return float(value) if abs(value) > _LEAST else 0.0


def _by_step(lines: Iterable[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Ascending, the last line of each step."""
    return [line for _, line in sorted(dict(lines).items())]


def _read_settings(path: Path) -> tuple[str, dict[str, Any]]:
    if not path.is_file():
        return "", {}
    try:
        text = path.read_text(encoding="utf-8")
        settings = yaml.safe_load(text)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable as YAML: restore it from a copy.") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path} holds no configuration: restore it from a copy.")
    return text, settings


def _read_evaluations(lines: list[dict[str, Any]]) -> list[Evaluation]:
    """A run that is resumed when it is done evaluates once more: the last line of a step counts."""
    found: dict[tuple[int, str], Evaluation] = {}
    for line in lines:
        if line.get("kind") == "evaluation" and as_number(line.get("accuracy")) is not None:
            name = str(line.get("benchmark", "benchmark"))
            found[line["step"], name] = Evaluation(name, line["step"], line)
    return sorted(found.values(), key=lambda evaluation: evaluation.step)


def _read_counts(checkpoints: Path) -> dict[str, Any]:
    """What the newest readable checkpoint says of the data; a run at work may delete one under our eyes."""
    for step in reversed(steps_in(checkpoints)) if checkpoints.is_dir() else []:
        try:
            facts = Checkpoint(checkpoints / folder_name(step)).state.get("data")
        except (InputError, OSError):
            continue
        if isinstance(facts, dict):
            return facts
    return {}


def _read_model(root: Path) -> ModelConfig | None:
    try:
        return read_config(find_model(root))
    except (InputError, OSError):
        return None
