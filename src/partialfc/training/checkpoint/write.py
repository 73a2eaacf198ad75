"""Writing checkpoints: folders `step-00001234` that any number of processes write together and any other number reads.

The format is described in docs/checkpoint-format.md. A checkpoint is written beside its final place and renamed when it
is complete, so that a folder with a step's name either is a whole checkpoint or was damaged afterwards.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from partialfc.core.errors import JobError
from partialfc.core.files import fsync
from partialfc.distributed.activity import activity
from partialfc.distributed.collectives import Group, Shard, gather_json
from partialfc.training.checkpoint.blocks import BLOCK_BYTES, VerifiedFiles, safetensors_pieces, write_hashed
from partialfc.training.checkpoint.format import MANIFEST, FileRecord, Manifest, Part, RowTensor, dtype_code
from partialfc.training.checkpoint.read import LEFTOVER, folder_name, is_whole, steps_in

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


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint.

    Attributes:
        step: optimizer steps done.
        tensors: groups of tensors that are the same on all ranks, as {"backbone": {name: tensor}, ...}; rank 0 writes
            each group as `<group>.safetensors`, any dtype of that format, strides, device and sharing of memory.
        rows: this rank's rows of the sharded tensors.
        state: what JSON holds, independent of the world size; of rank 0. Keys are strings; NaN is refused.
        documents: long JSON values (such as the names of identities), each an own file `<name>.json`; of rank 0.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    rows: RowTensors
    state: Mapping[str, Any]
    documents: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ValueError for what could not be read back as it was."""
        for name in (*self.tensors, *self.documents):
            if not _NAME.fullmatch(name) or name.startswith("head-") or f"{name}.json" == MANIFEST:
                raise ValueError(f"{name!r} cannot name a file of a checkpoint")
        for name, tensor in self.rows.tensors.items():
            if tensor.dim() == 0 or len(tensor) != len(self.rows.shard):
                raise ValueError(f"row tensor {name} has shape {tuple(tensor.shape)}, not {len(self.rows.shard)} rows")
        _check_json(self.state, "state")


def save_checkpoint(root: Path, snapshot: Snapshot, *, keep: int = 3, block_bytes: int = BLOCK_BYTES) -> Path:
    """Write a checkpoint, which appears under the name of its step only when all of it is on the storage.

    Every rank of `snapshot.rows.shard.group` calls this, and returns when the checkpoint is in place. A checkpoint of
    the same step is replaced. Six collectives of a few kilobytes; the tensors travel to the storage only.

    Args:
        root: the folder of checkpoints, on storage that all ranks share; made if missing.
        snapshot: what to write; no tensor in it is sharded by PyTorch.
        keep: how many whole checkpoints up to this step stay, at least 1; older ones are deleted.
        block_bytes: the unit of verification.

    Raises:
        CheckpointNotWritten: on all ranks alike, if any rank could not write (a full disk, say). Nothing of this step
            is left, and the checkpoints before it are untouched.
    """
    if keep < 1:
        raise ValueError("keep must be at least 1: the checkpoint just written is never deleted")
    group, is_leader = snapshot.rows.shard.group, snapshot.rows.shard.rank == 0
    token = _together("prepare", lambda: _prepare(root, snapshot), group)[0]
    writing = root / f".{folder_name(snapshot.step)}.{token}.writing"

    def complete() -> None:
        if is_leader:
            _commit(root, writing, _manifest(snapshot, block_bytes, reports), keep)

    try:
        with activity(f"writing {writing}"):
            reports = _together("write", lambda: _write_files(writing, snapshot, block_bytes), group)
        _together("complete", complete, group)
    except CheckpointNotWritten:
        if is_leader:
            shutil.rmtree(writing, ignore_errors=True)
        raise
    return root / folder_name(snapshot.step)


def _check_json(value: Any, name: str) -> None:
    """Raise ValueError for keys that JSON would turn into strings, and numbers that it does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}, which JSON cannot hold")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{name} has the key {key!r}, which is no string")
            _check_json(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(item, f"{name}[{index}]")


def _together(purpose: str, work: Callable[[], T], group: Group | None) -> list[T]:
    """The results of all ranks, on every rank; an error on any rank is raised on all. Two collectives."""
    cause: Exception | None = None
    outcome: dict[str, Any] = {"result": None, "error": None}
    try:
        outcome["result"] = work()
    except Exception as error:  # of any kind: the other ranks wait for the outcome of this one
        cause = error
        outcome["error"] = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    outcomes = gather_json(outcome, group=group)
    failures = [f"rank {rank}: {one['error']}" for rank, one in enumerate(outcomes) if one["error"] is not None]
    if failures:
        raise CheckpointNotWritten(f"could not {purpose} a checkpoint ({'; '.join(failures)})") from cause
    return [one["result"] for one in outcomes]


def _prepare(root: Path, snapshot: Snapshot) -> str:
    """Check the snapshot; on rank 0 remove the unfinished folders of dead runs, and choose a name none of them uses."""
    snapshot.check()
    if snapshot.rows.shard.rank != 0:
        return ""
    root.mkdir(parents=True, exist_ok=True)
    fsync(root.parent)
    _remove(root, ".writing")
    return secrets.token_hex(4)


def _write_files(folder: Path, snapshot: Snapshot, block_bytes: int) -> dict[str, Any]:
    """Write this rank's files and report in JSON what is in them. No collective."""
    folder.mkdir(exist_ok=True)  # on every rank: a network file system may show the folder of another rank late
    shard, files = snapshot.rows.shard, {}
    if shard.rank == 0:
        for group, tensors in snapshot.tensors.items():
            name = f"{group}.safetensors"
            files[name] = write_hashed(folder / name, safetensors_pieces(tensors, {"format": "pt"}), block_bytes)
        for document, value in snapshot.documents.items():
            name = f"{document}.json"
            encoded = json.dumps(value, indent=0, ensure_ascii=False, allow_nan=False).encode()
            files[name] = write_hashed(folder / name, [encoded], block_bytes)
    name = f"head-{shard.rank:05d}-of-{shard.world_size:05d}.safetensors"
    row_range = {"start": str(shard.start), "stop": str(shard.stop), "total": str(shard.total)}
    files[name] = write_hashed(folder / name, safetensors_pieces(snapshot.rows.tensors, row_range), block_bytes)
    return {
        "files": {name: asdict(record) for name, record in files.items()},
        "rows": {
            key: {"dtype": dtype_code(tensor.dtype), "shape": [shard.total, *tensor.shape[1:]]}
            for key, tensor in snapshot.rows.tensors.items()
        },
        "part": {"file": name, "start": shard.start, "stop": shard.stop},
    }


def _manifest(snapshot: Snapshot, block_bytes: int, reports: list[dict[str, Any]]) -> Manifest:
    """The manifest of what all ranks report to have written."""
    files = {name: FileRecord(**record) for report in reports for name, record in report["files"].items()}
    return Manifest(snapshot.step, snapshot.state, block_bytes, _merge_rows(reports), files)


def _commit(root: Path, writing: Path, manifest: Manifest, keep: int) -> None:
    """Write the manifest last, flush and rename the folder, and delete the oldest checkpoints."""
    VerifiedFiles(writing, manifest).check_sizes()  # fails if a rank wrote to a disk of its own
    write_hashed(writing / MANIFEST, [manifest.encode()])
    fsync(writing)
    final = root / folder_name(manifest.step)
    if final.exists():
        os.rename(final, _old_name(final))
    os.rename(writing, final)
    fsync(root)
    try:
        _retire(root, manifest.step, keep)
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
    """Delete what is older than the last `keep` whole checkpoints up to `step`. Later steps stay.

    A checkpoint is renamed first, so that a half-deleted one does not bear the name of a step.
    """
    steps = [earlier for earlier in steps_in(root) if earlier <= step]
    whole = [earlier for earlier in steps if is_whole(root / folder_name(earlier))]
    for earlier in steps:
        if len(whole) > keep and earlier < whole[-keep]:
            folder = root / folder_name(earlier)
            os.rename(folder, _old_name(folder))
    _remove(root, ".old")


def _remove(root: Path, suffix: str) -> None:
    for path in root.iterdir():
        if LEFTOVER.fullmatch(path.name) and path.suffix == suffix:
            shutil.rmtree(path, ignore_errors=True)


def _old_name(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.old")
