"""The files below a folder of photographs, and their pixels, upright."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image

from partialfc.core.errors import InputError
from partialfc.data.images import FORMATS, UnreadableImage, decode_image
from partialfc.data.photographs.face import Pixels
from partialfc.data.sources.base import read_file

_ORIENTATION = 0x0112  # EXIF
_TURNS = {  # EXIF's orientation: quarter turns counterclockwise, then whether left and right change places
    2: (0, True), 3: (2, False), 4: (2, True), 5: (3, True), 6: (3, False), 7: (1, True), 8: (1, False),
}  # fmt: skip
_HEIC = re.compile(rb"ftyp(heic|heix|hevc|heim|mif1|msf1)")


def list_files(root: str | Path) -> list[str]:
    """The paths below a folder of everything in it that is no folder, sorted; of a file its own name.

    A folder to which several symbolic links lead counts once, so that loops end.

    Raises:
        InputError: there is nothing at `root`, or a folder cannot be listed.
    """
    path = Path(root)
    if re.match(r"\w+:/", str(root)):
        raise InputError(f"{root} is an address, and nothing is fetched from the network: download the files first.")
    if not os.path.lexists(path):
        raise InputError(f"There is no {path}: give a folder of photographs.")
    if not path.is_dir():
        return [path.name]
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    try:
        for folder, folders, files in os.walk(path, followlinks=True, onerror=_raise):
            state = os.stat(folder)
            if (state.st_dev, state.st_ino) in seen:
                folders.clear()
                continue
            seen.add((state.st_dev, state.st_ino))
            found += [os.path.relpath(os.path.join(folder, file), path) for file in files]
            folders.sort()
    except OSError as error:
        raise InputError(f"Cannot read {error.filename or path}: {error.strerror}.") from error
    if not found:
        raise InputError(f"There is no file below {path}: give a folder of photographs.")
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def read_photograph(path: str) -> Pixels:
    """The pixels of a photograph, uint8 (H, W, 3) RGB, turned upright as its EXIF orientation says.

    Raises:
        UnreadableImage: it is no regular file, damaged, no image, or too large; the message does not name it.
    """
    try:
        encoded = read_file(path)
    except UnreadableImage as error:
        raise UnreadableImage(str(error).removeprefix(f"{path}: ")) from error
    if _HEIC.match(encoded, 4):
        raise UnreadableImage("it is HEIC, which is not read: convert it to JPEG")
    return upright(decode_image(encoded), encoded)


def upright(image: Pixels, encoded: bytes) -> Pixels:
    """A decoded image, turned as the EXIF orientation of its file says. Pillow has turned a TIFF already."""
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as header:
            orientation = 1 if header.format == "TIFF" else header.getexif().get(_ORIENTATION, 1)
    except Exception:  # of EXIF data that are damaged
        return image
    turns, is_mirrored = _TURNS.get(orientation, (0, False))
    image = np.rot90(image, turns)
    return np.ascontiguousarray(image[:, ::-1] if is_mirrored else image)
