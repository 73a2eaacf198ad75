"""Reading checkpoints: an opened folder, and the choice of the newest whole one that all ranks agree on."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from partialfc.checkpoint.blocks import VerifiedFiles
from partialfc.checkpoint.format import DTYPES, DamagedCheckpoint, dtype_code, read_manifest
from partialfc.core.errors import InputError
from partialfc.distributed.collectives import gather_json, rank_of

STEP_FOLDER = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.(.+)\.[0-9a-f]{8}\.(writing|old)")
_logger = logging.getLogger(__name__)
T = TypeVar("T")


class Checkpoint(VerifiedFiles):
    """An opened checkpoint. Its manifest is checked when it is opened, and every byte when it is read.

    Attributes:
        step: optimizer steps done.
        state: what the writer passed as `state`.
        row_shapes: global shape of each row tensor, (total rows, ...).
        row_dtypes: the dtype of each.
        digest: SHA-256 of the manifest, which covers every byte of the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        """Read the manifest and the sizes of the files.

        Raises:
            DamagedCheckpoint: there is no whole checkpoint.
            InputError: it has another format version.
        """
        manifest = read_manifest(folder)
        super().__init__(folder, manifest)
        self.check_sizes()
        self.step = manifest.step
        self.state = dict(manifest.state)
        self.digest = manifest.digest()
        self.row_shapes = {name: tensor.shape for name, tensor in manifest.rows.items()}
        self.row_dtypes = {name: DTYPES[tensor.dtype] for name, tensor in manifest.rows.items()}
        self._rows = manifest.rows

    def tensors(self, group: str) -> dict[str, Tensor]:
        """The tensors of one group, on the CPU; a group that was not saved is empty."""
        name = f"{group}.safetensors"
        return {key: self.tensor(name, key) for key in self.layout(name)} if name in self.records else {}

    def document(self, name: str) -> Any:
        """The JSON document of that name, or None if none was saved."""
        file = f"{name}.json"
        return json.loads(self.content(file)) if file in self.records else None

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Global rows [start, stop) of a row tensor: (stop - start, ...) on the CPU. See `read_rows`."""
        result = torch.empty((stop - start, *self.row_shapes[name][1:]), dtype=self.row_dtypes[name])
        self.read_rows(name, start, result)
        return result

    def read_rows(self, name: str, start: int, target: Tensor) -> None:
        """Fill `target`, on any device, with the global rows of a row tensor from `start` on.

        Reads and verifies only the blocks that hold these rows, and the headers of their files. Rows for a device
        pass through the host in pieces.

        Raises:
            ValueError: `target` has another dtype or row shape, or there are no such rows.
            DamagedCheckpoint: a block differs from what was written; `target` may be filled in part.
        """
        stored, stop = self._rows[name], start + len(target)
        if (stored.dtype, stored.shape[1:]) != (dtype_code(target.dtype), target.shape[1:]):
            raise ValueError(
                f"{name} is {stored.dtype} {stored.shape}; {target.dtype} {target.shape} cannot hold rows of it"
            )
        if not 0 <= start <= stop <= stored.shape[0]:
            raise ValueError(f"rows {start} to {stop} of {name} do not exist: it has {stored.shape[0]}")
        for part in stored.parts:
            first, last = max(start, part.start), min(stop, part.stop)
            if first < last:
                self.fill(target.detach()[first - start : last - start], part.file, name, first - part.start)

    @property
    def extent(self) -> tuple[int, int]:
        """The number of its files, without the manifest, and of their bytes."""
        return len(self.records), sum(record.size for record in self.records.values())


def load_latest(
    root: Path,
    read: Callable[[Checkpoint], T],
    *,
    warn: Callable[[str], None] = _logger.warning,
) -> T | None:
    """The result of `read` for the newest whole checkpoint, the same one on every rank; None if there is no checkpoint.

    `read` takes from the checkpoint what its rank needs. If any rank finds damage in that, all ranks go on to the
    checkpoint before. So `read` may be called more than once: it may overwrite tensors, but not rely on their old
    values. Two collectives, and two for each checkpoint tried.

    Args:
        root: the folder of checkpoints.
        read: called with the opened checkpoint on every rank; it must not communicate.
        warn: called on rank 0 with a sentence about every checkpoint that is refused.

    Raises:
        InputError: there are checkpoints and all are damaged, or one is of another format version, or the ranks see
            different checkpoints.
    """
    candidates, newest = gather_json(_candidates(root))[0], ""
    for name in candidates:
        digest = damage = None
        try:
            checkpoint = Checkpoint(root / name)
            result, digest = read(checkpoint), checkpoint.digest
        except DamagedCheckpoint as error:
            damage = str(error)
        digests, damages = (set(values) - {None} for values in zip(*gather_json([digest, damage]), strict=True))
        if not damages:
            if len(digests) > 1:
                raise InputError(f"The ranks see different checkpoints in {root}: put it on storage that all share.")
            return result
        newest = newest or min(damages)
        if rank_of() == 0:
            for message in sorted(damages):
                warn(message)
    if candidates:
        reason = newest.partition(": this checkpoint is damaged")[0]
        raise InputError(
            f"All checkpoints in {root} are damaged (of the newest, {reason}): restore one from a copy, or start in a "
            "new folder."
        )
    return None


def folder_name(step: int) -> str:
    """The name of a step's folder."""
    return f"step-{step:08d}"


def leftovers(folder: Path, suffix: str) -> list[Path]:
    """What interrupted writes of `folder` left beside it, or those of all steps in its root if it is that of a step.

    Args:
        suffix: "writing" for unfinished folders, "old" for replaced ones.
    """
    is_step = STEP_FOLDER.fullmatch(folder.name)
    return [
        path
        for path in folder.parent.iterdir()
        if (match := _LEFTOVER.fullmatch(path.name)) and match[2] == suffix
        if match[1] == folder.name or (is_step and STEP_FOLDER.fullmatch(match[1]))
    ]


def steps_in(root: Path) -> list[int]:
    """The steps that have a folder in `root`, ascending; none if there is no such folder."""
    names = [path.name for path in root.iterdir()] if root.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := STEP_FOLDER.fullmatch(name)))


def _candidates(root: Path) -> list[str]:
    """Names of the folders that may be checkpoints, the best to resume from first.

    A folder renamed for its deletion comes last among those of its step: it is needed if a process died between the two
    renames that replace a step.
    """
    candidates = []
    for name in [path.name for path in root.iterdir()] if root.is_dir() else []:
        if match := STEP_FOLDER.fullmatch(name):
            candidates.append((int(match[1]), True, name))
        elif (match := _LEFTOVER.fullmatch(name)) and match[2] == "old" and (step := STEP_FOLDER.fullmatch(match[1])):
            candidates.append((int(step[1]), False, name))
    return [name for _, _, name in sorted(candidates, reverse=True)]


def is_whole(folder: Path) -> bool:
    """Whether the manifest is whole and every file has its size (the contents are checked when they are read)."""
    try:
        Checkpoint(folder)
    except InputError:
        return False
    return True
