"""The configuration of a trained model: what one needs beside its weights to use it."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from partialfc.backbones import check_backbone
from partialfc.core.errors import InputError
from partialfc.core.schema import check_schema_version
from partialfc.model.onnx_file import NAME as ONNX

FORMAT = "partialfc-model-1"
SCHEMA_VERSION = 1
CONFIG_NAME = "config.json"
COLOR_ORDERS = ("rgb", "bgr")
TEMPLATES = ("arcface-112",)


@dataclass(frozen=True)
class ModelConfig:
    """Architecture and input of a backbone.

    Args:
        backbone: a name of `partialfc.backbones.BACKBONES`, or "onnx" of a network in an ONNX file.
        embedding_dim: width of the embedding.
        image_size: side of the square input in pixels.
        color_order: "rgb" or "bgr", the order of channels that the backbone was trained on.
        mean, std: a pixel x in [0, 1] enters the backbone as (x - mean) / std.
        template: the alignment template, scaled from its 112 pixels to `image_size`.
        flip: an embedding is f(x) + f(mirrored x), the protocol for faces; False for what may not be mirrored. An older
            config.json has no such key, which means True.

    Raises:
        InputError: a value of the wrong type or outside its range.
    """

    backbone: str
    embedding_dim: int = 512
    image_size: int = 112
    color_order: str = "rgb"
    mean: float = 0.5
    std: float = 0.5
    template: str = "arcface-112"
    flip: bool = True

    def __post_init__(self) -> None:
        if type(self.flip) is not bool:
            raise InputError(f"flip {self.flip!r} of a model must be true or false.")
        if not isinstance(self.backbone, str):
            raise InputError(f"backbone {self.backbone!r} of a model must be a name.")
        if self.backbone != ONNX:
            check_backbone(self.backbone)
        for name in ("embedding_dim", "image_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"{name} {value!r} of a model must be a positive integer.")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not np.isfinite(value):
                raise InputError(f"{name} {value!r} of a model must be a number.")
        if self.std <= 0:
            raise InputError(f"std {self.std} of a model must be positive.")
        for name, choices in (("color_order", COLOR_ORDERS), ("template", TEMPLATES)):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} {getattr(self, name)!r} of a model must be one of {', '.join(choices)}.")


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a model folder."""
    path = folder / CONFIG_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not JSON ({error}): save the model again.") from error
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise InputError(f'{path} does not describe a partialfc model: its "format" must be "{FORMAT}".')
    check_schema_version(path, values, SCHEMA_VERSION)
    values.pop("schema_version", None)
    known = [field.name for field in fields(ModelConfig)]
    unknown = [key for key in values if key not in known]
    if unknown:
        raise InputError(f"{path} has the unknown key {unknown[0]!r}: the keys are {', '.join(known)}.")
    if "backbone" not in values:
        raise InputError(f"{path} has no key 'backbone', the name of the architecture: add it.")
    try:
        return ModelConfig(**values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
