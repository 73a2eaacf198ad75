"""Partial FC: face recognition trained on millions of identities, and shown how good it is."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

from partialfc.core.errors import InputError

if TYPE_CHECKING:
    from partialfc.backbones import create_backbone
    from partialfc.head.files import load_head, save_head
    from partialfc.head.margins import (
        AdaFace,
        ArcFace,
        CombinedMargin,
        CosFace,
        CurricularFace,
        ElasticFace,
        MagFace,
        Margin,
        SubCenterArcFace,
    )
    from partialfc.head.optim import RowwiseAdamW, RowwiseSGD
    from partialfc.head.partial_fc import PartialFC
    from partialfc.model.embed import embed
    from partialfc.use.model import load_model

    __version__: str

__all__ = [
    "AdaFace",
    "ArcFace",
    "CombinedMargin",
    "CosFace",
    "CurricularFace",
    "ElasticFace",
    "InputError",
    "MagFace",
    "Margin",
    "PartialFC",
    "RowwiseAdamW",
    "RowwiseSGD",
    "SubCenterArcFace",
    "__version__",
    "create_backbone",
    "embed",
    "load_head",
    "load_model",
    "save_head",
]

_MODULES = {
    "AdaFace": "head.margins",
    "ArcFace": "head.margins",
    "CombinedMargin": "head.margins",
    "CosFace": "head.margins",
    "CurricularFace": "head.margins",
    "ElasticFace": "head.margins",
    "MagFace": "head.margins",
    "Margin": "head.margins",
    "PartialFC": "head.partial_fc",
    "RowwiseAdamW": "head.optim",
    "RowwiseSGD": "head.optim",
    "SubCenterArcFace": "head.margins",
    "create_backbone": "backbones",
    "embed": "model.embed",
    "load_head": "head.files",
    "load_model": "use.model",
    "save_head": "head.files",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: the command must handle signals before the slow import of torch."""
    if name == "__version__":
        return metadata.version("partialfc")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"partialfc.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
