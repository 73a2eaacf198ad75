"""Files and folders that appear whole or not at all, and that survive a crash of the machine once they have appeared.

All of them are written beside their target under a name that begins with a dot, flushed to the storage, and renamed.
What an interrupted process leaves is replaced by the next write of the same target.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from partialfc.core.errors import InputError


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that replaces `path` at a clean end of the block; otherwise `path` stays as it was.

    Raises:
        OSError: the file cannot be written, for lack of space or permission.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


def write_file(path: str | Path, content: bytes | str) -> None:
    """Replace the file `path` by `content` (text as UTF-8), whole or not at all. Raises OSError as `atomic_file`."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place at a clean end of the block and is removed otherwise.

    A folder that is already there is replaced. Between the two renames it stands under `previous_name(folder)`, from
    where `recover_folder` brings it back if the process ended there.

    Raises:
        OSError: the folder or its files cannot be written.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(folder)
    temporary, previous = temporary_name(folder), previous_name(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            fsync(path)
        if folder.exists():
            folder.rename(previous)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    fsync(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Finish an interrupted replacement: bring `folder` back if it is missing, and remove what it replaced."""
    previous = previous_name(folder)
    if previous.exists() and not folder.exists():
        previous.rename(folder)
    elif previous.exists():
        shutil.rmtree(previous)


def temporary_name(path: Path) -> Path:
    """Where a file or folder is written before it is complete."""
    return path.with_name(f".{path.name}.writing")


def previous_name(folder: Path) -> Path:
    """Where a folder stands while its successor takes its place."""
    return folder.with_name(f".{folder.name}.old")


def fsync(path: str | Path) -> None:
    """Make the content of a file, or the names in a folder, survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def output_errors(path: str | Path) -> Iterator[None]:
    """Turn an OSError of writing what a user asked for at `path` into an InputError that names it."""
    try:
        yield
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror or error}.") from error
