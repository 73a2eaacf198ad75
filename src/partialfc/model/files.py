"""Save and load a trained model.

A model folder holds `model.safetensors` (the backbone's state_dict, float32) and `config.json` (architecture, size,
colour order, normalisation, alignment template, mirroring). Nothing in it is pickled.
"""

from __future__ import annotations

import itertools
import re
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from partialfc.backbones import create_backbone
from partialfc.checkpoint.blocks import safetensors_pieces
from partialfc.core.errors import InputError
from partialfc.core.files import atomic_file, atomic_folder, previous_name, recover_folder
from partialfc.model.config import CONFIG_NAME, ModelConfig, config_text, parse_config, read_config
from partialfc.model.onnx_file import METADATA_KEY, OnnxNetwork
from partialfc.model.onnx_file import NAME as ONNX
from partialfc.model.recognise import find_backbone, recognise

WEIGHTS_NAME = "model.safetensors"
STATE_DICT_SUFFIXES = (".pt", ".pth", ".ckpt", ".pth.tar")


_COUNTER = "num_batches_tracked"  # which state_dicts converted or written by old versions of torch lack


@dataclass
class Model:
    """A backbone, its configuration, and in words where both come from."""

    backbone: nn.Module
    config: ModelConfig
    origin: str = ""

    @property
    def device(self) -> torch.device:
        return next(itertools.chain(self.backbone.parameters(), self.backbone.buffers())).device

    def with_flip(self, flip: bool | None) -> Self:
        """The same backbone with another `ModelConfig.flip`; None keeps it."""
        return self if flip is None else replace(self, config=replace(self.config, flip=flip))


def save_model(folder: str | Path, backbone: nn.Module, config: ModelConfig) -> None:
    """Write a model folder, replacing the model that is there.

    At any moment, a whole model can be loaded from `folder`: the old one stays until the new one is on the disk, for
    the instant between two renames under another name, where `load_model` looks too. Other files in the folder are
    kept.

    Args:
        folder: the model folder; missing parents are created.
        backbone: the network itself, without a wrapper.
        config: what the network is.

    Raises:
        InputError: `folder` is a file or a folder with something other than a model in it.
        OSError: it cannot be written; the model that was there stays.
        ValueError: `backbone` is not what `config` says, so that it could not be loaded again.
    """
    differences = describe_differences(backbone.state_dict(), _architecture(config).state_dict())
    if differences:
        raise ValueError(f"the backbone is no {config.backbone} as its config says (is it wrapped?): {differences}")
    folder = Path(folder).resolve()
    recover_folder(folder)
    if folder.exists() and not (folder / CONFIG_NAME).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise InputError(f"{folder} is not a model folder and would be overwritten: give a new path to save to.")
    with atomic_folder(folder) as new:
        if folder.exists():
            own = shutil.ignore_patterns(CONFIG_NAME, WEIGHTS_NAME)
            shutil.copytree(folder, new, ignore=own, dirs_exist_ok=True)
        write_weights(new / WEIGHTS_NAME, backbone, config)
        (new / CONFIG_NAME).write_text(config_text(config), encoding="utf-8")


def write_weights(path: Path, backbone: nn.Module, config: ModelConfig) -> None:
    """Write one `.safetensors` file, whose metadata hold the configuration: `load_model` reads it alone too.

    Raises:
        OSError: it cannot be written.
    """
    metadata = {"format": "pt", METADATA_KEY: config_text(config)}
    # The library's own writer puts metadata in another order in each process.
    with atomic_file(path) as file:
        file.writelines(safetensors_pieces(backbone.state_dict(), metadata))


def load_model(path: str | Path, device: str | torch.device = "cpu") -> Model:
    """The model of a model folder, of a run folder (its best model, else its last), or of a file of weights.

    Such a file, of any suffix, holds a state_dict as the reference implementation writes it (`model.pt`,
    `backbone.pth`), perhaps among other things and with the prefixes of wrappers: keys and shapes tell backbone,
    embedding_dim and image_size; the input is RGB, (x/255 - 0.5) / 0.5, and embeddings of mirrored images are added, as
    there. An ONNX file (.onnx) with such an input is run by onnxruntime. The model is in evaluation mode, and its
    `origin` says what was recognised.

    Raises:
        InputError: there is no model, its configuration has an unknown key or an impossible value, or its weights do
            not fit the architecture that it names.
    """
    path = Path(path)
    if path.name in (WEIGHTS_NAME, CONFIG_NAME) and (path.parent / CONFIG_NAME).is_file():
        path = path.parent  # a file of a model folder stands for the folder
    if path.is_file() and path.suffix.lower() == ".onnx":
        return _load_onnx(path, device)
    if path.is_file():
        own = _load_own(path, device) if path.suffix.lower() == ".safetensors" else None
        return own or _load_state_dict(path, device)
    folder = find_model(path)
    config = read_config(folder)
    origin = f"{config.backbone}, as {folder / CONFIG_NAME} says"
    return Model(build(config, read_weights(folder), name=str(folder), device=device), config, origin)


def read_torch_file(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """What `torch.save` wrote: names and tensors, numbers and the like, on the CPU. No code of the file is executed.

    Args:
        mapped: leave the tensors in the file, of which a page is read when it is used.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns of a TorchScript archive, and then refuses it
            is_safe = path.suffix.lower() == ".safetensors"
            mapped = mapped and zipfile.is_zipfile(path)  # older files cannot be mapped
            options: dict[str, Any] = {"map_location": "cpu", "weights_only": True, "mmap": mapped}
            content = load_file(path) if is_safe else torch.load(path, **options)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # for a file of another kind, torch's reader raises anything
        objects = re.search(r"GLOBAL (\S+)", str(error))  # what torch would have to execute
        also = f" (it also holds objects of {objects[1]}, which only its own program can read)" if objects else ""
        raise InputError(
            f"{path} is no readable file of weights alone{also}: save the backbone's state_dict() with torch.save."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{path} holds a {type(content).__name__} and no state_dict (names and tensors): save that.")
    return content


def _load_state_dict(path: Path, device: str | torch.device) -> Model:
    """The model of a file with a state_dict."""
    content = read_torch_file(path)
    try:
        plain, place = find_backbone(content)
        name, embedding_dim, image_size = recognise(plain)
    except InputError as error:
        raise InputError(f"The weights of {path} were not recognised: {error}.") from error
    config = ModelConfig(name, embedding_dim, image_size)
    backbone = build(config, plain, name=str(path), device=device)
    origin = f"{name}, embedding_dim {embedding_dim}, image_size {image_size}, recognised from the weights in {path}"
    origin += f" ({place})" if place else ""
    origin += "" if any(key.endswith(_COUNTER) for key in plain) else f", which lack {_COUNTER} (set to 0)"
    return Model(backbone, config, origin)


def _load_own(path: Path, device: str | torch.device) -> Model | None:
    """The model of a file of `write_weights`, None for another file."""
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
    except (SafetensorError, OSError):
        return None
    if text is None:
        return None
    config = parse_config(text, path)
    backbone = build(config, read_torch_file(path), name=str(path), device=device)
    return Model(backbone, config, f"{config.backbone}, as the metadata of {path} say")


def _load_onnx(path: Path, device: str | torch.device) -> Model:
    """The model of an ONNX file."""
    network = OnnxNetwork(path)
    config = ModelConfig(ONNX, network.embedding_dim, network.image_size)
    if network.metadata:
        config = parse_config(network.metadata, path)
        if (config.embedding_dim, config.image_size) != (network.embedding_dim, network.image_size):
            raise InputError(f"The metadata of {path} describe another network than it holds: export it again.")
    origin = f"{path}, embedding_dim {network.embedding_dim}, image_size {network.image_size}, run by onnxruntime"
    return Model(network.to(device).eval(), config, origin)


def find_model(path: Path) -> Path:
    """The model folder that `path` is, or that the run folder `path` holds; InputError if neither."""
    resolved = path.resolve()
    for folder in (resolved, *(resolved / inner for inner in ("model/best", "model/last", "best", "last"))):
        for candidate in (folder, previous_name(folder)):
            if (candidate / CONFIG_NAME).is_file():
                return candidate
    if not path.exists():
        raise InputError(f"There is no {path}: give a model folder or the folder of a training run.")
    if not path.is_dir():
        raise InputError(
            f"{path} is no model: give a model folder (with {CONFIG_NAME}) or the folder of a training run."
        )
    if (path / WEIGHTS_NAME).is_file():
        raise InputError(f"{path} has {WEIGHTS_NAME} but no {CONFIG_NAME}, which says what the weights are: add it.")
    weights = sorted(file for file in path.iterdir() if file.suffix in STATE_DICT_SUFFIXES)
    if weights:
        raise InputError(f"{path} is no model folder but holds weights: give the file itself, {weights[0]}.")
    raise InputError(f"{path} holds no model: it has neither {CONFIG_NAME} nor a folder model/best or model/last.")


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
    """The backbone that `config` names, with `weights`, in evaluation mode; errors call the model `name`.

    Raises:
        InputError: a weight is missing, is left over, or has another shape.
    """
    backbone = _architecture(config)
    expected = backbone.state_dict()
    # Nothing in our networks depends on the counters of BatchNorm.
    counters = {key: torch.zeros((), dtype=torch.int64) for key in expected if key.endswith(_COUNTER)}
    weights = {**counters, **weights}
    differences = describe_differences(weights, expected)
    if differences:
        raise InputError(
            f"The weights of {name} do not fit {config.backbone} with embedding_dim {config.embedding_dim} at "
            f"image_size {config.image_size}: {differences}."
        )
    typed = {key: weights[key].to(device, expected[key].dtype) for key in expected}
    backbone.load_state_dict(typed, assign=True)
    return backbone.eval()


def _architecture(config: ModelConfig) -> nn.Module:
    """The backbone that `config` names, on the meta device."""
    with torch.device("meta"):
        return create_backbone(config.backbone, embedding_dim=config.embedding_dim, image_size=config.image_size)


def describe_differences(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """The first differences in names and shapes of two state_dicts, in words; "" if they agree."""
    differences = [f"{key} is missing" for key in expected if key not in weights]
    differences += [f"{key} is left over" for key in weights if key not in expected]
    differences += [
        f"{key} is {tuple(weights[key].shape)} and should be {tuple(expected[key].shape)}"
        for key in expected
        if key in weights and weights[key].shape != expected[key].shape
    ]
    more = len(differences) - 3
    return ", ".join(differences[:3]) + (f", and {more} more differences" if more > 0 else "")
