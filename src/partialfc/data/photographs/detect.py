"""Opens a detector by its name."""

from __future__ import annotations

from pathlib import Path

from partialfc.core.errors import InputError
from partialfc.data.photographs.mtcnn import LEAST_SCORE, Mtcnn, open_mtcnn
from partialfc.data.photographs.yunet import YuNet, open_yunet


def open_detector(name: str, *, min_face: int | None = None, min_score: float = LEAST_SCORE) -> Mtcnn | YuNet:
    """The detector that NAME or NAME=PATH names, PATH being its weights.

    Args:
        name: "mtcnn", "mtcnn=FOLDER" or "yunet=FILE".
        min_face: side of the smallest face to find, in pixels, at least 12; None chooses by the size of the image.
        min_score: the least score of a face, in [0, 1].

    Raises:
        InputError: there is no such detector, a number is out of range, or the weights are missing or those of another
            network.
    """
    kind, _, path = name.partition("=")
    if kind not in ("mtcnn", "yunet"):
        raise InputError(f"There is no detector {kind!r}: give mtcnn, mtcnn=FOLDER or yunet=FILE.")
    if min_face is not None and min_face < 12:
        raise InputError(f"--min-face is {min_face}: give at least 12 pixels.")
    if not 0 <= min_score <= 1:
        raise InputError(f"--min-score is {min_score:g}: give a number from 0 to 1.")
    if kind == "yunet":
        return open_yunet(Path(path), min_face, min_score)
    return open_mtcnn(Path(path) if path else None, min_face, min_score)
