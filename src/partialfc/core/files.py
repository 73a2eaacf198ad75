"""Atomic writes: a file or folder appears complete or not at all, and survives a crash of the machine from then on.

The content is written beside the target as `.NAME.writing`, flushed to the storage, and renamed; the folder that holds
the name is flushed last. An interrupted process leaves at most that temporary, which the next write of the same target
replaces. Modes are what the umask gives, as for any other file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from partialfc.core.errors import InputError

# What stands for the parts of a file name that are no UTF-8, which Python holds as surrogates: `\udce9`, by which JSON
# reads the same name again, and which a page shows.
NO_UTF8 = "backslashreplace"


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A new binary file that replaces `path` at a clean end of the block; after an exception `path` is as it was.

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
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


def write_file(path: str | Path, content: bytes | str) -> None:
    """Replace the file `path` by `content` (text as UTF-8). Raises OSError as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(content.encode("utf-8", NO_UTF8) if isinstance(content, str) else content)


def replaceable(folder: str | Path) -> Path:
    """A folder that is to be replaced as a whole, or where a link to one leads; an InputError for one like “.”."""
    folder = Path(folder)
    if folder.name in ("", ".."):
        raise InputError(f"{folder} would be replaced as a whole: give a folder by its name.")
    return folder.resolve() if folder.is_symlink() else folder


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """A new empty folder that replaces `folder` at a clean end of the block; after an exception `folder` is as it was.

    No file system replaces a folder in one operation: between two renames the old one stands under
    `previous_name(folder)`. If the process dies there, `recover_folder` brings it back.

    Raises:
        InputError: the folder is the current one or another without a name of its own.
        OSError: the folder or a file in it cannot be written, for lack of space or permission.
    """
    folder = replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(folder)
    temporary = temporary_name(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            fsync(path)
        if folder.exists():
            folder.rename(previous_name(folder))
        temporary.rename(folder)
        fsync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        recover_folder(folder)


def recover_folder(folder: Path) -> None:
    """Finish an interrupted replacement: bring the old `folder` back if there is no new one, else remove the old."""
    previous = previous_name(folder)
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
    elif previous.exists():
        previous.rename(folder)


def temporary_name(path: Path) -> Path:
    """Where a file or folder is written before it is complete."""
    return path.with_name(f".{path.name}.writing")


def previous_name(folder: Path) -> Path:
    """Where a folder stands while its successor takes its place."""
    return folder.parent / f".{folder.name}.old"  # also of the root, which has no name


def fsync(path: str | Path) -> None:
    """Flush the content of a file, or the names in a folder, to the storage.

    Raises:
        OSError: the storage reports an error.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def output_errors(path: str | Path) -> Iterator[None]:
    """Turn an OSError of writing what the user asked for at `path` into an InputError that names it."""
    try:
        yield
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror or error}.") from error
