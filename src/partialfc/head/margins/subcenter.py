"""Sub-center ArcFace: several centers for each class."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

from partialfc.core.errors import InputError
from partialfc.head.margins.arcface import ArcFace


@dataclass(frozen=True)
class SubCenterArcFace(ArcFace):
    """cos(θ + m), where cos θ of a class is the largest over its K centers (Deng et al., ECCV 2020).

    That holds for targets and negatives. Images with a wrong label gather at a center of their own.

    Args:
        m, gradient: as for `ArcFace`.
        sub_centers: K, at least 1: the head has K rows for each class, and computes with K times as many.

    Raises:
        InputError: as for `ArcFace`, or K is no whole number of at least 1.
    """

    sub_centers: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        k = self.sub_centers
        if not isinstance(k, Integral) or isinstance(k, bool) or k < 1:
            raise InputError(f"SubCenterArcFace's sub_centers is {k!r}; it is a whole number of at least 1.")
