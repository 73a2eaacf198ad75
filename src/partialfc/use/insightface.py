"""What the insightface package and InsightFace Server demand of a model, read in insightface 2.1 and Server 0.2.

`get_model` on a plain `.onnx` decides by the names of the first eight nodes whether the graph normalises its input: if
one begins with Sub (or _minus) and one with Mul (or _mul), pixels 0 to 255 enter as they are, otherwise (x - 127.5) /
127.5. A graph that normalises under other names is normalised twice, one that does not under those names, never.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from partialfc.core.errors import InputError
from partialfc.core.files import write_file
from partialfc.model.onnx_file import OnnxNetwork

LICENSE = "MODEL.LICENSE"
MODEL_NAME, DETECTOR_NAME, MANIFEST = "recognizer.onnx", "detector.onnx", "manifest.json"
_NAMED = 8
_ELEMENTWISE = {"Sub", "Add", "Mul", "Div", "Cast", "Identity", "Transpose", "BatchNormalization"}
_LEAST_SCALE = 0.1  # of a graph that takes [-1, 1]; those for pixels scale by 1/127.5, 1/128 or 1/255


def normalises(path: Path) -> bool:
    """Whether an ONNX graph brings pixels 0 to 255 to [-1, 1] itself, before its first convolution.

    Raises:
        InputError: onnx is not installed.
    """
    graph = _read(path)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    inputs = [value.name for value in graph.input if value.name not in constants]
    value, scale = inputs[0], 1.0
    for node in graph.node:  # in the order of computation
        if value not in node.input:
            continue
        if node.op_type not in _ELEMENTWISE:
            break
        others = [_array(constants[name]) for name in node.input if name in constants]
        if node.op_type == "BatchNormalization" and len(others) == 4:
            scale *= float(np.abs(others[0] / np.sqrt(others[3] + 1e-5)).mean())
        elif node.op_type in ("Mul", "Div") and others:
            factor = float(np.abs(others[0]).mean())
            scale *= factor if node.op_type == "Mul" else 1.0 / factor
        value = node.output[0]
    return scale < _LEAST_SCALE


def named_as_normalising(path: Path) -> bool:
    """Whether `get_model` takes the graph for one that normalises."""
    names = [node.name for node in _read(path).node[:_NAMED]]
    return all(any(name.startswith(kind) for name in names) for kind in (("Sub", "_minus"), ("Mul", "_mul")))


def _read(path: Path) -> Any:
    try:
        import onnx
    except ImportError as error:
        raise InputError("Looking into an ONNX graph needs onnx: pip install 'partialfc[export]'.") from error
    return onnx.load(path, load_external_data=False).graph


def _array(tensor: Any) -> np.ndarray:
    import onnx

    return np.asarray(onnx.numpy_helper.to_array(tensor), np.float64)


def check_size(size: int, name: str) -> None:
    """Refuse, with an InputError, a size that insightface would take for another kind of model; `name` is the file."""
    if size < 112 or size % 16 or size == 192:  # 192 is that of its landmarks
        raise InputError(
            f"{name} takes images of {size} pixels, and insightface takes faces of 112 pixels or more, a multiple of "
            "16 and not 192: export a model that was trained at 112."
        )


def check_recognizer(network: OnnxNetwork, name: str) -> None:
    """Refuse, with an InputError, a graph that insightface cannot run; `name` is the file."""
    if network.is_float16 or network.outputs != 1 or network.batch is not None:
        raise InputError(
            f"{name} has float16 images, {network.outputs} outputs or a fixed batch, and insightface takes float32 "
            "images, one output and any batch: export the model again."
        )


def check_plain(path: Path, name: str) -> None:
    """Refuse, with an InputError, a graph that `get_model` would normalise twice or never."""
    inside, believed = normalises(path), named_as_normalising(path)
    if inside and not believed:
        raise InputError(
            f"{name} normalises its input itself, and insightface would do so again, since none of its first nodes are "
            "named Sub… and Mul…: export the model from its weights, or as a package, --to FOLDER."
        )
    if believed and not inside:
        raise InputError(
            f"{name} has first nodes named Sub… and Mul…, for which insightface would not normalise its input, "
            "and it does not do so itself: export the model from its weights."
        )


def write_package(folder: Path, name: str, *, size: int, width: int, embedded: bool) -> None:
    """Write the manifest (version 2) of a package whose model stands in `folder`."""
    recognition = {
        "file": MODEL_NAME,
        "sha256": hashlib.sha256((folder / MODEL_NAME).read_bytes()).hexdigest(),
        "preprocessing": "embedded" if embedded else {"mean": 127.5, "std": 127.5},
        "input_size": [size, size],
        "embedding_dimension": width,
    }
    tasks = {"recognition": recognition}
    _write_manifest(folder, {"manifest_version": 2, "model_id": model_id(name), "license": LICENSE, "tasks": tasks})


def write_server_package(folder: Path, name: str, *, width: int, detector: Path, version: str) -> None:
    """Write the manifest (version 1) of InsightFace Server, and put the detector beside the model.

    Raises:
        InputError: the detector is no `.onnx` file.
    """
    if detector.suffix != ".onnx" or not detector.is_file():
        raise InputError(f"--detector {detector} is no .onnx file: give that of the detector the server is to use.")
    shutil.copyfile(detector, folder / DETECTOR_NAME)
    recognition = {"input_size": [112, 112], "embedding_dimension": width, "preprocessing": "insightface-arcface-1"}
    manifest = {
        "manifest_version": 1,
        "model_id": model_id(name),
        "model_version": version,
        "display_name": name,
        "files": {"detector": DETECTOR_NAME, "recognizer": MODEL_NAME},
        "recognition": recognition,
        "license": LICENSE,
    }
    _write_manifest(folder, manifest)


def model_id(name: str) -> str:
    """A name as the manifests allow it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-")[:128] or "model"


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_file(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
