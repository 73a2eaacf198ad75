"""Image folders: a folder with one folder for each identity, which holds its images at any depth."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from partialfc.data.images import UnreadableImage
from partialfc.data.sources.base import Sample
from partialfc.data.sources.names import pack

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


def open_folder(path: Path, num_classes: int | None) -> FolderSource | None:
    """The image folder at `path`, None where no identity folder holds an image.

    Raises:
        OSError: a folder cannot be listed.
    """
    if not path.is_dir():
        return None
    source = FolderSource(path, num_classes)
    return source if len(source) else None


class FolderSource:
    """An image folder, `<identity>/…/<image>`. Class ids number the identity folders by sorted name, empty ones too."""

    format = "folder"

    def __init__(self, path: Path, num_classes: int | None = None) -> None:
        self.path = path
        files: list[str] = []
        stops: list[int] = []
        with os.scandir(path) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and _is_folder(entry))
        for name in names:
            files += sorted(_images_below(os.path.join(path, name), os.stat(path)))
            stops.append(len(files))
        self._files = pack(files)  # below their identity folders
        self._identity_stops = np.array(stops, np.int64)
        self._identity_names = names
        self.identities: list[str] | None = names
        self.num_classes = num_classes or len(names)

    def __len__(self) -> int:
        return len(self._files)

    def labels(self) -> np.ndarray:
        """As `Source.labels`."""
        counts = np.diff(self._identity_stops, prepend=0)
        return np.repeat(np.arange(len(counts), dtype=np.int64), counts)

    def name(self, index: int) -> str:
        """As `Source.name`: the path of the file."""
        return os.path.join(self.path, self.file_name(index))

    def file_name(self, index: int) -> str:
        """The path of the file below the folder."""
        below = self._files[index]
        return os.path.join(self._identity_names[self._label(index)], below)

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


def _images_below(folder: str, root: os.stat_result) -> Iterator[str]:
    """The paths, relative to `folder`, of the images in it and in the folders below.

    A folder to which several symbolic links lead counts once, so that loops end; a link to `root` is left out.
    """
    seen = {(root.st_dev, root.st_ino)}
    folders = [""]
    while folders:
        below = folders.pop()
        current = os.path.join(folder, below) if below else folder
        state = os.stat(current)
        if (state.st_dev, state.st_ino) in seen:
            continue
        seen.add((state.st_dev, state.st_ino))
        deeper: list[str] = []
        with os.scandir(current) as entries:
            for entry in entries:
                path = os.path.join(below, entry.name)
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    deeper.append(path)
                elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                    yield path
        folders += sorted(deeper, reverse=True)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Also of a symbolic link to one; a link to itself is none."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
