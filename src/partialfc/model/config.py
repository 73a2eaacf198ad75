"""The configuration of a trained model: what one needs beside its weights to use it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from partialfc.backbones import check_backbone
from partialfc.core.console import counted
from partialfc.core.errors import InputError
from partialfc.core.schema import check_schema_version
from partialfc.data.sources.base import PROCEDURAL
from partialfc.model.onnx_file import NAME as ONNX

FORMAT = "partialfc-model-1"
SCHEMA_VERSION = 1
CONFIG_NAME = "config.json"
COLOR_ORDERS = ("rgb", "bgr")
TEMPLATES = ("arcface-112",)
UNKNOWN_DATA = "unknown data"


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
        trained_on: the sets that it was trained on, one phrase each, those of its first weights before; empty if nobody
            knows. It is no part of the contract.

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
    trained_on: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (isinstance(self.trained_on, list | tuple) and all(isinstance(one, str) for one in self.trained_on)):
            raise InputError(f"trained_on {self.trained_on!r} of a model must be a list of phrases.")
        object.__setattr__(self, "trained_on", tuple(self.trained_on))
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

    @property
    def saw_only_procedural(self) -> bool:
        """Whether it was trained on procedural faces alone, and so decides nothing about photographs."""
        return bool(self.trained_on) and all(one.startswith(f"{PROCEDURAL} (") for one in self.trained_on)


def training_phrase(name: str, identities: int, images: int, *, procedural: bool) -> str:
    """A set in the words of `ModelConfig.trained_on`."""
    return f"{PROCEDURAL if procedural else name} ({counted(identities, 'identity')}, {counted(images, 'image')})"


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a model folder."""
    path = folder / CONFIG_NAME
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not JSON ({error}): save the model again.") from error
    return parse_config(text, path)


def config_text(config: ModelConfig, **more: str) -> str:
    """A configuration as JSON; `more` are keys that readers pass over."""
    return json.dumps({"format": FORMAT, "schema_version": SCHEMA_VERSION, **asdict(config), **more}, indent=2) + "\n"


def parse_config(text: str, path: Path) -> ModelConfig:
    """A configuration from JSON; errors name `path`."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON ({error}): save the model again.") from error
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise InputError(f'{path} does not describe a partialfc model: its "format" must be "{FORMAT}".')
    check_schema_version(path, values, SCHEMA_VERSION)
    for name in ("schema_version", "contract"):  # the second says what the weights beside it follow from
        values.pop(name, None)
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
