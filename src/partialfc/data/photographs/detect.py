"""Opens a detector by its name."""

from __future__ import annotations

from pathlib import Path

from partialfc.core.errors import InputError
from partialfc.data.photographs.mtcnn import LEAST_SCORE, Mtcnn, open_mtcnn


def open_detector(name: str, *, min_face: int | None = None, min_score: float = LEAST_SCORE) -> Mtcnn:
    """The detector that NAME or NAME=PATH names, PATH being its weights.

    Args:
        name: "mtcnn", or "mtcnn=FOLDER".
        min_face: side of the smallest face to find, in pixels, at least 12; None chooses by the size of the image.
        min_score: the least score of a face, in [0, 1].

    Raises:
        InputError: there is no such detector, a number is out of range, or the weights are missing or those of another
            network.
    """
    kind, _, path = name.partition("=")
    if kind != "mtcnn":
        raise InputError(f"There is no detector {kind!r}: give mtcnn, or mtcnn=FOLDER.")
    if min_face is not None and min_face < 12:
        raise InputError(f"--min-face is {min_face}: give at least 12 pixels.")
    if not 0 <= min_score <= 1:
        raise InputError(f"--min-score is {min_score:g}: give a number from 0 to 1.")
    return open_mtcnn(Path(path) if path else None, min_face, min_score)
