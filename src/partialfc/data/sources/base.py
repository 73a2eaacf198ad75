"""The protocol of a training set: numbered samples, each an encoded image with a label, in any storage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from partialfc.core.errors import InputError
from partialfc.data.images import UnreadableImage, decode_image


@dataclass(frozen=True)
class Sample:
    """An encoded image, its class id, and its name in messages."""

    encoded: bytes
    label: int
    name: str


class Source(Protocol):
    """A training set.

    Attributes:
        path: the file or folder.
        format: name of the storage format.
        num_classes: the number of classes.
        identities: the names of the classes, None where the storage has none.
    """

    path: Path
    format: str
    num_classes: int
    identities: list[str] | None

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The name of the sample at `index` in messages."""
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


def mapping_of(source: Source) -> str | None:
    """A digest of the decisions between the stored records and the labels of `source`, None if there are none.

    A source that stands on others (overlay, mixture) has it as its attribute `mapping`. Images and classes may be as
    many as before, so that only this tells a run that its data have changed.
    """
    mapping: str | None = getattr(source, "mapping", None)
    return mapping


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


def file_name(source: Source, index: int) -> str:
    """The path of an image within its set, as the storage keeps it, "" where it keeps none.

    A source with such names has a method `file_name(index)`; the others need none.
    """
    return str(source.file_name(index)) if hasattr(source, "file_name") else ""


def check_labels(source: Source, labels: np.ndarray) -> None:
    """Refuse labels of `source.labels()` outside the range, as `check_label` does; -1 stands for an unreadable one."""
    for index in np.flatnonzero(labels >= source.num_classes)[:1].tolist():
        check_label(Sample(b"", int(labels[index]), source.name(index)), source.num_classes)
