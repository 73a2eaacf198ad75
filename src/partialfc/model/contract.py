"""The contract of a model: one hash of everything that decides which embedding an image gets.

Embeddings can be compared if they have the same contract. It stays the same when a model is saved, loaded, copied to
another device or recognised from a bare state_dict.
"""

from __future__ import annotations

import hashlib
import json

import torch

from partialfc.model.files import Model
from partialfc.model.onnx_file import OnnxNetwork

_VERSION = "partialfc-contract-1"


def contract_of(model: Model) -> str:
    """The contract of a model: 64 hexadecimal digits.

    It is the SHA-256 over one line of JSON (version, architecture, width, image size, colour order, mean, standard
    deviation, template, mirroring) and then, by ascending name, one line of JSON (name, dtype, shape) and the
    little-endian bytes of each entry of the backbone's state_dict. Floating-point entries count as float32, which is
    how a model folder is loaded. An export to ONNX, which was compared with its source, has the contract of that with
    a variant.
    """
    config = model.config
    if isinstance(model.backbone, OnnxNetwork) and model.backbone.metadata:
        exported = json.loads(model.backbone.metadata)
        if "contract" in exported and exported["flip"] == config.flip:
            return str(exported["contract"])
    digest = hashlib.sha256()
    what = [_VERSION, config.backbone, config.embedding_dim, config.image_size, config.color_order]
    digest.update(_line([*what, float(config.mean), float(config.std), config.template, config.flip]))
    for name, tensor in sorted(model.backbone.state_dict().items()):
        values = tensor.detach().to(torch.float32 if tensor.is_floating_point() else tensor.dtype).cpu()
        array = values.contiguous().reshape(-1).numpy()
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(_line([name, array.dtype.name, list(tensor.shape)]))
        digest.update(array.view("u1"))
    return digest.hexdigest()


def _line(values: list[object]) -> bytes:
    return json.dumps(values).encode() + b"\n"


def variant_of(contract: str, variant: str) -> str:
    """The contract of an export, such as "onnx-float16": that of its source, a colon, and the variant."""
    return f"{contract}:{variant}"


def same_source(first: str, second: str) -> bool:
    """Whether two contracts are those of one model and its exports, whose embeddings can be compared."""
    return first.partition(":")[0] == second.partition(":")[0]
