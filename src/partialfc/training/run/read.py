"""Reading the folder of a run: its configuration, metrics, data and model. No trainer is needed.

A run that is still going or was cut off can be read too. A missing file gives None or something empty, and no value in
a file is trusted to be a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import ArrayLike, NDArray

from partialfc.checkpoint.read import Checkpoint, folder_name, steps_in
from partialfc.core.errors import InputError
from partialfc.model.config import ModelConfig, read_config
from partialfc.model.files import find_model
from partialfc.training.run.log import read_metrics

Floats = NDArray[np.float64]

# Numbers outside this range count as infinite or zero: in an axis they would leave the range of floats.
_LARGEST, _SMALLEST = 1e100, 1e-100
_LAST_STEP = 1 << 53  # to which floats represent every step


class RunFolder:
    """The paths of `config.yaml`, `{metrics,starts}.jsonl`, `checkpoints/` and `model/{best,last}/` under a root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config, self.metrics = root / "config.yaml", root / "metrics.jsonl"
        self.starts = root / "starts.jsonl"  # when, by which command and on what it was started or continued
        self.checkpoints = root / "checkpoints"

    def model(self, which: str) -> Path:
        """The folder of the "best" or "last" model."""
        return self.root / "model" / which


@dataclass(frozen=True)
class Evaluation:
    """One line of metrics.jsonl about a benchmark: figures by name, such as accuracy and accuracy_std."""

    benchmark: str
    step: int
    figures: Mapping[str, Any]

    def __getitem__(self, name: str) -> float | None:
        return as_number(self.figures.get(name))


@dataclass(frozen=True)
class RunData:
    """The content of a run folder.

    Attributes:
        name: of the folder.
        settings: the nested configuration, {} if there is none; `settings_text` is the text of the file.
        lines: the training lines of metrics.jsonl, by ascending step.
        evaluations: the last one of each benchmark and step, by ascending step.
        skipped: the lines about skipped steps, in their order.
        starts: of the run, with "date", "command", versions and machine; one a resume.
        counts: "images", "classes" and "image_size" as the newest readable checkpoint has them.
        model: the configuration of the stored model.
    """

    name: str
    settings: dict[str, Any]
    settings_text: str
    lines: list[dict[str, Any]]
    evaluations: list[Evaluation]
    skipped: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    counts: dict[str, Any]
    model: ModelConfig | None

    def setting(self, key: str) -> Any:
        """The value of a dotted key, None if it is not set."""
        value: Any = self.settings
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def number(self, key: str) -> float | None:
        """The value of a dotted key if it is a number."""
        return as_number(self.setting(key))

    def curve(self, name: str) -> tuple[Floats, Floats]:
        """Steps and values of a figure, of the training lines that have it; what is no finite number is NaN."""
        if name not in self._curves:
            lines = [line for line in self.lines if name in line]
            values = [line[name] for line in lines]
            if not set(map(type, values)) <= {float}:
                values = [as_number(value) for value in values]
            numbers = np.array(values, np.float64)  # None becomes NaN
            numbers[~(np.abs(numbers) < _LARGEST)] = np.nan
            numbers[np.abs(numbers) <= _SMALLEST] = 0.0
            self._curves[name] = np.array([line["step"] for line in lines], np.float64), numbers
        return self._curves[name]

    @cached_property
    def _curves(self) -> dict[str, tuple[Floats, Floats]]:
        """What `curve` has returned: a long run has many lines."""
        return {}

    def last(self, name: str) -> float | None:
        """The newest value of a figure of the training lines."""
        return as_number(self.lines[-1].get(name)) if self.lines else None

    @property
    def benchmarks(self) -> list[str]:
        """Names of all benchmarks that the run evaluated."""
        return list(dict.fromkeys(evaluation.benchmark for evaluation in self.evaluations))

    @cached_property
    def steps(self) -> int:
        """The last optimizer step in the log."""
        return max([line["step"] for line in self.lines] + [each.step for each in self.evaluations], default=0)

    @property
    def images(self) -> float | None:
        """Images of the training set: as counted, or computed from the epoch of a step."""
        counted, batch, epoch = as_number(self.counts.get("images")), self.batch, self.last("epoch")
        if counted is None and batch is not None and epoch:
            return float(round(self.lines[-1]["step"] * batch / epoch))
        return counted

    @property
    def batch(self) -> float | None:
        """Images of an optimizer step."""
        return self.number("data.global_batch_size")

    @property
    def total_steps(self) -> int | None:
        """Planned optimizer steps, by the rule of the training loop."""
        images, batch, epochs = self.images, self.batch, self.number("schedule.epochs")
        if not images or not batch or not epochs:
            return None
        return max(1, round(epochs * (images / batch)))

    def seconds_at(self, steps: ArrayLike) -> Floats | None:
        """Time of the training steps alone up to each of `steps` (N,), from the images/s of each line.

        None where a line has no speed.
        """
        logged, speeds = self.curve("images_per_second")
        if self.batch is None or not len(logged) or len(logged) < len(self.lines) or not (speeds > 0).all():
            return None
        seconds = np.cumsum(np.diff(logged, prepend=0.0) * self.batch / speeds)
        return np.interp(np.asarray(steps, np.float64), np.append(0.0, logged), np.append(0.0, seconds))

    @property
    def seconds(self) -> float | None:
        """Time of the training steps alone."""
        seconds = self.seconds_at([self.lines[-1]["step"]]) if self.lines else None
        return None if seconds is None else float(seconds[0])

    @property
    def best_step(self) -> int | None:
        """The first step with the best mean accuracy over the benchmarks: that of the stored best model."""
        scores: dict[int, list[float]] = {}
        for evaluation in self.evaluations:
            scores.setdefault(evaluation.step, []).append(evaluation["accuracy"] or 0.0)
        return max(scores, key=lambda step: sum(scores[step]) / len(scores[step])) if scores else None


def has_run(root: Path) -> bool:
    """Whether a folder is that of a run."""
    folder = RunFolder(root)
    return folder.config.is_file() or folder.metrics.is_file()


def read_run(root: Path) -> RunData:
    """Read the folder of a run.

    Raises:
        InputError: there is no run, or its configuration or its metrics are damaged.
    """
    folder = RunFolder(root)
    if not has_run(root):
        inner = root / "run"
        hint = f"did you mean {inner}?" if (inner / "config.yaml").is_file() else "give the folder of a training run."
        raise InputError(f"{root} holds no run, neither config.yaml nor metrics.jsonl: {hint}")
    text, settings = read_settings(folder.config) if folder.config.is_file() else ("", {})
    lines = read_metrics(folder.metrics) if folder.metrics.is_file() else []
    lines = [line for line in lines if 0 <= line["step"] < _LAST_STEP]
    trained = {line["step"]: line for line in lines if line.get("kind") == "train"}
    return RunData(
        name=root.resolve().name,
        settings=settings,
        settings_text=text,
        lines=[trained[step] for step in sorted(trained)],
        evaluations=_evaluations(lines),
        skipped=[line for line in lines if line.get("kind") == "skipped_step"],
        starts=read_metrics(folder.starts) if folder.starts.is_file() else [],
        counts=_read_counts(folder.checkpoints),
        model=_read_model(root),
    )


def as_number(value: Any) -> float | None:
    """A finite number of reasonable size, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_LARGEST < value < _LARGEST:
        return None
    return float(value) if abs(value) > _SMALLEST else 0.0


def read_settings(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of a config.yaml, and the nested configuration in it.

    Raises:
        InputError: it cannot be read, or holds no configuration.
    """
    try:
        text = path.read_text(encoding="utf-8")
        settings = yaml.safe_load(text)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give another folder.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable as YAML: restore it from a copy, or give another folder.") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path} holds no configuration: restore it from a copy, or give another folder.")
    return text, settings


def _evaluations(lines: list[dict[str, Any]]) -> list[Evaluation]:
    """A finished run that is resumed evaluates once more: the last line of a step counts."""
    latest: dict[tuple[int, str], Evaluation] = {}
    for line in lines:
        if line.get("kind") == "evaluation" and as_number(line.get("accuracy")) is not None:
            name = str(line.get("benchmark", "benchmark"))
            latest[line["step"], name] = Evaluation(name, line["step"], line)
    return sorted(latest.values(), key=lambda evaluation: evaluation.step)


def _read_counts(checkpoints: Path) -> dict[str, Any]:
    """The size of the training set by the newest readable checkpoint; a run may delete one while it is read."""
    for step in reversed(steps_in(checkpoints)):
        try:
            data = Checkpoint(checkpoints / folder_name(step)).state.get("data")
        except (InputError, OSError):
            continue
        if isinstance(data, dict):
            return data
    return {}


def _read_model(root: Path) -> ModelConfig | None:
    try:
        return read_config(find_model(root))
    except (InputError, OSError):
        return None
