"""Images whose colour encodes a number."""

from __future__ import annotations

import numpy as np


def picture(number: int, size: int = 16) -> np.ndarray:
    """A plain image whose colour encodes its number (below 4096): uint8 (size, size, 3)."""
    colour = np.array([number % 16, number // 16 % 16, number // 256], np.uint8) * 16
    return np.broadcast_to(colour, (size, size, 3)).copy()


def number_of(image: np.ndarray) -> int:
    """The number encoded by `picture`."""
    red, green, blue = (int(value) // 16 for value in image[0, 0])
    return red + 16 * green + 256 * blue
