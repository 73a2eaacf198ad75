"""Partial FC: face recognition trained on millions of identities, and shown how good it is."""

from partialfc.backbones import create_backbone
from partialfc.head.margins import ArcFace, CosFace
from partialfc.head.optim import RowwiseAdamW, RowwiseSGD
from partialfc.head.partial_fc import PartialFC
from partialfc.model import load_model

__all__ = ["ArcFace", "CosFace", "PartialFC", "RowwiseAdamW", "RowwiseSGD", "create_backbone", "load_model"]
