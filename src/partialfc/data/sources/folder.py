"""Image folders: a folder with one folder for each identity, which holds its images at any depth."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from mmap import mmap
from pathlib import Path

import numpy as np

from partialfc.data.sources.base import PassedOver, Sample, read_file
from partialfc.data.sources.names import pack

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_OF_THE_DESKTOP = ("thumbs.db", "desktop.ini")


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
        self.passed_over: PassedOver = {}
        names: list[str] = []
        with os.scandir(path) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and _leads_to(entry, os.path.isdir):
                    names.append(entry.name)
                elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                    self._pass_over("without an identity folder", entry.name)
        names.sort()
        for name in names:
            files += sorted(self._images_below(name, os.stat(path)))
            stops.append(len(files))
        self._files = pack(files)  # below their identity folders
        self._identity_stops = np.array(stops, np.int64)
        self._identity_names = names
        self.identities: list[str] | None = names
        self.num_classes = num_classes or len(names)
        self.notes: list[str] = []
        if files and all(os.sep in file for file in files):
            first = self.file_name(0)
            self.notes.append(
                f"{path} has no image directly in an identity folder, and {first} is taken for one of "
                f"{first.partition(os.sep)[0]}: if the inner folders are identities, give the folder that holds them"
            )

    def __len__(self) -> int:
        return len(self._files)

    def labels(self) -> np.ndarray:
        """As `Source.labels`."""
        counts = np.diff(self._identity_stops, prepend=0)
        return np.repeat(np.arange(len(counts), dtype=np.int64), counts)

    def name(self, index: int) -> str:
        """As `Source.name`: the path of the file."""
        return f"{self.path}/{self.file_name(index)}"

    def file_name(self, index: int) -> str:
        """The path of the file below the folder."""
        return f"{self._identity_names[self._label(index)]}/{self._files[index]}"

    def read(self, index: int) -> Sample:
        """As `Source.read`."""
        label = self._label(index)
        path = f"{self.path}/{self._identity_names[label]}/{self._files[index]}"
        return Sample(read_file(path), label, path)

    def order(self) -> list[bytes | mmap]:
        """What tells the samples apart: the names of the files and how many each identity has."""
        return [self._files.block, self._identity_stops.tobytes()]

    def _label(self, index: int) -> int:
        return bisect_right(self._identity_stops, index)

    def _images_below(self, identity: str, root: os.stat_result) -> Iterator[str]:
        """The paths, relative to the folder of an identity, of the images in it and in the folders below.

        A folder to which several symbolic links lead counts once, so that loops end; a link to `root` is left out.
        """
        seen = {(root.st_dev, root.st_ino)}
        folders = [""]
        while folders:
            below = folders.pop()
            current = os.path.join(self.path, identity, below).rstrip("/")
            state = os.stat(current)
            if (state.st_dev, state.st_ino) in seen:
                continue
            seen.add((state.st_dev, state.st_ino))
            deeper: list[str] = []
            with os.scandir(current) as entries:
                for entry in entries:
                    path = os.path.join(below, entry.name)
                    if entry.name.startswith(".") or entry.name.lower() in _OF_THE_DESKTOP:
                        continue
                    if _leads_to(entry, os.path.isdir):
                        deeper.append(path)
                    elif not _leads_to(entry, os.path.isfile):
                        self._pass_over("that are no regular files", os.path.join(identity, path))
                    elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                        yield path
                    else:
                        suffix = os.path.splitext(entry.name)[1].lower()
                        self._pass_over(suffix or "without a suffix", os.path.join(identity, path))
            folders += sorted(deeper, reverse=True)

    def _pass_over(self, kind: str, name: str) -> None:
        count, first = self.passed_over.get(kind, (0, name))
        self.passed_over[kind] = (count + 1, min(first, name))


def _leads_to(entry: os.DirEntry[str], is_kind: Callable[[str], bool]) -> bool:
    """Whether an entry is a folder (os.path.isdir) or a regular file (isfile), or a symbolic link to one."""
    if entry.is_symlink():
        return is_kind(entry.path)  # False of a link to itself
    return entry.is_dir() if is_kind is os.path.isdir else entry.is_file()
