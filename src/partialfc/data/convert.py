"""Training sets from one storage format to another: encoded images are copied as they are.

The images are sorted by class and cut into parts of whole identities. The new set is written part by part in a folder
beside its place, with a journal of the finished parts from which the next call goes on after an interruption. At the
end all of it is read back and compared, and the folder gets its name.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from partialfc.core.console import Progress
from partialfc.core.errors import InputError, JobError
from partialfc.core.files import atomic_file, fsync, output_errors, temporary_name, write_file
from partialfc.data.convert_targets import PARTS, TARGETS, Item, Target, TargetName, written_images
from partialfc.data.images import UnreadableImage
from partialfc.data.sources import open_source
from partialfc.data.sources.base import (
    NoTrainingSet,
    Source,
    check_label,
    check_labels,
    describe_copy,
    file_name,
    reading_notes,
)
from partialfc.data.sources.overlay import fingerprint
from partialfc.data.sources.webdataset import COMPRESSED, tar_files

_PART = 8192  # images of a part, and so of a .tar or .parquet file; a larger identity is a part of its own
_JOURNAL, _UNPACKED, _VERIFIED = ".journal", ".unpacked", ".verified"
_NAMED = 20  # unreadable records in the result
_DIGEST_BITS = 128


class _Done(NamedTuple):
    """A finished part: its number, its images, the sum of their digests, and why some records are not in it."""

    number: int
    images: int
    digest: int
    unreadable: list[str]


def convert(path: str | Path, out: str | Path, target: TargetName, *, quiet: bool = True) -> dict[str, Any]:
    """Write the training set at `path` in another format.

    A call after an interruption goes on where that stopped. Names of identities and of files stay where the format has
    a place for them; RecordIO gets a file of names beside it.

    Args:
        path: as `open_source` takes it; also `.tar.gz` files, which are unpacked beside `out` in the meantime.
        out: the folder to make.
        target: "recordio", "folder", "webdataset" or "parquet".
        quiet: show no progress.

    Returns:
        out, format, images, classes, unreadable (records that could not be read and are left out) and
        unreadable_records (the reasons of the first 20).

    Raises:
        InputError: `out` exists or holds another interrupted conversion, a label is no class id or too large for
            RecordIO, or the data cannot be read or written.
        JobError: what was written does not read back as it was.
    """
    path, out = Path(path), Path(out)
    if target not in get_args(TargetName):
        raise InputError(f"There is no format {target!r} to convert to: choose {', '.join(get_args(TargetName))}.")
    if out.exists() or out.is_symlink():
        raise InputError(f"{out} exists already: remove it, or write somewhere else.")
    work = temporary_name(out)
    with output_errors(out):
        source, notes = _open(path, work / _UNPACKED, quiet)
        if source.format == "folder" and out.resolve().is_relative_to(path.resolve()):
            raise InputError(f"{out} would be an identity of {path}, in which it lies: write somewhere else.")
        facts = _convert(source, path, work, target, quiet)
        describe_copy(source, work)
        for leftover in (work / _UNPACKED, work / PARTS):
            shutil.rmtree(leftover, ignore_errors=True)
        for record in (work / _JOURNAL, work / _VERIFIED):
            record.unlink(missing_ok=True)
        work.rename(out)
        fsync(out.absolute().parent)
    return {"out": str(out), "format": target, **facts, "notes": notes}


def _open(path: Path, unpacked: Path, quiet: bool) -> tuple[Source, list[str]]:
    """The training set, and what the user should know of how it was read.

    `.tar.gz` files are unpacked where the path is one, or a folder that holds nothing else that is a set.
    """
    compressed = tar_files(path, COMPRESSED)
    if not compressed or path.is_dir():
        try:
            source = open_source(path)
        except NoTrainingSet:
            if not compressed:
                raise
        else:
            if compressed and source.format == "webdataset":
                raise InputError(f"{path} has .tar and .tar.gz files: move those of one kind away.")
            beside = [f"{file} is not read, but the set beside it" for file in compressed]
            return source, [*reading_notes(source), *beside]
    source = open_source(_unpack(compressed, unpacked, quiet))
    return source, reading_notes(source)


def _convert(source: Source, path: Path, work: Path, target_name: TargetName, quiet: bool) -> dict[str, Any]:
    """Write all in `work` and verify it; the result of `convert` about the images."""
    labels = source.labels()
    check_labels(source, labels)
    order = np.argsort(labels, kind="stable")
    starts = _part_starts(labels[order])
    target = TARGETS[target_name](work, source, len(starts) - 1)
    work.mkdir(parents=True, exist_ok=True)
    plan = {
        "schema_version": 1,
        "path": str(path.absolute()),
        "target": target_name,
        "labels": hashlib.sha256(labels.tobytes()).hexdigest(),
        "images": fingerprint(source),
        "classes": source.num_classes,
        "parts": len(starts) - 1,
    }
    if (work / _VERIFIED).is_file():  # it was interrupted while it tidied up
        verified: dict[str, Any] = json.loads((work / _VERIFIED).read_text())
        if verified.pop("plan") != plan:
            raise _of_another(work)
        return verified
    done = _read_journal(work / _JOURNAL, plan)
    _write_parts(source, target, np.split(order, starts[1:-1]), done, work / _JOURNAL, quiet)
    images, digest = sum(part.images for part in done), sum(part.digest for part in done) % (1 << _DIGEST_BITS)
    if not images:
        raise InputError(f"None of the {len(labels)} records of {path} can be read.")
    target.finish()
    if _sum_of_written(work, target_name, images, quiet) != (images, digest):
        raise JobError(f"What was written to {work} is not what {path} holds: is the storage sound?")
    unreadable = [reason for part in done for reason in part.unreadable]
    facts = {
        "images": images,
        "classes": source.num_classes,
        "unreadable": len(unreadable),
        "unreadable_records": unreadable[:_NAMED],
    }
    write_file(work / _VERIFIED, json.dumps({"plan": plan, **facts}))
    return facts


def _part_starts(labels: np.ndarray) -> list[int]:
    """Where the parts of sorted labels begin, and the end of the last."""
    identities = np.flatnonzero(np.diff(labels, prepend=-2))
    starts = [0]
    for number, stop in enumerate([*identities[1:].tolist(), len(labels)]):
        first = int(identities[number])
        if stop - starts[-1] > _PART and first > starts[-1]:
            starts.append(first)
    return [*starts, len(labels)]


def _write_parts(
    source: Source, target: Target, parts: list[np.ndarray], done: list[_Done], journal: Path, quiet: bool
) -> None:
    """Write the parts that are not done yet, and add them to `done` and to the journal."""
    left = sorted(set(range(len(parts))) - {part.number for part in done})
    finished = sum(len(parts[part.number]) for part in done)
    with (
        Progress("converting", sum(map(len, parts)), quiet=quiet) as progress,
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
        journal.open("a") as lines,
    ):
        progress.update(finished)
        for part in pool.map(lambda number: _write_part(source, target, number, parts[number]), left):
            lines.write(json.dumps(part) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
            done.append(part)
            finished += len(parts[part.number])
            progress.update(finished)


def _write_part(source: Source, target: Target, number: int, indices: np.ndarray) -> _Done:
    items: list[Item] = []
    unreadable: list[str] = []
    digest = 0
    for index in indices.tolist():
        try:
            sample = source.read(index)
        except UnreadableImage as error:
            unreadable.append(str(error))
            continue
        check_label(sample, source.num_classes)
        items.append(Item(sample.encoded, sample.label, file_name(source, index)))
        digest += _digest(sample.encoded, sample.label)
    if items:
        target.write(number, items)
    return _Done(number, len(items), digest % (1 << _DIGEST_BITS), unreadable)


def _digest(encoded: bytes, label: int) -> int:
    return int.from_bytes(hashlib.blake2b(b"%d\n" % label + encoded, digest_size=_DIGEST_BITS // 8).digest())


def _sum_of_written(work: Path, target: str, images: int, quiet: bool) -> tuple[int, int]:
    """The number of images in what was written, and the sum of their digests."""
    count = digest = 0
    with Progress("verifying", images, quiet=quiet) as progress:
        for encoded, label in written_images(work, target):
            count, digest = count + 1, digest + _digest(encoded, label)
            if count % 1024 == 0 or count == images:
                progress.update(count)
    return count, digest % (1 << _DIGEST_BITS)


def _read_journal(journal: Path, plan: dict[str, Any]) -> list[_Done]:
    """The finished parts of an interrupted call with the same plan; begins a journal where there is none.

    Raises:
        InputError: the journal is that of another conversion.
    """
    lines = journal.read_text().split("\n")[:-1] if journal.exists() else []  # without a line that was cut off
    if not lines:
        write_file(journal, json.dumps(plan) + "\n")
        return []
    if json.loads(lines[0]) != plan:
        raise _of_another(journal.parent)
    write_file(journal, "\n".join(lines) + "\n")
    return [_Done(*json.loads(line)) for line in lines[1:]]


def _of_another(work: Path) -> InputError:
    return InputError(
        f"{work} is what another conversion, or one of other data, has left: remove it and convert again."
    )


def _unpack(files: list[Path], folder: Path, quiet: bool) -> Path:
    """The `.tar.gz` files, unpacked to `.tar` files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [re.sub(r"\.(tar\.gz|tgz)$", ".tar", file.name, flags=re.IGNORECASE) for file in files]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"Two files in {files[0].parent} would unpack to {twice}: move one of them away.")
    with Progress("unpacking", len(files), unit="file", quiet=quiet) as progress:
        for number, file in enumerate(files):
            unpacked = folder / names[number]
            try:
                if not unpacked.exists():
                    with gzip.open(file) as packed, atomic_file(unpacked) as plain:
                        shutil.copyfileobj(packed, plain, 1 << 20)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise InputError(f"{file} is no sound .gz file ({error}): get a fresh copy of it.") from error
            progress.update(number + 1)
    return folder
