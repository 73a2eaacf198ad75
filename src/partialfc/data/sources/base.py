"""Training sets as a numbered row of encoded images with labels, whatever they are stored in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from partialfc.core.errors import InputError
from partialfc.data.images import UnreadableImage, decode_image


@dataclass(frozen=True)
class Sample:
    """An encoded image, its class id, and what messages call it."""

    encoded: bytes
    label: int
    name: str


class Source(Protocol):
    """A training set. `identities` are the names of the classes, where the storage has names."""

    @property
    def path(self) -> Path: ...
    @property
    def format(self) -> str: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def identities(self) -> list[str] | None: ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What messages call the sample at `index`."""
        ...

    def labels(self) -> np.ndarray:
        """The class id of every sample, int64 (N,), −1 where it cannot be read, without reading the images.

        Raises:
            InputError: a label is no class id.
        """
        ...

    def read(self, index: int) -> Sample:
        """The sample at `index`, from 0.

        Raises:
            UnreadableImage: it cannot be read; the message names it.
            InputError: its label is no class id.
        """
        ...


def read_image(source: Source, index: int) -> tuple[Sample, np.ndarray]:
    """The sample at `index` and its decoded image, uint8 (H, W, 3) RGB. Raises as `Source.read`."""
    sample = source.read(index)
    try:
        return sample, decode_image(sample.encoded)
    except UnreadableImage as error:
        raise UnreadableImage(f"{sample.name}: {error}") from error


def check_label(sample: Sample, num_classes: int) -> None:
    """Refuse a label outside [0, num_classes) with an InputError that names the record."""
    if not 0 <= sample.label < num_classes:
        raise InputError(
            f"The label of {sample.name} is {sample.label}, outside the range [0, {num_classes}): give the right "
            "num_classes, or correct the data (and its property file)."
        )
