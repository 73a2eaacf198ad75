"""Partial FC: face recognition trained on millions of identities, and shown how good it is."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from partialfc.backbones import create_backbone
    from partialfc.head.margins.base import ArcFace, CosFace
    from partialfc.head.optim import RowwiseAdamW, RowwiseSGD
    from partialfc.head.partial_fc import PartialFC
    from partialfc.model.files import load_model

__all__ = ["ArcFace", "CosFace", "PartialFC", "RowwiseAdamW", "RowwiseSGD", "create_backbone", "load_model"]

_MODULES = {
    "ArcFace": "head.margins.base",
    "CosFace": "head.margins.base",
    "PartialFC": "head.partial_fc",
    "RowwiseAdamW": "head.optim",
    "RowwiseSGD": "head.optim",
    "create_backbone": "backbones",
    "load_model": "model.files",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: the command must hear signals before torch, which takes seconds, is imported."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"partialfc.{_MODULES[name]}"), name)
