"""Margins by name: one file each, on top of `base`, which holds the protocol."""

from partialfc.head.margins.adaface import AdaFace
from partialfc.head.margins.arcface import ArcFace
from partialfc.head.margins.base import Margin, MarginBatch
from partialfc.head.margins.combined import CombinedMargin
from partialfc.head.margins.cosface import CosFace
from partialfc.head.margins.curricularface import CurricularFace
from partialfc.head.margins.elasticface import ElasticFace
from partialfc.head.margins.magface import MagFace
from partialfc.head.margins.subcenter import SubCenterArcFace

__all__ = [
    "MARGINS",
    "AdaFace",
    "ArcFace",
    "CombinedMargin",
    "CosFace",
    "CurricularFace",
    "ElasticFace",
    "MagFace",
    "Margin",
    "MarginBatch",
    "SubCenterArcFace",
]

MARGINS: dict[str, type[Margin]] = {
    "none": Margin,
    "cosface": CosFace,
    "arcface": ArcFace,
    "combined": CombinedMargin,
    "adaface": AdaFace,
    "magface": MagFace,
    "curricularface": CurricularFace,
    "elasticface": ElasticFace,
    "subcenter": SubCenterArcFace,
}
