"""Pictures as a user has them, to crops that a model takes. Raw photographs are never guessed at."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from partialfc.core.errors import InputError
from partialfc.core.files import atomic_file, output_errors
from partialfc.data.align import TEMPLATE_SIZE
from partialfc.data.images import UnreadableImage, decode_image, encode_jpeg, encode_png
from partialfc.data.photographs.crop import align_face
from partialfc.data.photographs.face import Detector, Pixels
from partialfc.data.photographs.files import read_photograph
from partialfc.data.sources.base import read_file

Picture = str | Path | Pixels
_WRITERS = {".png": encode_png, ".jpg": encode_jpeg, ".jpeg": encode_jpeg}


def crop_of(picture: Picture, size: int, faces_in: Detector | None = None) -> Pixels:
    """The aligned crop of a picture: uint8 (size, size, 3).

    A picture of the model's size, or of 112 × 112, is taken for an aligned crop; for any other, a detector must find
    one face.

    Args:
        picture: a file, or pixels, uint8 (H, W, 3) RGB.
        size: side of the model's input.
        faces_in: the detector; files are turned upright for it, as their EXIF orientation says.

    Raises:
        InputError: the picture cannot be read, is no aligned crop and there is no detector, or shows no face or
            several.
    """
    name = "The picture" if isinstance(picture, np.ndarray) else str(picture)
    pixels = picture if isinstance(picture, np.ndarray) else _read(Path(picture), name, is_raw=faces_in is not None)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise InputError(f"{name} is {pixels.dtype} {pixels.shape}: give uint8 (H, W, 3), red first.")
    if pixels.shape[:2] == (size, size):
        return pixels
    if pixels.shape[:2] == (TEMPLATE_SIZE, TEMPLATE_SIZE):
        return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))
    width, height = pixels.shape[1::-1]
    if faces_in is None:
        raise InputError(
            f"{name} is {width} × {height} pixels, which is no aligned crop: align it first, or give a detector "
            "(--detector mtcnn)."
        )
    faces = faces_in(pixels)
    if len(faces) != 1:
        found = f"{len(faces)} faces were" if faces else "No face was"
        raise InputError(f"{found} found in {name}: give a picture that shows the face of one person.")
    return align_face(pixels, faces[0].points, size)


def _read(path: Path, name: str, *, is_raw: bool) -> Pixels:
    if re.match(r"\w+:/", name):
        raise InputError(f"{name} is an address, and nothing is fetched from the network: download the file first.")
    if not path.exists():
        raise InputError(f"There is no {name}: give an image file.")
    try:
        return read_photograph(str(path)) if is_raw else decode_image(read_file(str(path)))
    except UnreadableImage as error:
        reason = str(error).removeprefix(f"{path}: ").rstrip(".")
        raise InputError(f"{name} cannot be used: {reason}; give a JPEG, PNG or WebP file.") from error


def check_new(path: Path | None, option: str) -> None:
    """Refuse, with an InputError, an output that exists or has no folder to stand in; None is no output."""
    if path is not None and (path.exists() or path.is_symlink()):
        raise InputError(f"{path} exists already: remove it, or give another {option}.")
    if path is not None and not path.absolute().parent.is_dir():
        raise InputError(f"There is no folder {path.absolute().parent} to write {path.name} into: make it first.")


def write_side_by_side(path: Path, crops: Sequence[Pixels]) -> None:
    """Write crops of one size beside each other, as PNG or JPEG by the suffix.

    Raises:
        InputError: the suffix is another, or the file cannot be written.
    """
    writer = _WRITERS.get(path.suffix.lower())
    if writer is None:
        raise InputError(f"{path} has the suffix {path.suffix!r}: a picture is written as .png or .jpg.")
    with output_errors(path), atomic_file(path) as file:
        file.write(writer(np.concatenate(crops, axis=1)))
