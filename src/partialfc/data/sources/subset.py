"""A training set without the identities that have too few images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from partialfc.core.errors import InputError
from partialfc.data.sources.base import Sample, Source


class SubsetSource:
    """The identities of another source that have at least `min_images` images, renumbered without gaps.

    The order of images and of identities is kept. An identity without a name gets its old class id for a name, so that
    it can still be told which one it was. Records that cannot be read are left out.

    Raises:
        InputError: no identity has that many.
    """

    def __init__(self, source: Source, min_images: int) -> None:
        labels = source.labels()
        counts = np.bincount(labels[labels >= 0], minlength=source.num_classes)
        kept = np.flatnonzero(counts >= min_images)
        if not len(kept):
            raise InputError(
                f"No identity of {source.path} has {min_images} images, the most is {counts.max(initial=0)}: "
                "lower data.min_images."
            )
        self._source = source
        self._new_labels = np.full(len(counts), -1, np.int64)
        self._new_labels[kept] = np.arange(len(kept))
        self._indices = np.flatnonzero((labels >= 0) & (self._new_labels[labels] >= 0))
        names = source.identities
        self.identities: list[str] | None = [str(old) if names is None else names[old] for old in kept.tolist()]
        self.num_classes = len(kept)
        self.path: Path = source.path
        self.format: str = source.format

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        """As `Source.name`."""
        return self._source.name(int(self._indices[index]))

    def labels(self) -> np.ndarray:
        """As `Source.labels`: the new class ids."""
        return self._new_labels[self._source.labels()[self._indices]]

    def read(self, index: int) -> Sample:
        """As `Source.read`, with the new class id."""
        sample = self._source.read(int(self._indices[index]))
        return Sample(sample.encoded, int(self._new_labels[sample.label]), sample.name)
