"""What the files of a checkpoint hold: the dtypes and headers of safetensors, and the manifest. No tensor is read here.

docs/checkpoint-format.md describes the format.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from partialfc.core.errors import InputError

MANIFEST = "manifest.json"
FORMAT = "partialfc-checkpoint"
VERSION = 1

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {code: dtype for dtype, code in CODES.items()}


class DamagedCheckpoint(InputError):
    """A checkpoint does not hold what its manifest says: `path`, a file of it, `has_fault`."""

    def __init__(self, path: Path, has_fault: str) -> None:
        super().__init__(f"{path} {has_fault}: this checkpoint is damaged, use the step before it or restore the file.")


# -- safetensors -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorLayout:
    """A tensor in a safetensors file, whose data begin at byte `start` of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


def dtype_code(dtype: torch.dtype) -> str:
    """The name of `dtype` in safetensors headers and manifests, such as "BF16".

    Raises:
        ValueError: safetensors has no such type.
    """
    if dtype not in CODES:
        raise ValueError(f"a checkpoint cannot hold tensors of {dtype}; it can hold {', '.join(map(str, CODES))}")
    return CODES[dtype]


def encode_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[Tensor]]:
    """The first bytes of a safetensors file (length and JSON header), and the tensors in the order of their data."""
    # The widest elements come first, so that every tensor starts at a multiple of its element size, as required.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in ordered:
        stop = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": dtype_code(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded, [tensor for _, tensor in ordered]


def parse_header(encoded: bytes, origin: int, size: int) -> dict[str, TensorLayout]:
    """The tensors that a JSON header names, in the order of their data.

    Args:
        encoded: the header without its length.
        origin: the byte of the file at which the data begin.
        size: bytes of the whole file.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: it is no safetensors header of such a file.
    """
    layouts = {}
    for key, entry in json.loads(encoded).items():
        if key == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        layout = TensorLayout(DTYPES[entry["dtype"]], tuple(entry["shape"]), origin + start)
        if stop - start != prod(layout.shape) * layout.dtype.itemsize:
            raise ValueError(f"tensor {key} does not fit its place")
        if origin + stop > size:
            raise ValueError(f"tensor {key} ends past the file")
        layouts[key] = layout
    return dict(sorted(layouts.items(), key=lambda item: item[1].start))


# -- manifest --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileRecord:
    """A file in the manifest: its size in bytes, and the SHA-256 (hexadecimal) of each of its blocks."""

    size: int
    sha256: list[str]


@dataclass(frozen=True)
class Part:
    """Global rows [start, stop) are in `file`."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True)
class RowTensor:
    """A tensor whose rows are spread over files: its dtype (as safetensors writes it) and global shape."""

    dtype: str
    shape: tuple[int, ...]
    parts: list[Part]


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json. `block_bytes` is the size of the blocks whose SHA-256 `files` lists.

    Raises:
        ValueError: a row of a tensor is not in exactly one part, or the parts are not in order.
    """

    step: int
    state: Mapping[str, Any]
    block_bytes: int
    rows: Mapping[str, RowTensor]
    files: Mapping[str, FileRecord]
    format: str = field(default=FORMAT, init=False)
    version: int = field(default=VERSION, init=False)

    def __post_init__(self) -> None:
        for name, tensor in self.rows.items():
            position = 0
            for part in tensor.parts:
                if part.start != position or part.stop <= position:
                    raise ValueError(f"row {position} of {name} is in no file, or in two")
                position = part.stop
            if position != tensor.shape[0]:
                raise ValueError(f"the files hold {position} rows of {name}, not {tensor.shape[0]}")

    def encode(self) -> bytes:
        """The bytes of manifest.json."""
        body = asdict(self)
        return json.dumps({**body, "sha256": _digest(body)}, indent=1, allow_nan=False).encode()

    def digest(self) -> str:
        """The SHA-256 in manifest.json, which covers every byte of the checkpoint through the hashes of the blocks."""
        return _digest(asdict(self))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the checkpoint in `folder`.

    Raises:
        DamagedCheckpoint: it is missing, unreadable, or not what was written.
        InputError: it is undamaged, but of another format version.
    """
    path = folder / MANIFEST
    try:
        body = json.loads(path.read_bytes())
        if body["format"] != FORMAT or body.pop("sha256") != _digest(body):
            raise ValueError("its SHA-256 does not match")
        if body["version"] == VERSION:
            return _parse_manifest(body)
    except OSError as error:
        raise DamagedCheckpoint(path, f"cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(path, f"is not what was written ({error})") from error

    raise InputError(
        f"{folder} has checkpoint format version {body['version']}, and this partialfc reads version {VERSION}: "
        "use the partialfc that wrote it."
    )


def _parse_manifest(body: Mapping[str, Any]) -> Manifest:
    rows = {
        name: RowTensor(entry["dtype"], tuple(entry["shape"]), [Part(**part) for part in entry["parts"]])
        for name, entry in body["rows"].items()
    }
    files = {name: FileRecord(**entry) for name, entry in body["files"].items()}
    return Manifest(body["step"], body["state"], body["block_bytes"], rows, files)


def _digest(body: Mapping[str, Any]) -> str:
    """SHA-256 of `body` as JSON with sorted keys, no spaces, in ASCII: the same in every version of the format."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()
