"""A face in a photograph, and what finds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]


class Face(NamedTuple):
    """A face in a photograph.

    Attributes:
        box: float64 (4,): left, top, right and bottom, in pixels.
        points: float64 (5, 2), x and y of image-left eye, image-right eye, tip of the nose, image-left and image-right
            corner of the mouth, in pixels whose centres are at integers.
        score: the detector's, at most 1.
    """

    box: NDArray[np.float64]
    points: NDArray[np.float64]
    score: float

    @property
    def area(self) -> float:
        """Of the box, in square pixels."""
        return float((self.box[2] - self.box[0]) * (self.box[3] - self.box[1]))


# The faces in an upright image, uint8 (H, W, 3) RGB, the highest score first; threads call it at the same time. An
# attribute `facts` (name, licence, SHA-256 of the files by their names) is recorded with what it finds.
Detector = Callable[[Pixels], Sequence[Face]]
