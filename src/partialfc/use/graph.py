"""A model as an ONNX graph: written by torch's exporter, compared with the network on faces, and timed.

The graph takes RGB in [-1, 1], float32 (N, 3, S, S), whatever the network was trained on: channels in another order and
another normalisation are nodes of the graph. It has one input and one output, and N may be any number.
"""

from __future__ import annotations

import copy
import logging
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from partialfc.core.errors import InputError, JobError
from partialfc.data.augment import normalise
from partialfc.faces.render import render_faces
from partialfc.model.config import config_text
from partialfc.model.contract import contract_of, variant_of
from partialfc.model.embed import adapt
from partialfc.model.files import Model
from partialfc.model.onnx_file import METADATA_KEY
from partialfc.model.onnx_file import NAME as ONNX

WeightType = Literal["float32", "float16"]
LEAST_COSINE: dict[WeightType, float] = {"float32": 0.99999, "float16": 0.9995}
INPUT, OUTPUT = "images", "embeddings"
_OPSET = 18  # the least that torch's exporter writes: older programs read it too
_LARGEST_FILE = (1 << 31) - (1 << 20)  # bytes; a protocol buffer has less than 2 GiB
_LARGEST_FLOAT16 = 65504.0
_FACES, _BATCHES = 8, (1, 3, 4)
_TIMINGS, _SECONDS = 20, 3.0


@dataclass(frozen=True)
class Parity:
    """What the check of an export found.

    Attributes:
        cosine: the least of a face's embeddings by the network and by the export.
        batches: the sizes of the batches in which the faces were embedded.
        milliseconds: the median for one image, on this machine's CPU; None where it was not timed.
    """

    cosine: float
    batches: tuple[int, ...]
    milliseconds: float | None = None


class GraphNetwork(nn.Module):
    """What an export computes: f(x), or f(x) + f(mirrored x), of RGB in [-1, 1]."""

    def __init__(self, model: Model, mirror: bool) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(model.backbone).cpu().float().eval().requires_grad_(False)
        self.config, self.mirror = model.config, mirror

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (B, D) of images (B, 3, S, S)."""
        inputs = adapt(images, self.config)
        embeddings: Tensor = self.backbone(inputs)
        return embeddings + self.backbone(inputs.flip(3)) if self.mirror else embeddings


def write_graph(path: Path, model: Model, network: GraphNetwork, weights: WeightType) -> str:
    """Write a model as ONNX, with its configuration and contract in the metadata, and return the contract.

    Args:
        network: of the model.
        weights: how weights of two dimensions or more are stored; the arithmetic is in float32 in any case.

    Raises:
        InputError: packages are missing, torch cannot export the network, or the file would be too large.
        OSError: it cannot be written.
    """
    graph = _exported(network, model.config.image_size)
    if weights == "float16":
        _store_as_float16(graph.graph)
    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    if size > _LARGEST_FILE:
        remedy = "--weights float16" if weights == "float32" else "--for hub"
        raise InputError(f"The weights take {size:,} bytes, and an ONNX file holds less than 2 GiB: give {remedy}.")
    # A reader adds mirrored images itself, unless the graph has done so.
    config = replace(model.config, backbone=ONNX, color_order="rgb", mean=0.5, std=0.5)
    config = replace(config, flip=config.flip and not network.mirror)
    mirrored = model.with_flip(True) if network.mirror else model
    contract = variant_of(contract_of(mirrored), f"onnx-{weights}")
    graph.metadata_props[METADATA_KEY] = config_text(config, contract=contract)
    graph.producer_name, graph.producer_version = "partialfc", ""
    import onnx_ir

    path.write_bytes(onnx_ir.to_proto(graph).SerializeToString())
    return contract


def _exported(network: GraphNetwork, size: int) -> Any:
    """The graph, an `onnx_ir.Model`, of a network for images of `size`."""
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError("Writing ONNX needs onnx and onnxscript: pip install 'partialfc[export]'.") from error
    example = (torch.zeros(2, 3, size, size),)
    names: dict[str, Any] = {"input_names": [INPUT], "output_names": [OUTPUT], "opset_version": _OPSET}
    shapes = ({0: torch.export.Dim("batch")},)
    try:
        with _quiet_exporter():
            program = torch.onnx.export(network, example, dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
    except Exception as error:  # torch's exporter has a class for each of its stages
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"torch cannot export {network.config.backbone} to ONNX ({reason}): use --for hub.") from error
    if program is None:
        raise InputError(f"torch gave no ONNX graph of {network.config.backbone}: use --for hub.")
    return program.model


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """torch's exporter says nothing of packages that are not installed, or of its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)


def _store_as_float16(graph: Any) -> None:
    """Store the weights of a graph as float16, with a node each that widens them where they are used."""
    import onnx_ir as ir

    for name, value in list(graph.initializers.items()):
        if value.dtype != ir.DataType.FLOAT or len(value.shape) < 2:
            continue
        array = value.const_value.numpy()
        if np.abs(array).max(initial=0.0) > _LARGEST_FLOAT16:
            continue
        stored = ir.tensor(array.astype(np.float16), name=f"{name}.float16")
        half = ir.Value(name=stored.name, shape=value.shape, type=ir.TensorType(stored.dtype), const_value=stored)
        cast = ir.node("Cast", [half], {"to": ir.DataType.FLOAT}, name=f"widen.{name}")
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        del graph.initializers[name]
        graph.register_initializer(half)
        cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].type = name, value.shape, value.type
        graph.insert_before(graph[0], cast)


def faces_for_checks(size: int) -> Tensor:
    """The faces on which exports are compared: float32 (8, 3, S, S), RGB in [-1, 1]."""
    numbers = torch.arange(_FACES)
    return normalise(render_faces(0, numbers, torch.zeros_like(numbers), size=size).images)


def compare(network: nn.Module, export: nn.Module, images: Tensor, least: float, name: str) -> Parity:
    """Embed faces with both, in batches of several sizes.

    Raises:
        JobError: they do not agree to a cosine of `least`; the message calls the export `name`.
    """
    with torch.inference_mode():
        expected = network(images)
        found = torch.cat([export(part) for part in images.split(list(_BATCHES))])
    cosine = float(F.cosine_similarity(expected.double(), found.double()).min())
    if not cosine >= least:  # also when it is not a number
        raise JobError(f"{name} does not compute what the model does: cosine {cosine:.6f}, at least {least} is needed.")
    return Parity(cosine, _BATCHES)


@torch.inference_mode()
def time_one_image(export: nn.Module, image: Tensor) -> float:
    """The median time for an image (1, 3, S, S), in milliseconds."""
    export(image)
    times: list[float] = []
    while len(times) < _TIMINGS and sum(times) < _SECONDS:
        started = time.perf_counter()
        export(image)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)
