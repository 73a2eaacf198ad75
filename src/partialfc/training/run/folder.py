"""The folder of a run: who may write there, and what is where."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from partialfc.config.options import FREE_KEYS, TrainConfig
from partialfc.core.errors import InputError
from partialfc.distributed.collectives import Group, gather_json, rank_of
from partialfc.training.run.lock import LOCK, FolderLock

_LISTED = 8  # ranks named in one message
_SECONDS_TO_SEE = 20.0  # a network file system may show a new file late


@dataclass(frozen=True)
class RunFolder:
    """`config.yaml`, `metrics.jsonl`, `checkpoints/` and `model/{best,last}/` under one root."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def has_metrics(self) -> bool:
        """Whether the run has logged anything."""
        return self.metrics.is_file() and self.metrics.stat().st_size > 0

    def model(self, which: str) -> Path:
        """The folder of the "best" or "last" model."""
        return self.root / "model" / which


@contextmanager
def open_run_folder(
    root: Path, config: TrainConfig, *, resume: bool, group: Group | None = None
) -> Iterator[RunFolder]:
    """Make the folder of a new run, or check that the run in it can be continued; locked until the end.

    Eight collectives.

    Raises:
        InputError: on all ranks alike. The folder holds something and is not to be resumed, or the run in it had
            another configuration, or another process is at work in it, or not all ranks see it.
    """
    folder = RunFolder(root)
    with ExitStack() as held:
        _refuse_together(lambda: _check(folder, config, resume), group)  # every rank looks before rank 0 writes
        locks: list[FolderLock] = []
        _refuse_together(lambda: _take(folder, config, held, locks) if rank_of(group) == 0 else None, group)
        _check_shared(root, root / LOCK, locks[0].content if locks else None)
        yield folder


def _refuse_together(work: Callable[[], None], group: Group | None) -> None:
    """Do `work`; what it refuses on any rank is refused on all. Two collectives."""
    message = None
    try:
        work()
    except InputError as error:
        message = str(error)
    except OSError as error:
        place = error.filename or "The run folder"
        message = f"{place} cannot be used ({error.strerror}): give another folder with --out."
    refusals = [each for each in gather_json(message, group=group) if each is not None]
    if refusals:
        raise InputError(refusals[0])


def _take(folder: RunFolder, config: TrainConfig, held: ExitStack, locks: list[FolderLock]) -> None:
    folder.root.mkdir(parents=True, exist_ok=True)
    locks.append(held.enter_context(FolderLock(folder.root)))
    beside = folder.config.with_name(f".{folder.config.name}.writing")
    try:  # the old one stays until the new one is whole: a full disk must not cost a run its configuration
        beside.write_text(config.to_yaml(), encoding="utf-8")
        os.replace(beside, folder.config)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise InputError(f"{folder.config} cannot be written ({error.strerror}): make room, or give --out.") from error


def _check(folder: RunFolder, config: TrainConfig, resume: bool) -> None:
    root = folder.root
    if root.is_file():
        raise InputError(f"{root} is a file: give another folder with --out.")
    if not root.is_dir() or all(path.name == LOCK for path in root.iterdir()):
        return
    if not folder.config.is_file():
        raise InputError(f"{root} is not empty and holds no run: give another folder with --out.")
    if not folder.checkpoints.exists() and not folder.has_metrics():
        return  # a run that failed before its first step
    if not resume:
        raise InputError(f"{root} holds another run: continue it with --resume, or give another folder with --out.")
    key = differing_key(with_defaults(_read_config(folder.config)), config.to_dict())
    if key is not None:
        raise InputError(
            f"{root} holds a run with another {key}: resume with the configuration in {folder.config}, "
            "or give another folder with --out."
        )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable as YAML: restore it, or give another folder with --out.") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no configuration: restore it, or give another folder with --out.")
    return values


def with_defaults(values: dict[str, Any], defaults: dict[str, Any] | None = None) -> dict[str, Any]:
    """A configuration that may have been written before some options existed, with those options' defaults."""
    complete = TrainConfig().to_dict() if defaults is None else dict(defaults)
    for key, value in values.items():
        inner = complete.get(key)
        complete[key] = with_defaults(value, inner) if isinstance(value, dict) and isinstance(inner, dict) else value
    return complete


def differing_key(
    old: dict[str, Any], new: dict[str, Any], prefix: str = "", *, free: frozenset[str] = FREE_KEYS
) -> str | None:
    """The first dotted key, free ones aside, at which two nested configurations differ."""
    for key in {**old, **new}:
        name = prefix + key
        left, right = old.get(key), new.get(key)
        if name in free or left == right:
            continue
        if isinstance(left, dict) and isinstance(right, dict):
            inner = differing_key(left, right, name + ".", free=free)
            if inner is None:
                continue
            return inner
        return name
    return None


def _check_shared(folder: Path, marker: Path, content: str | None) -> None:
    """Whether all ranks see the file that rank 0 has written into the folder. Four collectives.

    Args:
        folder: of the run.
        marker: the file; rank 0 does not open it, since that would give up the lock on it.
        content: what is in it, on rank 0.

    Raises:
        InputError: on all ranks, naming those that do not see it.
    """
    host, root, written = gather_json([socket.gethostname(), str(folder), content])[0]
    blind = None if rank_of() == 0 or _sees(marker, written) else socket.gethostname()
    hosts = {rank: name for rank, name in enumerate(gather_json(blind)) if name is not None}
    if hosts:
        named = ", ".join(f"rank {rank} on {name}" for rank, name in list(hosts.items())[:_LISTED])
        raise InputError(
            f"{named} cannot see what rank 0 on {host} writes to {root}: give a folder on storage that all hosts "
            "share with --out."
        )


def _sees(marker: Path, content: str) -> bool:
    until = time.monotonic() + _SECONDS_TO_SEE
    while True:
        with suppress(OSError, UnicodeDecodeError):
            os.listdir(marker.parent)  # which makes a network file system look again
            if marker.read_text(encoding="utf-8") == content:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
