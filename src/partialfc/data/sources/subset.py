"""The subset of a training set without identities that have few images."""

from __future__ import annotations

import numpy as np

from partialfc.core.errors import InputError
from partialfc.data.sources.base import Sample, Source, file_name, mapping_of


class SubsetSource:
    """The identities of another source that have at least `min_images` images, renumbered without gaps.

    The order of images and of identities stays. An identity without a name is named by its old class id. Records whose
    label cannot be read are left out.

    Raises:
        InputError: no identity has that many images.
    """

    def __init__(self, source: Source, min_images: int) -> None:
        labels = source.labels()
        counts = np.bincount(labels[labels >= 0], minlength=source.num_classes)
        classes = np.flatnonzero(counts >= min_images)
        if not len(classes):
            raise InputError(
                f"No identity of {source.path} has {min_images} images, the most is {counts.max(initial=0)}: "
                "lower data.min_images."
            )
        self._source = source
        self._new_labels = np.full(len(counts), -1, np.int64)
        self._new_labels[classes] = np.arange(len(classes))
        self._indices = np.flatnonzero((labels >= 0) & (self._new_labels[labels] >= 0))
        names = source.identities
        self.identities: list[str] | None = [str(old) if names is None else names[old] for old in classes.tolist()]
        self.num_classes = len(classes)
        self.path, self.format, self.mapping, self.parts = source.path, source.format, mapping_of(source), [source]

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        """As `Source.name`."""
        return self._source.name(int(self._indices[index]))

    def file_name(self, index: int) -> str:
        """The path of the image within its set."""
        return file_name(self._source, int(self._indices[index]))

    def labels(self) -> np.ndarray:
        """As `Source.labels`: the new class ids."""
        return self._new_labels[self._source.labels()[self._indices]]

    def read(self, index: int) -> Sample:
        """As `Source.read`, with the new class id."""
        sample = self._source.read(int(self._indices[index]))
        return Sample(sample.encoded, int(self._new_labels[sample.label]), sample.name)
