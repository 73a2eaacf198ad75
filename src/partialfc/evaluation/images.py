"""The images of benchmarks, for `model.embed.Images`: files, faces of IJB, and those of several benchmarks together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from partialfc.core.errors import InputError
from partialfc.data.align import align_faces
from partialfc.data.ijb_files import FaceList
from partialfc.data.images import UnreadableImage, decode_image
from partialfc.data.sources.base import check_regular
from partialfc.model.embed import Images


@dataclass(frozen=True)
class Files:
    """Image files."""

    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """As `Images.name`."""
        return str(self.paths[index])

    def image(self, index: int) -> NDArray[np.uint8]:
        """As `Images.image`; a missing file is an error, a damaged one a failure to enrol."""
        [path] = check_regular([self.paths[index]])
        try:
            content = path.read_bytes()
        except (OSError, ValueError) as error:  # the latter of a path with a NUL byte
            raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
        return decode_image(content)


@dataclass(frozen=True)
class LooseCrops:
    """The faces of IJB, aligned by their five landmarks."""

    folder: Path
    faces: FaceList
    image_size: int

    def __len__(self) -> int:
        return len(self.faces.names)

    def name(self, index: int) -> str:
        """As `Images.name`."""
        return str(self.folder / self.faces.names[index])

    def image(self, index: int) -> NDArray[np.uint8]:
        """As `Images.image`."""
        image = Files([self.folder / self.faces.names[index]]).image(0)
        landmarks = torch.from_numpy(self.faces.landmarks[index])[None]
        try:
            return align_faces(torch.from_numpy(image)[None], landmarks, self.image_size)[0].numpy()
        except ValueError as error:
            raise UnreadableImage(f"{self.name(index)}: {error}") from error


class JoinedImages:
    """The images of several benchmarks, each name once; `rows` has the places of those of each benchmark."""

    def __init__(self, parts: Mapping[str, Images]) -> None:
        places: dict[str, int] = {}
        self._images: list[tuple[Images, int]] = []
        self.rows: dict[str, NDArray[np.int64]] = {}
        for part, images in parts.items():
            rows = np.empty(len(images), np.int64)
            for index in range(len(images)):
                place = places.setdefault(images.name(index), len(places))
                if place == len(self._images):
                    self._images.append((images, index))
                rows[index] = place
            self.rows[part] = rows

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        """As `Images.name`."""
        images, own = self._images[index]
        return images.name(own)

    def image(self, index: int) -> NDArray[np.uint8]:
        """As `Images.image`."""
        images, own = self._images[index]
        return images.image(own)
