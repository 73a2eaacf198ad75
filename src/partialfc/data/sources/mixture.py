"""Mixtures: several training sets as one, described by a small YAML file.

identities: merged          # or disjoint (the default)
sources:
  - path: webface           # relative to the file
  - path: glint/train.rec
    weight: 2               # each of its images twice an epoch
    overlay: glint.overlay
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from partialfc.core.errors import InputError, did_you_mean
from partialfc.data.sources.base import Sample, Source, check_label, check_labels, file_name, mapping_of

SUFFIXES = (".yaml", ".yml")
_MOST_OFTEN = 1000


@dataclass(frozen=True)
class Part:
    """A source of a mixture: its name, and how often each of its images occurs in an epoch."""

    name: str
    source: Source
    weight: int = 1


def open_mixture(path: Path, open_source: Callable[..., Source]) -> MixtureSource:
    """Open the mixture that a YAML file describes.

    Args:
        path: the file.
        open_source: opens one of its sources, as the function of that name in `partialfc.data.sources` does.

    Raises:
        InputError: the file describes no mixture, or one of its sources cannot be opened.
        OSError: the file cannot be read.
    """
    try:
        content = yaml.safe_load(path.read_bytes())
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {path} as YAML: {' '.join(str(error).split())}.") from error
    content = _checked_keys(content, ("sources", "identities"), path)
    identities, entries = content.get("identities", "disjoint"), content.get("sources")
    if identities not in ("disjoint", "merged"):
        raise InputError(f"{path} has identities {identities!r}: write disjoint or merged.")
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path} has no list of sources: write `sources:`, and below it lines such as `- path: DATA`.")
    parts = []
    for entry in entries:
        values = _checked_keys(entry, ("path", "weight", "overlay"), path)
        name, weight, overlay = str(values.get("path", "")), values.get("weight", 1), values.get("overlay")
        if not name or Path(name).suffix in SUFFIXES:
            raise InputError(f"{path} has a source with the path {name!r}: give that of a data set, not of a mixture.")
        if type(weight) is not int or not 1 <= weight <= _MOST_OFTEN:
            raise InputError(
                f"{path} gives {name} the weight {weight!r}: write a whole number from 1 to {_MOST_OFTEN}."
            )
        source = open_source(path.parent / name, overlay=None if overlay is None else path.parent / str(overlay))
        parts.append(Part(name, source, weight))
    return MixtureSource(path, parts, identities)


def _checked_keys(values: Any, known: Sequence[str], path: Path) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise InputError(f"{path} describes no mixture: write {' and '.join(f'`{key}:`' for key in known[:2])} in it.")
    for key in values:
        if key not in known:
            raise InputError(f"{path} has the key {key!r}, which no mixture has.{did_you_mean(str(key), known)}")
    return values


class MixtureSource:
    """Several sources one behind the other, each as often as its weight says.

    Disjoint identities are numbered source by source and named `<path in the file>/<name>`. Merged ones are one where
    their names are equal, numbered by their first occurrence.

    Args:
        path: of the file that describes it.
        parts: the sources.
        identities: "disjoint", or "merged" by name.

    Raises:
        InputError: identities are to be merged and a source has no names.
    """

    format = "mixture"

    def __init__(self, path: Path, parts: Sequence[Part], identities: Literal["disjoint", "merged"]) -> None:
        self.path, self.parts = path, [part.source for part in parts]
        self._parts = [part for part in parts for _ in range(part.weight)]
        self._stops = np.cumsum([len(part.source) for part in self._parts])
        numbers: dict[str, int] = {}
        new_labels: list[np.ndarray] = []
        for position, part in enumerate(parts):
            names = part.source.identities
            if identities == "merged" and names is None:
                raise InputError(
                    f"{path} merges identities by name, but {part.source.path} has no names: write `identities: "
                    "disjoint`, or take a source with names."
                )
            own = [] if names is None else names
            own = [*own, *map(str, range(len(own), part.source.num_classes))]  # num_classes may count more
            if identities == "disjoint":
                same = [other.name for other in parts[:position]].count(part.name)
                prefix = part.name if not same else f"{part.name} ({same + 1})"
                own = [f"{prefix}/{name}" for name in own]
            new_labels.append(np.array([numbers.setdefault(name, len(numbers)) for name in own], np.int64))
        self.identities: list[str] | None = list(numbers)
        self.num_classes = len(numbers)
        self._new_labels = [new_labels[number] for number, part in enumerate(parts) for _ in range(part.weight)]
        digest = hashlib.sha256()
        for part, labels in zip(self._parts, self._new_labels, strict=True):
            digest.update(f"{len(part.source)} {mapping_of(part.source)}\n".encode())
            digest.update(hashlib.sha256(labels.tobytes()).digest())
        self.mapping: str | None = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return int(self._stops[-1])

    def name(self, index: int) -> str:
        """As `Source.name`: that in its own source, which begins with the source's path or ends with it."""
        part, own_index = self._place(index)
        return self._parts[part].source.name(own_index)

    def file_name(self, index: int) -> str:
        """The path of the image within its own set."""
        part, own_index = self._place(index)
        return file_name(self._parts[part].source, own_index)

    def labels(self) -> np.ndarray:
        """As `Source.labels`."""
        once = {id(part): part.source.labels() for part in self._parts}
        result = []
        for part, new_labels in zip(self._parts, self._new_labels, strict=True):
            old = once[id(part)]
            check_labels(part.source, old)
            result.append(np.where(old >= 0, new_labels[old], -1))
        return np.concatenate(result)

    def read(self, index: int) -> Sample:
        """As `Source.read`, with the class id in the mixture."""
        part, own_index = self._place(index)
        sample = self._parts[part].source.read(own_index)
        check_label(sample, len(self._new_labels[part]))
        return Sample(sample.encoded, int(self._new_labels[part][sample.label]), sample.name)

    def _place(self, index: int) -> tuple[int, int]:
        """The number of the part, repeated ones counted, and the index in it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self._stops, index, side="right"))
        return part, index - (int(self._stops[part - 1]) if part else 0)
