"""Opening the folder of a run: it is new or can be continued, one run at a time is in it, and all ranks see it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any, TypeVar

from partialfc.checkpoint.read import steps_in
from partialfc.config.options import FREE_KEYS, TrainConfig, flatten
from partialfc.core.errors import InputError
from partialfc.core.files import write_file
from partialfc.distributed.collectives import gather_json, rank_of
from partialfc.training.run.read import RunFolder, read_settings

LOCK = ".lock"
_RANKS_NAMED = 8  # at most, in one message
_SECONDS_TO_SEE = 20.0  # a network file system may show a new file late
T = TypeVar("T")


@contextlib.contextmanager
def open_run_folder(root: Path, config: TrainConfig, *, resume: bool) -> Iterator[RunFolder]:
    """Make the folder of a new run, or check that the run in it can be continued; locked until the end.

    Eight collectives.

    Raises:
        InputError: on all ranks alike. The folder holds something and is not to be resumed, or the run in it had
            another configuration, or another process is at work in it, or not all ranks see it.
    """
    folder = RunFolder(root)
    with contextlib.ExitStack() as stack:
        _on_all_ranks(lambda: _check(folder, config, resume))  # every rank checks before rank 0 writes
        content = _on_all_ranks(lambda: _claim(folder, config, stack) if rank_of() == 0 else None)
        _check_shared(root, content)
        yield folder


def _on_all_ranks(work: Callable[[], T]) -> T | None:
    """The result of `work`; an InputError or OSError on any rank is an InputError on all. Two collectives."""
    result, message = None, None
    try:
        result = work()
    except InputError as error:
        message = str(error)
    except OSError as error:
        path = error.filename or "The run folder"
        message = f"{path} cannot be used ({error.strerror}): give another folder with --out."
    refusals = [refusal for refusal in gather_json(message) if refusal is not None]
    if refusals:
        raise InputError(refusals[0])
    return result


def _claim(folder: RunFolder, config: TrainConfig, stack: contextlib.ExitStack) -> str:
    """Make and lock the folder and write the configuration; the content of the lock file."""
    folder.root.mkdir(parents=True, exist_ok=True)
    content = stack.enter_context(lock_folder(folder.root))
    try:
        folder.checkpoints.mkdir(exist_ok=True)  # if it is gone later, somebody has removed the checkpoints
        write_file(folder.config, config.to_yaml())
    except OSError as error:
        raise InputError(f"{folder.config} cannot be written ({error.strerror}): make room, or give --out.") from error
    return content


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[str]:
    """Lock a folder for this process; yields the content of the lock file, which is never the same twice.

    It is a record lock of the operating system on the file `.lock`, which names host and process: it ends with the
    process, however that ends. Network file systems keep these locks too, and the processes that read the data, which
    may live a moment longer, do not inherit them. On storage without locks, nothing is locked: training is not refused
    there. The process that holds the lock must not open the file a second time: closing that would release the lock.

    Raises:
        InputError: another process holds the lock; the message names it.
    """
    with (folder / LOCK).open("a+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise InputError(
                f"{folder} is in use by another run ({_describe(file.read())}): wait for it or stop it, or give "
                "another folder with --out."
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        content = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)})
        file.truncate(0)
        with contextlib.suppress(OSError):  # on a full disk the lock stays empty, and the next write reports the error
            os.write(file.fileno(), content.encode())
            os.fsync(file.fileno())  # other hosts read it
        yield content


def _describe(content: bytes) -> str:
    try:
        holder = json.loads(content)
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "a process that has not given its name"


def _check(folder: RunFolder, config: TrainConfig, resume: bool) -> None:
    root = folder.root
    if root.is_file():
        raise InputError(f"{root} is a file: give another folder with --out.")
    if not root.is_dir() or all(path.name == LOCK for path in root.iterdir()):
        return
    if not folder.config.is_file():
        if folder.checkpoints.exists():
            raise InputError(f"{folder.config} is missing: restore it from a copy, or give another folder with --out.")
        raise InputError(f"{root} is not empty and holds no run: give another folder with --out.")
    settings = read_settings(folder.config)[1]
    has_run = folder.metrics.is_file() or folder.checkpoints.exists()
    if not has_run and (missing := flatten(TrainConfig().to_dict()).keys() - flatten(settings).keys()):
        raise InputError(
            f"{folder.config} was not written by a run (it lacks {min(missing)}) and would be replaced: give another "
            "folder with --out."
        )
    if not folder.checkpoints.exists() and any(root.glob("model/*/*")):
        raise InputError(
            f"{root} holds a model but no checkpoint, and a new run would replace it: give another folder with --out."
        )
    has_metrics = folder.metrics.is_file() and folder.metrics.stat().st_size > 0
    if not steps_in(folder.checkpoints) and not has_metrics:
        return  # a run that failed before its first step
    if not resume:
        raise InputError(f"{root} holds another run: continue it with --resume, or give another folder with --out.")
    # Options that did not exist when the configuration was written have their defaults.
    stored = flatten(TrainConfig().to_dict()) | flatten(settings)
    key = differing_key(stored, flatten(config.to_dict()), FREE_KEYS)
    if key is not None:
        raise InputError(
            f"{root} holds a run with another {key}: resume with the configuration in {folder.config}, "
            "or give another folder with --out."
        )


def differing_key(old: Mapping[str, Any], new: Mapping[str, Any], free: Set[str]) -> str | None:
    """The first key at which two flat configurations differ, apart from `free` keys and sections."""
    differing = (key for key in {**old, **new} if old.get(key) != new.get(key))
    return next((key for key in differing if free.isdisjoint((key, key.partition(".")[0]))), None)


def _check_shared(folder: Path, content: str | None) -> None:
    """Check that all ranks see the lock file that rank 0 has written. Four collectives.

    Args:
        folder: of the run.
        content: of the file, on rank 0, which does not open it, since that would release the lock.

    Raises:
        InputError: on all ranks, naming those that do not see it.
    """
    host, root, expected = gather_json([socket.gethostname(), str(folder), content])[0]
    blind = None if rank_of() == 0 or _sees(folder / LOCK, expected) else socket.gethostname()
    hosts = {rank: name for rank, name in enumerate(gather_json(blind)) if name is not None}
    if hosts:
        named = ", ".join(f"rank {rank} on {name}" for rank, name in list(hosts.items())[:_RANKS_NAMED])
        raise InputError(
            f"{named} cannot see what rank 0 on {host} writes to {root}: give a folder on storage that all hosts "
            "share with --out."
        )


def _sees(path: Path, content: str) -> bool:
    until = time.monotonic() + _SECONDS_TO_SEE
    while True:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            os.listdir(path.parent)  # makes a network file system look again
            if path.read_text(encoding="utf-8") == content:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
