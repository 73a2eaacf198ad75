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

from partialfc.checkpoint.blocks import BLOCK_BYTES, VerifiedFiles, safetensors_pieces, write_hashed
from partialfc.checkpoint.format import MANIFEST, FileRecord, Manifest, Part, RowTensor, dtype_code
from partialfc.checkpoint.read import folder_name, is_whole, leftovers, steps_in
from partialfc.core.errors import JobError
from partialfc.core.files import NO_UTF8, fsync
from partialfc.distributed.activity import activity
from partialfc.distributed.collectives import Group, Shard, gather_json

_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_logger = logging.getLogger(__name__)
T = TypeVar("T")


class CheckpointNotWritten(JobError):
    """A checkpoint could not be written, on any rank. The checkpoints before it are untouched."""


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint.

    Attributes:
        step: optimizer steps done.
        tensors: groups of tensors that are the same on all ranks, as {"backbone": {name: tensor}, ...}; rank 0 writes
            each group as `<group>.safetensors`, any dtype of that format, strides, device and sharing of memory.
        shard: the range of global rows that this rank has.
        rows: tensors that are sharded by row, each (len(shard), ...) here. All ranks name the same tensors, with the
            same dtypes and the same shapes after the first dimension.
        state: what JSON holds, independent of the world size; of rank 0. Keys are strings; NaN is refused.
        documents: long JSON values (such as the names of identities), each an own file `<name>.json`; of rank 0.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    shard: Shard
    rows: Mapping[str, Tensor]
    state: Mapping[str, Any]
    documents: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ValueError for what could not be read back as it was."""
        for name in (*self.tensors, *self.documents):
            if not _NAME.fullmatch(name) or name.startswith("head-") or f"{name}.json" == MANIFEST:
                raise ValueError(f"{name!r} cannot name a file of a checkpoint")
        for name, tensor in self.rows.items():
            if tensor.dim() == 0 or len(tensor) != len(self.shard):
                raise ValueError(f"row tensor {name} has shape {tuple(tensor.shape)}, not {len(self.shard)} rows")
        _check_json(self.state, "state")


def save_checkpoint(root: Path, snapshot: Snapshot, *, keep: int = 3, block_bytes: int = BLOCK_BYTES) -> Path:
    """`save_folder` under the name of the snapshot's step in `root`, which deletes older checkpoints there.

    Args:
        root: the folder of checkpoints, on storage that all ranks share; made if missing.
        keep: how many whole checkpoints up to this step stay, at least 1.
    """
    if keep < 1:
        raise ValueError("keep must be at least 1: the checkpoint just written is never deleted")
    folder = root / folder_name(snapshot.step)
    save_folder(folder, snapshot, keep=keep, block_bytes=block_bytes)
    return folder


def save_folder(folder: Path, snapshot: Snapshot, *, keep: int | None = None, block_bytes: int = BLOCK_BYTES) -> None:
    """Write a checkpoint, which appears as `folder` only when all of it is on the storage.

    Every rank of `snapshot.shard.group` calls this, and returns when the checkpoint is in place. An existing folder is
    replaced. Six collectives of a few kilobytes; the tensors travel to the storage only.

    Args:
        folder: on storage that all ranks share; its parent is made if missing.
        snapshot: what to write; no tensor in it is sharded by PyTorch.
        keep: for the folder of a step, how many whole ones up to this step stay beside it; None for all.
        block_bytes: the unit of verification.

    Raises:
        CheckpointNotWritten: on all ranks alike, if any rank could not write (a full disk, say). Nothing new is left,
            and an existing folder is untouched.
    """
    group = snapshot.shard.group
    token = _together("prepare", lambda: _prepare(folder, snapshot), group)[0]
    writing = folder.with_name(f".{folder.name}.{token}.writing")

    try:
        with activity(f"writing {writing}"):
            reports = _together("write", lambda: _write_files(writing, snapshot, block_bytes), group)
        _together("complete", lambda: _commit(folder, writing, snapshot, block_bytes, reports, keep), group)
    except CheckpointNotWritten:
        if snapshot.shard.rank == 0:
            shutil.rmtree(writing, ignore_errors=True)
        raise


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


def _prepare(folder: Path, snapshot: Snapshot) -> str:
    """Check the snapshot; on rank 0 remove the unfinished folders of dead runs, and choose a name none of them uses."""
    snapshot.check()
    if snapshot.shard.rank != 0:
        return ""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fsync(folder.parent.parent)
    _remove_leftovers(folder, "writing")
    return secrets.token_hex(4)


def _write_files(folder: Path, snapshot: Snapshot, block_bytes: int) -> dict[str, Any]:
    """Write this rank's files and report in JSON what is in them. No collective."""
    folder.mkdir(exist_ok=True)  # on every rank: a network file system may show the folder of another rank late
    shard, files = snapshot.shard, {}
    if shard.rank == 0:
        for group, tensors in snapshot.tensors.items():
            name = f"{group}.safetensors"
            files[name] = write_hashed(folder / name, safetensors_pieces(tensors, {"format": "pt"}), block_bytes)
        for document, value in snapshot.documents.items():
            name = f"{document}.json"
            encoded = json.dumps(value, indent=0, ensure_ascii=False, allow_nan=False).encode("utf-8", NO_UTF8)
            files[name] = write_hashed(folder / name, [encoded], block_bytes)
    name = f"head-{shard.rank:05d}-of-{shard.world_size:05d}.safetensors"
    row_range = {"start": str(shard.start), "stop": str(shard.stop), "total": str(shard.total)}
    files[name] = write_hashed(folder / name, safetensors_pieces(snapshot.rows, row_range), block_bytes)
    return {
        "files": {name: asdict(record) for name, record in files.items()},
        "rows": {
            key: {"dtype": dtype_code(tensor.dtype), "shape": [shard.total, *tensor.shape[1:]]}
            for key, tensor in snapshot.rows.items()
        },
        "part": {"file": name, "start": shard.start, "stop": shard.stop},
    }


def _manifest(snapshot: Snapshot, block_bytes: int, reports: list[dict[str, Any]]) -> Manifest:
    """The manifest of what all ranks report to have written."""
    if any(report["rows"] != reports[0]["rows"] for report in reports):
        raise ValueError(f"the ranks do not agree on the row tensors: {[report['rows'] for report in reports]}")
    parts = [Part(**report["part"]) for report in reports if report["part"]["start"] < report["part"]["stop"]]
    rows = {name: RowTensor(entry["dtype"], tuple(entry["shape"]), parts) for name, entry in reports[0]["rows"].items()}
    files = {name: FileRecord(**record) for report in reports for name, record in report["files"].items()}
    return Manifest(snapshot.step, snapshot.state, block_bytes, rows, files)


def _commit(
    folder: Path, writing: Path, snapshot: Snapshot, block_bytes: int, reports: list[dict[str, Any]], keep: int | None
) -> None:
    """On rank 0 write the manifest last, flush and rename the folder, and delete the oldest checkpoints."""
    if snapshot.shard.rank != 0:
        return
    manifest = _manifest(snapshot, block_bytes, reports)
    VerifiedFiles(writing, manifest).check_sizes()  # fails if a rank wrote to a disk of its own
    write_hashed(writing / MANIFEST, [manifest.encode()])
    fsync(writing)
    if folder.exists():
        os.rename(folder, _old_name(folder))
    os.rename(writing, folder)
    fsync(folder.parent)
    try:
        _retire(folder, snapshot.step, keep)
    except OSError as error:
        _logger.warning("old checkpoints at %s could not be deleted (%s); this fills the disk", folder, error)


def _retire(folder: Path, step: int, keep: int | None) -> None:
    """Delete what `folder` replaced and, unless `keep` is None, what is older than the last `keep` whole checkpoints.

    Later steps stay. A checkpoint is renamed first, so that a half-deleted one does not bear the name of a step.
    """
    if keep is not None:
        root = folder.parent
        steps = [earlier for earlier in steps_in(root) if earlier <= step]
        whole = [earlier for earlier in steps if is_whole(root / folder_name(earlier))]
        for earlier in steps:
            if len(whole) > keep and earlier < whole[-keep]:
                os.rename(root / folder_name(earlier), _old_name(root / folder_name(earlier)))
    _remove_leftovers(folder, "old")


def _remove_leftovers(folder: Path, suffix: str) -> None:
    for path in leftovers(folder, suffix):
        shutil.rmtree(path, ignore_errors=True)


def _old_name(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.old")
