"""The manifest of a checkpoint: what is in which file, and the hashes that everything else is checked against."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from partialfc.core.errors import InputError
from partialfc.training.checkpoint.format import DamagedCheckpoint, FileRecord

MANIFEST = "manifest.json"
FORMAT = "partialfc-checkpoint"
VERSION = 1


@dataclass(frozen=True)
class Part:
    """Global rows [start, stop) are in `file`."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True)
class RowTensor:
    """A tensor that is spread over files by rows: its dtype (as safetensors writes it) and global shape."""

    dtype: str
    shape: tuple[int, ...]
    parts: list[Part]

    def check(self, name: str) -> None:
        """Raise ValueError unless each row is in exactly one part, in order."""
        position = 0
        for part in self.parts:
            if part.start != position or part.stop <= position:
                raise ValueError(f"row {position} of {name} is in no file, or in two")
            position = part.stop
        if position != self.shape[0]:
            raise ValueError(f"the files hold {position} rows of {name}, not {self.shape[0]}")


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json. `block_bytes` is the size of the blocks that `files` gives the SHA-256 of."""

    step: int
    state: Mapping[str, Any]
    block_bytes: int
    rows: Mapping[str, RowTensor]
    files: Mapping[str, FileRecord]
    format: str = field(default=FORMAT, init=False)
    version: int = field(default=VERSION, init=False)

    def encode(self) -> bytes:
        """The bytes of manifest.json."""
        body = asdict(self)
        return json.dumps({**body, "sha256": _digest(body)}, indent=1, allow_nan=False).encode()

    def digest(self) -> str:
        """The SHA-256 that stands in manifest.json, and through it stands for every byte of the checkpoint."""
        return _digest(asdict(self))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the checkpoint in `folder`.

    Raises:
        DamagedCheckpoint: it is missing, unreadable, or not what was written.
        InputError: it is whole, but of another format version.
    """
    path = folder / MANIFEST
    try:
        body = json.loads(path.read_bytes())
        if body["format"] != FORMAT or body.pop("sha256") != _digest(body):
            raise ValueError("its SHA-256 does not match")
        if body["version"] == VERSION:
            return _parse(body)
    except OSError as error:
        raise DamagedCheckpoint(
            f"{path} cannot be read ({error.strerror}): this checkpoint is damaged, use the step before it."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(
            f"{path} is not what was written ({error}): this checkpoint is damaged, use the step before it."
        ) from error

    raise InputError(
        f"{folder} has checkpoint format version {body['version']}, and this partialfc reads version {VERSION}: "
        "use the partialfc that wrote it."
    )


def _parse(body: Mapping[str, Any]) -> Manifest:
    rows = {
        name: RowTensor(entry["dtype"], tuple(entry["shape"]), [Part(**part) for part in entry["parts"]])
        for name, entry in body["rows"].items()
    }
    for name, tensor in rows.items():
        tensor.check(name)
    files = {name: FileRecord(**entry) for name, entry in body["files"].items()}
    return Manifest(body["step"], body["state"], body["block_bytes"], rows, files)


def _digest(body: Mapping[str, Any]) -> str:
    """SHA-256 of `body` as JSON with sorted keys, no spaces, in ASCII: the same in every version of the format."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()
