"""Margins by name: one file each, on top of `base`, which holds the protocol."""

from partialfc.head.margins.arcface import ArcFace
from partialfc.head.margins.base import Margin, MarginBatch
from partialfc.head.margins.cosface import CosFace

__all__ = ["MARGINS", "ArcFace", "CosFace", "Margin", "MarginBatch"]

MARGINS: dict[str, type[Margin]] = {"none": Margin, "cosface": CosFace, "arcface": ArcFace}
