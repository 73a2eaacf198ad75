"""ONNX files as models to evaluate, run by onnxruntime: exports of IResNets and other networks, fixed as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from partialfc.core.errors import InputError

NAME = "onnx"  # in place of a backbone's name
METADATA_KEY = "partialfc"  # of the configuration and the contract in the metadata of our exports


class OnnxNetwork(nn.Module):
    """An ONNX graph with one input (B, 3, S, S) and one output (B, D), computed on the CPU.

    The file is a buffer of the module, so that its bytes decide the contract of the model.

    Attributes:
        image_size, embedding_dim: S and D.
        batch: B of a graph that takes no other; None for any number of images.
        is_float16: whether it takes images in float16; otherwise in float32.
        outputs: their number, of which the first is used.
        metadata: of an export of ours, its configuration and contract as JSON; "" of other files.

    Args:
        path: the file, with its weights inside.

    Raises:
        InputError: onnxruntime is missing, or the file is no such graph.
    """

    content: Tensor

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            raise InputError(f"{path} needs the package onnxruntime: pip install 'partialfc[onnx]'.") from error
        try:
            content = path.read_bytes()
            self._session: Any = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
        except Exception as error:  # onnxruntime has a class for each kind of fault, without a common one
            reason = " ".join(str(error).split())[:160]
            raise InputError(f"{path} is no ONNX file that onnxruntime runs ({reason}): export it again.") from error
        self.register_buffer("content", torch.frombuffer(bytearray(content), dtype=torch.uint8))
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        shape = inputs[0].shape if len(inputs) == 1 else []
        if len(shape) != 4 or shape[1] != 3 or not (isinstance(shape[2], int) and shape[2] == shape[3]):
            raise InputError(f"{path} takes inputs of shape {shape}, not images (B, 3, S, S): it is no such network.")
        self.image_size: int = shape[2]
        self.metadata: str = self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY, "")
        self._input, self._dtype = inputs[0].name, np.float16 if "float16" in inputs[0].type else np.float32
        self.is_float16, self.outputs = self._dtype is np.float16, len(outputs)
        self.batch: int | None = shape[0] if isinstance(shape[0], int) else None
        self._output = outputs[0].name
        width = self(torch.zeros(self.batch or 1, 3, self.image_size, self.image_size)).shape
        if len(width) != 2:
            raise InputError(f"{path} gives outputs of shape {tuple(width)}, not embeddings (B, D).")
        self.embedding_dim: int = width[1]

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Embeddings (B, D), float32, of images (B, 3, S, S); `keys`, which every backbone accepts, is not used."""
        array = images.detach().cpu().numpy().astype(self._dtype)
        size = self.batch or len(array)
        missing = -len(array) % size if len(array) else 0
        padded = np.concatenate([array, np.zeros((missing, *array.shape[1:]), self._dtype)])
        parts = [padded[start : start + size] for start in range(0, len(padded), size)]
        results = [self._session.run([self._output], {self._input: part})[0] for part in parts]
        return torch.from_numpy(np.concatenate(results)[: len(array)].astype(np.float32)).to(images.device)
