"""A trained model as a folder, and images to embeddings.

A model folder holds `model.safetensors` (the backbone's state_dict, float32) and `config.json` (what must be known to
use it: architecture, size, colour order, normalisation, alignment template). Nothing in it is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from partialfc.activity import progress
from partialfc.backbones import check_backbone, create_backbone
from partialfc.backbones.recognise import recognise, without_prefixes
from partialfc.data.augment import normalise
from partialfc.errors import InputError

FORMAT = "partialfc-model-1"
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
STATE_DICT_SUFFIXES = (".pt", ".pth")
COLOR_ORDERS = ("rgb", "bgr")
TEMPLATES = ("arcface-112",)


@dataclass(frozen=True)
class ModelConfig:
    """What must be known to use a backbone's weights.

    Args:
        backbone: a name of `partialfc.backbones.BACKBONES`.
        embedding_dim: width of the embedding.
        image_size: side of the square input in pixels.
        color_order: "rgb" or "bgr", the order of channels that the backbone was trained on.
        mean, std: a pixel x in [0, 1] enters the backbone as (x - mean) / std.
        template: the alignment template, scaled from its 112 pixels to `image_size`.

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

    def __post_init__(self) -> None:
        if not isinstance(self.backbone, str):
            raise InputError(f"backbone {self.backbone!r} of a model must be a name.")
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


@dataclass
class Model:
    """A backbone, what must be known to use it, and in words where it comes from and what was recognised in it."""

    backbone: nn.Module
    config: ModelConfig
    origin: str = ""

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device


def save_model(folder: str | Path, backbone: nn.Module, config: ModelConfig) -> None:
    """Write a model folder, replacing the model that is there.

    At any moment, a whole model can be loaded from `folder`: the new one is written beside it, flushed and renamed, and
    until that is done the old one stays, in `folder` or, for an instant, where `load_model` also looks. Other files in
    the folder are kept.

    Args:
        folder: the model folder; its parents are made if need be.
        backbone: the network itself, without a wrapper.
        config: what the network is.

    Raises:
        InputError: `folder` is a file or a folder with something other than a model in it.
        OSError: it cannot be written; the model that was there stays.
        ValueError: `backbone` is not what `config` says, so that it could not be loaded again.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    differences = _differences(weights, _architecture(config).state_dict())
    if differences:
        raise ValueError(f"the backbone is no {config.backbone} as its config says (is it wrapped?): {differences}")
    folder = Path(folder).resolve()
    recover(folder)
    replaces = folder.exists()
    if replaces and not (folder / CONFIG_NAME).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise InputError(f"{folder} is not a model folder and would be overwritten: give a new path to save to.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = folder.parent / f".{folder.name}.new", _old(folder)
    if new.exists():
        shutil.rmtree(new)  # left by a save that was interrupted
    try:
        if replaces:
            shutil.copytree(folder, new, ignore=shutil.ignore_patterns(CONFIG_NAME, WEIGHTS_NAME))
        else:
            new.mkdir()
        _write(new, weights, config)
    except OSError:
        shutil.rmtree(new, ignore_errors=True)  # on a full disk, what is there of it is in the way
        raise
    if replaces:
        folder.rename(old)
    new.rename(folder)
    _flush(folder.parent)
    if replaces:
        shutil.rmtree(old)


def _write(folder: Path, weights: dict[str, Tensor], config: ModelConfig) -> None:
    try:
        save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    except SafetensorError as error:  # so it calls a full disk
        raise OSError(f"{folder / WEIGHTS_NAME} cannot be written ({error})") from error
    text = json.dumps({"format": FORMAT, **asdict(config)}, indent=2) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
    for path in (folder / WEIGHTS_NAME, folder / CONFIG_NAME, folder):
        _flush(path)


def load_model(path: str | Path, device: str | torch.device = "cpu") -> Model:
    """The model of a model folder, of a run folder (its best model, else its last), or of a .pt or .pth file.

    Such a file is a bare state_dict as the reference implementation writes it (`model.pt`, `backbone.pth`); backbone,
    embedding_dim and image_size are recognised by its keys and shapes, and the rest is taken as usual there: RGB,
    (x/255 - 0.5) / 0.5. The model is in evaluation mode, and its `origin` says what was recognised.

    Raises:
        InputError: there is no model, its configuration has an unknown key or an impossible value, or its weights do
            not fit the architecture that it names.
    """
    if Path(path).is_file() and Path(path).suffix in STATE_DICT_SUFFIXES:
        return _load_state_dict(Path(path), device)
    folder = find_model(Path(path))
    config = read_config(folder)
    origin = f"{config.backbone}, as {folder / CONFIG_NAME} says"
    return Model(build(config, read_weights(folder), name=str(folder), device=device), config, origin)


def _load_state_dict(path: Path, device: str | torch.device) -> Model:
    """The model of a bare state_dict; only tensors are read from the file, nothing in it is run."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # a file that is something else ends in any error of the reader
        raise InputError(f"{path} is no readable file of weights alone: give a state_dict saved by torch.") from error
    named = isinstance(weights, dict) and all(isinstance(key, str) for key in weights)
    if not weights or not named or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(
            f"{path} holds no bare state_dict (names and tensors): save the backbone's state_dict() alone."
        )
    plain = without_prefixes(weights)
    try:
        name, embedding_dim, image_size = recognise(plain)
    except InputError as error:
        raise InputError(f"The weights of {path} were not recognised: {error}.") from error
    config = ModelConfig(name, embedding_dim, image_size)
    backbone = build(config, plain, name=str(path), device=device)
    origin = f"{name}, embedding_dim {embedding_dim}, image_size {image_size}, recognised from the weights in {path}"
    return Model(backbone, config, origin)


def find_model(path: Path) -> Path:
    """The model folder that `path` is, or that the run folder `path` holds; InputError if neither."""
    resolved = path.resolve()
    for folder in (resolved, resolved / "model" / "best", resolved / "model" / "last"):
        for candidate in (folder, _old(folder)):
            if (candidate / CONFIG_NAME).is_file():
                return candidate
    if not path.exists():
        raise InputError(f"There is no {path}: give a model folder or the folder of a training run.")
    if path.is_file():
        raise InputError(f"{path} is a file: give a model folder (with {CONFIG_NAME}) or the folder of a training run.")
    if (path / WEIGHTS_NAME).is_file():
        raise InputError(f"{path} has {WEIGHTS_NAME} but no {CONFIG_NAME}, which says what the weights are: add it.")
    raise InputError(f"{path} holds no model: it has neither {CONFIG_NAME} nor a folder model/best or model/last.")


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a model folder."""
    path = folder / CONFIG_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not JSON ({error}): save the model again.") from error
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise InputError(f'{path} does not describe a partialfc model: its "format" must be "{FORMAT}".')
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


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The state_dict of a model folder."""
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise InputError(f"{folder} has {CONFIG_NAME} but no {WEIGHTS_NAME}: the folder is incomplete, copy it again.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} cannot be read ({error}): copy or save the model again.") from error


def build(
    config: ModelConfig, weights: dict[str, Tensor], *, name: str, device: str | torch.device = "cpu"
) -> nn.Module:
    """The backbone that `config` names, with `weights`, in evaluation mode; `name` is what an error calls the model.

    Raises:
        InputError: a weight is missing, is left over, or has another shape.
    """
    backbone = _architecture(config)
    expected = backbone.state_dict()
    differences = _differences(weights, expected)
    if differences:
        raise InputError(
            f"The weights of {name} do not fit {config.backbone} with embedding_dim {config.embedding_dim} at "
            f"image_size {config.image_size}: {differences}."
        )
    typed = {key: weights[key].to(device, expected[key].dtype) for key in expected}
    backbone.load_state_dict(typed, assign=True)
    return backbone.eval()


def _architecture(config: ModelConfig) -> nn.Module:
    """The backbone that `config` names, on the meta device: shapes without numbers."""
    with torch.device("meta"):
        return create_backbone(config.backbone, embedding_dim=config.embedding_dim, image_size=config.image_size)


def _differences(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """What tells the names and shapes of two state_dicts apart, in a few words; nothing if they agree."""
    found = [f"{key} is missing" for key in expected if key not in weights]
    found += [f"{key} is left over" for key in weights if key not in expected]
    found += [
        f"{key} is {tuple(weights[key].shape)} and should be {tuple(expected[key].shape)}"
        for key in expected
        if key in weights and weights[key].shape != expected[key].shape
    ]
    return ", ".join(found[:3]) + (f", and {len(found) - 3} more differences" if len(found) > 3 else "")


def embed(
    model: Model,
    images: np.ndarray | Tensor,
    *,
    flip: bool = True,
    batch_size: int = 256,
    between: Callable[[], None] | None = None,
) -> Tensor:
    """Embeddings f(x) + f(flipped x) of aligned images, as the LFW and IJB protocols take them.

    Args:
        model: its backbone is run in evaluation mode, and every part of it put back into the mode it was in.
        images: uint8 (N, S, S, 3) RGB, with S the model's `image_size`.
        flip: add the embedding of the mirrored image.
        batch_size: images in one pass.
        between: called after each pass; what it raises ends the work.

    Returns:
        float32 (N, D), not normalised, on the model's device.

    Raises:
        InputError: the images are of another size than the model's.
    """
    check_images(images, model.config)
    result = torch.empty(len(images), model.config.embedding_dim, device=model.device)
    modes = {module: module.training for module in model.backbone.modules()}
    dtype = next((each.dtype for each in model.backbone.parameters()), torch.float32)
    model.backbone.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(images), batch_size):
                chosen = images[start : start + batch_size]
                pixels = chosen if isinstance(chosen, Tensor) else torch.from_numpy(np.array(chosen))
                batch = prepare(pixels.to(model.device), model.config).to(dtype)
                embeddings = model.backbone(batch)
                if flip:
                    embeddings = embeddings + model.backbone(batch.flip(3))
                result[start : start + batch_size] = embeddings
                progress()
                if between is not None:
                    between()
    finally:
        for module, training in modes.items():
            module.training = training
    return result


def check_images(images: np.ndarray | Tensor, config: ModelConfig) -> None:
    """Raise an InputError unless `images` are (N, S, S, 3) with S the `image_size` of `config`."""
    size = config.image_size
    if images.ndim != 4 or tuple(images.shape[1:]) != (size, size, 3):
        found = " × ".join(str(length) for length in images.shape[1:3])
        raise InputError(
            f"The images are {found} pixels but the model takes {size} × {size}: "
            f"align them to {size} × {size}, or use a model trained at their size."
        )


def prepare(images: Tensor, config: ModelConfig) -> Tensor:
    """uint8 (B, S, S, 3) RGB to what the backbone was trained on: float32 (B, 3, S, S)."""
    prepared = normalise(images)
    if config.color_order == "bgr":
        prepared = prepared.flip(1)
    if (config.mean, config.std) != (0.5, 0.5):  # normalise gives (x - 0.5) / 0.5
        prepared = (prepared * 0.5 + (0.5 - config.mean)) / config.std
    return prepared


def recover(folder: Path) -> None:
    """Finish what an interrupted save left: if `folder` was moved aside and never replaced, move it back."""
    if not folder.exists() and _old(folder).exists():
        _old(folder).rename(folder)
    elif _old(folder).exists():
        shutil.rmtree(_old(folder))


def _old(folder: Path) -> Path:
    """Where a model stands while its successor takes its place."""
    return folder.parent / f".{folder.name}.old"


def _flush(path: Path) -> None:
    """Make what was written to a file or folder survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
