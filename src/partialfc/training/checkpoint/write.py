"""Checkpoints: folders `step-00001234` that any number of processes write together and any other number reads.

The format is described in docs/checkpoint-format.md. A checkpoint holds tensors that all ranks share (written once,
by rank 0), tensors of rows (each rank writes its own, as a range of the global rows), JSON documents, and a manifest
with the SHA-256 of every block of every file. It is written beside its final place and renamed when it is whole, so
that a folder with a step's name either is a whole checkpoint or was damaged afterwards.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from partialfc.core.errors import JobError
from partialfc.distributed.activity import activity
from partialfc.distributed.collectives import Group, Shard, gather_json
from partialfc.training.checkpoint.format import (
    BLOCK_BYTES,
    DamagedCheckpoint,
    FileRecord,
    VerifiedFiles,
    dtype_code,
    flush_folder,
    safetensors_pieces,
    write_file,
)
from partialfc.training.checkpoint.manifest import MANIFEST, Manifest, Part, RowTensor
from partialfc.training.checkpoint.read import LEFTOVER, Checkpoint, folder_name, is_whole, load_latest, steps_in

__all__ = ["Checkpoint", "CheckpointNotWritten", "DamagedCheckpoint", "RowTensors", "load_latest", "save_checkpoint"]

_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_logger = logging.getLogger(__name__)
T = TypeVar("T")


class CheckpointNotWritten(JobError):
    """A checkpoint could not be written, on any rank. The checkpoints before it are untouched."""


@dataclass(frozen=True)
class RowTensors:
    """This rank's rows of tensors that are sharded by row: each of `tensors` is (len(shard), ...).

    All ranks name the same tensors, with the same dtypes and the same shapes after the first dimension.
    """

    shard: Shard
    tensors: Mapping[str, Tensor]


def save_checkpoint(
    root: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    rows: RowTensors,
    state: Mapping[str, Any],
    documents: Mapping[str, Any] | None = None,
    keep: int = 3,
    block_bytes: int = BLOCK_BYTES,
) -> Path:
    """Write the checkpoint of `step`, which appears under its name only when all of it is on the disk.

    Every rank of `rows.shard.group` calls this, and returns when the checkpoint is in place. A checkpoint of the same
    step is replaced. Six collectives of a few kilobytes; the tensors travel to the storage only.

    Args:
        root: the folder of checkpoints, on storage that all ranks share; made if missing.
        step: optimizer steps done.
        tensors: groups of tensors that are the same on all ranks, as {"backbone": {name: tensor}, ...}; rank 0 writes
            each group as `<group>.safetensors`, any dtype of that format, strides, device and sharing of memory.
        rows: this rank's rows of the sharded tensors.
        state: what JSON holds, independent of the world size; of rank 0. Keys are strings; NaN is refused.
        documents: long JSON values (such as the names of identities), each an own file `<name>.json`; of rank 0.
        keep: how many whole checkpoints up to this step stay, at least 1; older ones are deleted.
        block_bytes: the unit of verification.

    Raises:
        CheckpointNotWritten: on all ranks alike, if any rank could not write (a full disk, say). Nothing of this step
            is left, and the checkpoints before it are untouched.
    """
    contents = _Contents(step, tensors, rows, state, documents or {}, block_bytes)
    if keep < 1:
        raise ValueError("keep must be at least 1: the checkpoint just written is never deleted")
    group, leader = rows.shard.group, rows.shard.rank == 0
    token = _together("prepare", lambda: _prepare(root, contents), group)[0]
    writing = root / f".{folder_name(step)}.{token}.writing"
    try:
        with activity(f"writing {writing}"):
            reports = _together("write", lambda: _write_files(writing, contents), group)
        _together("complete", lambda: _commit(root, writing, contents, reports, keep) if leader else None, group)
    except CheckpointNotWritten:
        if leader:
            shutil.rmtree(writing, ignore_errors=True)
        raise
    return root / folder_name(step)


@dataclass(frozen=True)
class _Contents:
    """The arguments of `save_checkpoint` that end up in files."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    rows: RowTensors
    state: Mapping[str, Any]
    documents: Mapping[str, Any]
    block_bytes: int

    def check(self) -> None:
        """Refuse what could not be read back as it was."""
        for name in (*self.tensors, *self.documents):
            if not _NAME.fullmatch(name) or name.startswith("head-") or f"{name}.json" == MANIFEST:
                raise ValueError(f"{name!r} cannot name a file of a checkpoint")
        for name, tensor in self.rows.tensors.items():
            if tensor.dim() == 0 or len(tensor) != len(self.rows.shard):
                raise ValueError(f"row tensor {name} has shape {tuple(tensor.shape)}, not {len(self.rows.shard)} rows")
        _check_json(self.state, "state")


def _check_json(value: Any, name: str) -> None:
    """Raise ValueError for keys that JSON would turn into strings, and numbers that it does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}, which JSON cannot hold")
    if isinstance(value, Mapping):
        for key, each in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{name} has the key {key!r}, which is no string")
            _check_json(each, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for place, each in enumerate(value):
            _check_json(each, f"{name}[{place}]")


def _together(purpose: str, work: Callable[[], T], group: Group | None) -> list[T]:
    """The results of all ranks, on every rank; an error on any rank is raised on all. Two collectives."""
    cause: Exception | None = None
    outcome: dict[str, Any] = {"result": None, "error": None}
    try:
        outcome["result"] = work()
    except Exception as error:  # whatever it is, the other ranks wait for this one's answer
        cause = error
        outcome["error"] = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    outcomes = gather_json(outcome, group=group)
    failures = [f"rank {rank}: {each['error']}" for rank, each in enumerate(outcomes) if each["error"] is not None]
    if failures:
        raise CheckpointNotWritten(f"could not {purpose} a checkpoint ({'; '.join(failures)})") from cause
    return [each["result"] for each in outcomes]


def _prepare(root: Path, contents: _Contents) -> str:
    """Check; on rank 0 remove what dead runs left unfinished, and choose a name that none of them still writes to."""
    contents.check()
    if contents.rows.shard.rank != 0:
        return ""
    root.mkdir(parents=True, exist_ok=True)
    flush_folder(root.parent)
    _remove(root, ".writing")
    return secrets.token_hex(4)


def _write_files(folder: Path, contents: _Contents) -> dict[str, Any]:
    """Write this rank's files and say what is in them, in JSON. No collective: it may run in a thread."""
    folder.mkdir(exist_ok=True)  # each rank for itself: on a network file system another's folder may show late
    shard, sizes = contents.rows.shard, contents.block_bytes
    files = {}
    if shard.rank == 0:
        for group, tensors in contents.tensors.items():
            name = f"{group}.safetensors"
            files[name] = write_file(folder / name, safetensors_pieces(tensors, {"format": "pt"}), sizes)
        for document, value in contents.documents.items():
            name = f"{document}.json"
            encoded = json.dumps(value, indent=0, ensure_ascii=False, allow_nan=False).encode()
            files[name] = write_file(folder / name, [encoded], sizes)
    name = f"head-{shard.rank:05d}-of-{shard.world_size:05d}.safetensors"
    place = {"start": str(shard.start), "stop": str(shard.stop), "total": str(shard.total)}
    files[name] = write_file(folder / name, safetensors_pieces(contents.rows.tensors, place), sizes)
    return {
        "files": {name: asdict(record) for name, record in files.items()},
        "rows": {
            key: {"dtype": dtype_code(tensor.dtype), "shape": [shard.total, *tensor.shape[1:]]}
            for key, tensor in contents.rows.tensors.items()
        },
        "part": {"file": name, "start": shard.start, "stop": shard.stop},
    }


def _commit(root: Path, writing: Path, contents: _Contents, reports: list[dict[str, Any]], keep: int) -> None:
    """Rank 0's part after all files are written: manifest, flush, rename, and the end of the oldest checkpoints."""
    files = {name: FileRecord(**record) for report in reports for name, record in report["files"].items()}
    manifest = Manifest(contents.step, contents.state, contents.block_bytes, _merge_rows(reports), files)
    VerifiedFiles(writing, files, contents.block_bytes).check_sizes()  # fails if a rank wrote to a disk of its own
    write_file(writing / MANIFEST, [manifest.encode()])
    flush_folder(writing)
    final = root / folder_name(contents.step)
    if final.exists():
        os.rename(final, _old_name(final))
    os.rename(writing, final)
    flush_folder(root)
    try:
        _retire(root, contents.step, keep)
    except OSError as error:
        _logger.warning("old checkpoints in %s could not be deleted (%s); this fills the disk", root, error)


def _merge_rows(reports: list[dict[str, Any]]) -> dict[str, RowTensor]:
    """For each row tensor its dtype, global shape, and the files that hold its rows."""
    rows = reports[0]["rows"]
    if any(report["rows"] != rows for report in reports):
        raise ValueError(f"the ranks do not agree on the row tensors: {[report['rows'] for report in reports]}")
    parts = [Part(**report["part"]) for report in reports if report["part"]["start"] < report["part"]["stop"]]
    merged = {name: RowTensor(entry["dtype"], tuple(entry["shape"]), parts) for name, entry in rows.items()}
    for name, tensor in merged.items():
        tensor.check(name)
    return merged


def _retire(root: Path, step: int, keep: int) -> None:
    """Delete all that is older than the last `keep` whole checkpoints up to `step`. Steps past it are left alone.

    A checkpoint loses its name first, so that a half-deleted one does not bear the name of a step.
    """
    steps = [each for each in steps_in(root) if each <= step]
    whole = [each for each in steps if is_whole(root / folder_name(each))]
    for each in steps:
        if len(whole) > keep and each < whole[-keep]:
            folder = root / folder_name(each)
            os.rename(folder, _old_name(folder))
    _remove(root, ".old")


def _remove(root: Path, kind: str) -> None:
    for path in root.iterdir():
        if LEFTOVER.fullmatch(path.name) and path.suffix == kind:
            shutil.rmtree(path, ignore_errors=True)


def _old_name(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.old")
