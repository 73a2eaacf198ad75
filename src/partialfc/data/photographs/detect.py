"""Opens a detector by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from partialfc.core.errors import InputError, did_you_mean
from partialfc.data.photographs.face import Detector
from partialfc.data.photographs.mtcnn import open_mtcnn

DETECTORS: dict[str, Callable[[Path | None, int | None], Detector]] = {"mtcnn": open_mtcnn}


def open_detector(name: str, min_face: int | None = None) -> Detector:
    """The detector that NAME or NAME=PATH names, PATH being its weights.

    Args:
        name: "mtcnn", or "mtcnn=FOLDER".
        min_face: side of the smallest face to find, in pixels; None chooses by the size of the image.

    Raises:
        InputError: there is no such detector, or its weights are missing or those of another network.
    """
    kind, _, path = name.partition("=")
    if kind not in DETECTORS:
        known = ", ".join(DETECTORS)
        raise InputError(f"There is no detector {kind!r}: choose {known}.{did_you_mean(kind, DETECTORS)}")
    if min_face is not None and min_face < 12:
        raise InputError(f"--min-face is {min_face}: give at least 12 pixels.")
    return DETECTORS[kind](Path(path) if path else None, min_face)
