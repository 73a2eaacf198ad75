"""Fine-tuning on one's own people: a split by identity, a part of an old set against forgetting, and a verdict."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import nn

from partialfc.config.options import (
    BackboneConfig,
    DataConfig,
    HeadConfig,
    OptimizerConfig,
    OutputConfig,
    ScheduleConfig,
    TrainConfig,
)
from partialfc.core import keyed_random
from partialfc.core.console import counted, say
from partialfc.core.device import choose_device
from partialfc.core.errors import InputError
from partialfc.core.files import atomic_folder, output_errors, write_file
from partialfc.core.keyed_random import derive_key
from partialfc.data.sources import open_source
from partialfc.data.sources.base import Source
from partialfc.data.sources.mixture import SUFFIXES
from partialfc.data.sources.overlay import DROPPED, decide, write_overlay
from partialfc.evaluation.benchmarks import Benchmark, People
from partialfc.evaluation.run import embed_benchmarks, evaluate_features, open_benchmarks
from partialfc.evaluation.statistics.figures import Figure
from partialfc.evaluation.statistics.intervals import tar_change, tar_figure, why_unresolvable
from partialfc.evaluation.statistics.metrics import Scores
from partialfc.model.files import Model, load_model
from partialfc.training.build import check_config
from partialfc.training.cores import train_on_cores
from partialfc.training.initialize import check_trains_on_its_images
from partialfc.training.timing import TrainResult

FMR = 1e-3
NEW, OLD = "new people", "old people"
_HELD_OUT = 0.2  # of the new people
_FEWEST_TESTED, _MOST_OLD_TESTED = 10, 200  # identities
_USUAL = range(50, 5001)
_MIXTURE = "train.yaml"


@dataclass(frozen=True)
class Change:
    """How one benchmark has changed: TAR at an FMR of `FMR`, each model at its own threshold.

    Attributes:
        before, after: of the model given, and of the one that was trained from it.
        change: their difference; its interval is narrower than theirs suggest, since both see the same images.
    """

    before: Figure
    after: Figure
    change: Figure

    @property
    def verdict(self) -> str:
        """In a word: better, worse, alike (as far as the images tell) or unknown."""
        if self.change.low is None or self.change.high is None:
            return "unknown"
        return "better" if self.change.low > 0 else "worse" if self.change.high < 0 else "alike"

    def text(self) -> str:
        """Before, after and change, as columns."""
        rates = "".join("       –" if one.value is None else f"{one.value:8.1%}" for one in (self.before, self.after))
        value, low, high = self.change.value, self.change.low, self.change.high
        if value is None or low is None or high is None:
            return f"{rates}  {self.change.reason or 'unknown'}"
        return f"{rates}  {100 * value:+6.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


@dataclass(frozen=True)
class FineTuning:
    """The result.

    Attributes:
        training: what the training did; the model is in its folder.
        people: numbers of identities trained on, and held out for the test.
        changes: by benchmark.
    """

    training: TrainResult
    people: tuple[int, int]
    changes: dict[str, Change]

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        changes = {
            name: {"verdict": change.verdict}
            | {key: getattr(change, key).to_dict() for key in ("before", "after", "change")}
            for name, change in self.changes.items()
        }
        return {"people": list(self.people), "fmr": FMR, "changes": changes, "training": self.training.to_dict()}

    def text(self) -> str:
        """One screen: what has changed for whom, and what to do next."""
        (trained, tested), folder = self.people, self.training.folder
        width = max(map(len, self.changes))
        lines = [
            f"Fine-tuned on {trained:,} people; {tested:,} others were held out.",
            "",
            f"Genuine pairs accepted where 1 impostor pair in {1 / FMR:,.0f} is; change in points:",
            "",
            f"    {'':{width}}  before   after  change (95 % interval)",
            *(f"    {name:{width}}{change.text()}" for name, change in self.changes.items()),
            "",
            *self._advice(),
            "",
            f"model: {folder / 'model' / 'last'}",
            f"next: partialfc report {folder}",
        ]
        return "\n".join(lines)

    def _advice(self) -> list[str]:
        lines = [
            {
                "better": "It pays on people like these.",
                "worse": "It harms even on people like these: keep the old model.",
                "alike": "Whether it pays does not show: keep the old model, or take more people.",
                "unknown": "Too few people were held out to tell whether it pays.",
            }[self.changes[NEW].verdict]
        ]
        worse = [name for name, change in self.changes.items() if change.verdict == "worse" and name != NEW]
        if worse:
            remedy = "raise --old-share, or lower --lr" if OLD in self.changes else "give --old"
            lines.append(f"It is worse on {', '.join(worse)}: {remedy}.")
        if len(self.changes) == 1:
            lines.append("What it has forgotten of others is unknown: give --old or --benchmark.")
        return lines


def finetune(
    model: str | Path,
    people: str | Path,
    out: Path,
    *,
    old: str | Path | None = None,
    old_share: float = 0.5,
    benchmarks: Mapping[str, Path] | None = None,
    values: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> FineTuning:
    """Train a model further on people of one's own, and say for whom it has become better or worse.

    A fifth of the people is held out for the test. The others train together with a part of the old set. After an
    interruption the same call goes on.

    Args:
        model: as `load_model` takes it.
        people: aligned faces, as `open_source` takes them.
        out: the folder of `data/`, the decisions about the data, `run/` and `finetune.json`, the result.
        old: a set whose people must not be forgotten, best the one that the model was trained on; up to 200 of its
            identities are held out too.
        old_share: share of the training images that come from it.
        benchmarks: further ones with scores of pairs, as `open_benchmark` takes them.
        values: keys of `TrainConfig` that replace those of `preset`.
        quiet: show no progress.

    Raises:
        InputError: too few people, a share outside (0, 1), images that do not fit the model, or what training refuses.
    """
    if not 0 < old_share < 1:
        raise InputError(f"old_share is {old_share:g}: give a number between 0 and 1, or leave out the old set.")
    if old is not None and os.path.realpath(old) == os.path.realpath(people):
        raise InputError(f"{old} is the set of the new people too, who would be trained on and tested: give another.")
    if taken := {NEW, OLD} & set(benchmarks or {}):
        raise InputError(f"benchmark {taken.pop()!r} has a name that the people held out bear: give it another.")
    values = dict(values or {})
    device = choose_device(values.get("device", "auto"))
    before, folder = load_model(model, device), out / "data"
    if not any(True for _ in before.backbone.parameters()):
        raise InputError(f"{model} cannot be trained further: give a model folder, a run folder or a file of weights.")
    check_trains_on_its_images(model, before.config)
    config = preset(before, model, folder / _MIXTURE)
    warmup = max(0.0, values.get("schedule.epochs", config.schedule.epochs) / 10)
    config = config.with_values({"schedule.warmup_epochs": warmup} | values)
    check_config(config)
    trained, tests = _split(people, old, old_share, folder)
    opened: dict[str, Benchmark] = {name: People(test) for name, test in tests.items()}
    opened |= open_benchmarks(benchmarks or {}, before.config.image_size)
    old_scores = _scores(before, opened, quiet)
    for name, reason in [(name, why_unresolvable(one, FMR)) for name, one in old_scores.items()]:
        if reason is not None and name in tests:
            say(f"note: {name}: {reason} The verdict on them will be unknown.")
        elif reason is not None:
            raise InputError(f"benchmark {name}: {reason} Give one with more pairs, or leave it out.")
    training = train_on_cores(config, out / "run", resume=True, quiet=quiet)
    new_scores = _scores(load_model(out / "run" / "model" / "last", device), opened, quiet)
    changes = {
        name: Change(tar_figure(one, FMR), tar_figure(new_scores[name], FMR), tar_change(one, new_scores[name], FMR))
        for name, one in old_scores.items()
    }
    result = FineTuning(training, (trained, tests[NEW].num_classes), changes)
    write_file(out / "finetune.json", json.dumps({"schema_version": 1, **result.to_dict()}, indent=2) + "\n")
    return result


def preset(model: Model, path: str | Path, data: Path) -> TrainConfig:
    """The configuration for 50 to 5,000 people: low rates, the first third of the layers frozen, all centers in use.

    Margin and scale are those of the run that trained the model, if `path` is its folder or a model in it.
    """
    path = Path(os.path.abspath(path))  # so that the same command goes on from elsewhere
    root = path.parent.parent if path.parent.name == "model" else path
    head, run = HeadConfig(sample_rate=1.0), root / "config.yaml"
    if run.is_file():
        try:
            trained = yaml.safe_load(run.read_bytes())["head"]
            keys = [key for key in ("margin", "margin_value", "margin_options", "scale") if key in trained]
            head = replace(head, **{key: trained[key] for key in keys})
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{run} is not the configuration of a run: give a copy of the model alone.") from error
    network = model.config
    frozen = first_layers(model.backbone)
    return TrainConfig(
        data=DataConfig(path=str(data), flip=network.flip),
        backbone=BackboneConfig(network.backbone, network.embedding_dim, init=str(path), freeze=frozen),
        head=head,
        optimizer=OptimizerConfig("adamw", lr=5e-4, lr_scaling="absolute", head_lr_factor=2.0, weight_decay=0.05),
        schedule=ScheduleConfig(epochs=10, power=1.0),
        output=OutputConfig(checkpoint_minutes=5, keep=1),
    )


def first_layers(backbone: nn.Module) -> list[str]:
    """The names of the first third of the layers, which see edges and textures, as all faces have them."""
    names: list[str] = []
    for name, layer in backbone.named_children():
        blocks = [f"{name}.{block}" for block, _ in layer.named_children()]
        names += blocks if isinstance(layer, nn.Sequential | nn.ModuleList) else [name]
    trained = [name for name in names if any(True for _ in backbone.get_submodule(name).parameters())]
    return trained[: len(trained) // 3]


def _split(people: str | Path, old: str | Path | None, old_share: float, folder: Path) -> tuple[int, dict[str, Source]]:
    """Write overlays of training and test sets, and `train.yaml`, the mixture to train on, into the folder.

    Returns:
        The number of new people in the training, and the test sets.
    """
    for path in (people, old):
        if path is not None and Path(path).suffix in SUFFIXES:
            raise InputError(f"{path} is a mixture, which cannot be part of another: give one of its sets.")
    source = open_source(people)
    identities, labels = _identities(source), source.labels()
    count = len(identities)
    if count < _FEWEST_TESTED + 2:
        raise InputError(
            f"{people} has {count} people with two images or more: {_FEWEST_TESTED} are held out for the test, and a "
            f"training needs two others. Give {_FEWEST_TESTED + 2} people or more."
        )
    if count not in _USUAL:
        say(f"note: the preset is for 50 to 5,000 people, and {people} has {count:,}")
    tested = max(_FEWEST_TESTED, round(_HELD_OUT * count))
    chosen = {NEW: (people, np.setdiff1d(labels, [*identities[:tested], -1]), identities[:tested])}
    if old is not None:
        old_source = open_source(old)
        others = _identities(old_source)
        if shared := sorted(set(source.identities or ()) & set(old_source.identities or ())):
            many = f"{people} and {old} have {counted(len(shared), 'name')} in common, such as {shared[0]}"
            say(f"note: {many}: people in both would be trained on and tested")
        if len(others) < 2 * _FEWEST_TESTED:
            many = f"{old} has {len(others)} people with two images or more"
            raise InputError(f"{many}: an old set needs {2 * _FEWEST_TESTED}, half of them for the test.")
        kept = min(_MOST_OLD_TESTED, len(others) // 2)
        images = np.isin(labels, chosen[NEW][1]).sum() * old_share / (1 - old_share)
        counts = np.bincount(old_source.labels() + 1)[others[kept:] + 1]  # unreadable labels are -1
        enough = int(np.searchsorted(counts.cumsum(), images)) + 1
        if counts.sum() < images:
            say(f"note: {old} has {counts.sum():,} images beside those of the test; {images:,.0f} were asked for")
        chosen[OLD] = (old, others[kept:][:enough], others[:kept])
    sources = [
        {"path": os.path.abspath(path), "overlay": _overlay(name, "train")} for name, (path, _, _) in chosen.items()
    ]
    mixture = f"# share of old images {old_share:g}\n{yaml.safe_dump({'sources': sources}, allow_unicode=True)}"
    if not folder.exists():
        with output_errors(folder), atomic_folder(folder) as partial:
            for name, (path, trained, held_out) in chosen.items():
                for part, classes in (("train", trained), ("test", held_out)):
                    _keep_only(open_source(path), classes, partial / _overlay(name, part))
            (partial / _MIXTURE).write_text(mixture, encoding="utf-8")
    elif not (folder / _MIXTURE).is_file() or (folder / _MIXTURE).read_text(encoding="utf-8") != mixture:
        raise InputError(f"{folder.parent} holds something else, or a fine-tuning on other data: give another --out.")
    tests = {name: open_source(path, overlay=folder / _overlay(name, "test")) for name, (path, _, _) in chosen.items()}
    return len(chosen[NEW][1]), tests


def _overlay(name: str, part: str) -> str:
    return f"{name.replace(' ', '-')}-{part}.overlay"


def _identities(source: Source) -> NDArray[np.int64]:
    """The class ids that have two images or more, in an order that is a function of the ids."""
    classes, counts = np.unique(source.labels(), return_counts=True)
    classes = classes[(classes >= 0) & (counts > 1)]
    draws = keyed_random.uniform(derive_key("held-out people"), torch.from_numpy(classes))
    return classes[draws.argsort().numpy()]


def _keep_only(source: Source, classes: NDArray[np.int64], path: Path) -> None:
    """Write an overlay that drops all other classes."""
    records = np.flatnonzero(~np.isin(source.labels(), classes))
    write_overlay(path, decide(source, records, np.full(len(records), DROPPED)))


def _scores(model: Model, benchmarks: Mapping[str, Benchmark], quiet: bool) -> dict[str, Scores]:
    """The scores of all pairs of each benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        features = embed_benchmarks(model, benchmarks, Path(folder) / "features.npy", quiet=quiet, workers=0)
    scores = {name: evaluate_features(name, benchmarks[name], features[name]).scores for name in benchmarks}
    if odd := [name for name in scores if "" not in scores[name]]:
        raise InputError(f"benchmark {odd[0]} compares no pairs one to one: give one that does, such as a .bin file.")
    return {name: parts[""] for name, parts in scores.items()}
