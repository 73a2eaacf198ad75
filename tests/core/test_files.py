"""Atomic writes: the old or the new content, never a part, and nothing left beside it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from partialfc.core.errors import InputError
from partialfc.core.files import (
    atomic_file,
    atomic_folder,
    output_errors,
    previous_name,
    recover_folder,
    temporary_name,
    write_file,
)


class Interrupted(BaseException):
    """The process is interrupted while it writes."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def replace_file(path: Path, content: str) -> None:
    write_file(path, content)


def replace_folder(path: Path, content: str) -> None:
    with atomic_folder(path) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_text(content)


def content_of(path: Path) -> str:
    assert not path.is_dir() or names(path) == ["inner"]
    return (path / "inner" / "file" if path.is_dir() else path).read_text()


def half_a_file(path: Path, error: type[BaseException]) -> None:
    with atomic_file(path) as file:
        file.write(b"half")
        raise error


def half_a_folder(path: Path, error: type[BaseException]) -> None:
    with atomic_folder(path) as folder:
        (folder / "half").write_text("half")
        raise error


WRITERS = pytest.mark.parametrize("write", [replace_file, replace_folder])
Writer = Callable[[Path, str], None]


@WRITERS
def test_a_target_is_made_and_replaced(tmp_path: Path, write: Writer) -> None:
    for content in ("old", "new é"):
        write(tmp_path / "target", content)
        assert content_of(tmp_path / "target") == content
        assert names(tmp_path) == ["target"]


def test_bytes_are_written_as_they_are(tmp_path: Path) -> None:
    write_file(tmp_path / "target", b"\xff\r\n")
    assert (tmp_path / "target").read_bytes() == b"\xff\r\n"


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("error", [Interrupted, ValueError])
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, replaced: bool, error: type[BaseException]) -> None:
    for target in ("file", "folder"):
        if replaced:
            (replace_file if target == "file" else replace_folder)(tmp_path / target, "old")
    with pytest.raises(error):
        half_a_file(tmp_path / "file", error)
    with pytest.raises(error):
        half_a_folder(tmp_path / "folder", error)
    assert names(tmp_path) == (["file", "folder"] if replaced else [])
    if replaced:
        assert content_of(tmp_path / "file") == content_of(tmp_path / "folder") == "old"


@WRITERS
def test_a_leftover_is_replaced(tmp_path: Path, write: Writer) -> None:
    leftover = temporary_name(tmp_path / "target")
    if write is replace_folder:
        leftover.mkdir()
        (leftover / "half").write_text("long leftover of a process that died")
    else:
        leftover.write_text("long leftover of a process that died")
    write(tmp_path / "target", "new")
    assert content_of(tmp_path / "target") == "new"
    assert names(tmp_path) == ["target"]


class Storage:
    """Records what is flushed and renamed, and fails, as a full disk does, at one of these calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.fails_at: int | None = None
        fsync, rename, replace = os.fsync, os.rename, os.replace

        def flush(descriptor: int) -> None:
            self.note(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
            fsync(descriptor)

        def move(plain: Callable[..., None]) -> Callable[..., None]:
            def moved(source: Any, target: Any, **options: Any) -> None:
                self.note(f"{Path(source).name} to {Path(target).name}")
                plain(source, target, **options)

            return moved

        monkeypatch.setattr(os, "fsync", flush)
        monkeypatch.setattr(os, "rename", move(rename))
        monkeypatch.setattr(os, "replace", move(replace))

    def note(self, call: str) -> None:
        self.calls.append(call)
        if len(self.calls) == self.fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")


def test_everything_is_flushed_before_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_folder(tmp_path / "folder", "old")
    storage = Storage(monkeypatch)
    write_file(tmp_path / "file", "new")
    assert storage.calls == ["flush .file.writing", ".file.writing to file", f"flush {tmp_path.name}"]
    storage.calls.clear()
    replace_folder(tmp_path / "folder", "new")
    assert sorted(storage.calls[:3]) == ["flush .folder.writing", "flush file", "flush inner"]
    assert storage.calls[3:] == ["folder to .folder.old", ".folder.writing to folder", f"flush {tmp_path.name}"]


@WRITERS
@pytest.mark.parametrize("replaced", [False, True])
def test_a_full_disk_at_any_moment_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Writer, replaced: bool
) -> None:
    storage = Storage(monkeypatch)
    outcomes = set()
    for moment in range(1, 20):
        root = tmp_path / str(moment)
        root.mkdir()
        storage.fails_at = None
        if replaced:
            write(root / "target", "old")
        storage.calls.clear()
        storage.fails_at = moment
        try:
            write(root / "target", "new")
            failed = False
        except OSError:
            failed = True
        outcomes.add(content_of(root / "target") if (root / "target").exists() else "nothing")
        assert names(root) in (["target"], [])
        if not failed:
            break
    assert outcomes == {"old" if replaced else "nothing", "new"}
    assert 3 < moment < 19


def test_a_folder_whose_replacement_was_interrupted_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    recover_folder(folder)
    assert names(tmp_path) == []
    replace_folder(folder, "old")
    folder.rename(previous_name(folder))  # where a process dies between the two renames
    recover_folder(folder)
    assert content_of(folder) == "old"
    replace_folder(previous_name(folder), "older")  # where it dies after the second
    recover_folder(folder)
    assert content_of(folder) == "old"
    assert names(tmp_path) == ["folder"]
    folder.rename(previous_name(folder))
    replace_folder(folder, "new")
    assert content_of(folder) == "new"
    assert names(tmp_path) == ["folder"]


@pytest.fixture
def umask_027() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask_027")
def test_the_umask_gives_the_modes(tmp_path: Path) -> None:
    write_file(tmp_path / "file", "new")
    replace_folder(tmp_path / "folder", "new")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"file": 0o640, "folder": 0o750, "inner": 0o750}


def test_an_output_that_cannot_be_written_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    target = tmp_path / "missing" / "file"
    with (
        pytest.raises(InputError, match=rf"^Cannot write {target}: No such file or directory\.$"),
        output_errors(target),
    ):
        write_file(target, "new")
    write_file(tmp_path / "file", "old")
    with pytest.raises(OSError, match="Not a directory"):
        write_file(tmp_path / "file" / "inner", "new")
