"""Image folders: a folder with one folder of images for each identity."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from partialfc.data.images import UnreadableImage
from partialfc.data.sources.base import Sample

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


def open_folder(path: Path, num_classes: int | None) -> FolderSource | None:
    """The image folder at `path`, None where no identity folder holds an image.

    Raises:
        OSError: a folder cannot be listed.
    """
    source = FolderSource(path, num_classes)
    return source if len(source) else None


class FolderSource:
    """An image folder, `<identity>/<image>`. Class ids number the identity folders, empty ones too, by sorted name."""

    format = "folder"

    def __init__(self, path: Path, num_classes: int | None = None) -> None:
        self.path = path
        files: list[bytes] = []
        stops: list[int] = []
        with os.scandir(path) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
        for name in names:
            images = sorted(image for image in os.listdir(path / name) if _is_image(image))
            files += [os.fsencode(image) for image in images]
            stops.append(len(files))
        # One block of bytes: each worker would copy a list of strings as its reference counts change.
        self._file_names = b"".join(files)
        self._file_stops = np.cumsum([len(file) for file in files], dtype=np.int64)
        self._identity_stops = np.array(stops, np.int64)
        self._identity_names = names
        self.identities: list[str] | None = names
        self.num_classes = num_classes or len(names)

    def __len__(self) -> int:
        return len(self._file_stops)

    def labels(self) -> np.ndarray:
        """As `Source.labels`."""
        counts = np.diff(self._identity_stops, prepend=0)
        return np.repeat(np.arange(len(counts), dtype=np.int64), counts)

    def name(self, index: int) -> str:
        """As `Source.name`: the path of the file."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = int(self._file_stops[index - 1]) if index else 0
        file_name = os.fsdecode(self._file_names[start : int(self._file_stops[index])])
        return os.path.join(self.path, self._identity_names[self._label(index)], file_name)

    def read(self, index: int) -> Sample:
        """As `Source.read`."""
        path = self.name(index)
        try:
            with open(path, "rb") as file:
                return Sample(file.read(), self._label(index), path)
        except OSError as error:
            raise UnreadableImage(f"{path}: {error.strerror}") from error

    def _label(self, index: int) -> int:
        return int(np.searchsorted(self._identity_stops, index, side="right"))


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
