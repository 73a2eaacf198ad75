"""The protocol of a training set: numbered samples, each an encoded image with a label, in any storage."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np

from partialfc.core.errors import InputError
from partialfc.data.images import UnreadableImage, decode_image

FACES_NAME = "faces.json"  # what describes a set of procedural faces, beside its images
PROCEDURAL = "procedural faces"  # how its "content" begins


class Sample(NamedTuple):
    """An encoded image, its class id, and its name in messages."""

    encoded: bytes
    label: int
    name: str


class Source(Protocol):
    """A training set.

    Attributes:
        path: the file or folder.
        format: name of the storage format.
        num_classes: the number of classes.
        identities: the names of the classes, None where the storage has none.
    """

    path: Path
    format: str
    num_classes: int
    identities: list[str] | None

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The name of the sample at `index` in messages."""
        ...

    def labels(self) -> np.ndarray:
        """The class id of every sample, int64 (N,), −1 where it cannot be read, without reading the images.

        Raises:
            InputError: a label is no class id.
        """
        ...

    def read(self, index: int) -> Sample:
        """The sample at `index`, from 0.

        Raises:
            UnreadableImage: it cannot be read; the message names it.
            InputError: its label is no class id.
        """
        ...


def mapping_of(source: Source) -> str | None:
    """A digest of the decisions between the stored records and the labels of `source`, None if there are none.

    A source that stands on others (overlay, mixture) has it as its attribute `mapping`. Images and classes may be as
    many as before, so that only this tells a run that its data have changed.
    """
    mapping: str | None = getattr(source, "mapping", None)
    return mapping


def order_digest(source: Source) -> str:
    """A digest of the samples in their order, 16 hexadecimal digits, without reading images.

    It covers the labels, or what the method `order` of a source has: something faster, or that tells more, such as the
    names of files. A source that stands on others has them as its attribute `parts`.
    """
    if parts := getattr(source, "parts", None):
        content = [order_digest(part).encode() for part in parts]
    else:
        content = source.order() if hasattr(source, "order") else [source.labels().tobytes()]
    digest = hashlib.sha256()
    for piece in content:
        digest.update(piece)
    return digest.hexdigest()[:16]


def is_procedural(source: Source) -> bool:
    """Whether all images of `source` are procedural faces, as the descriptions beside them say."""
    if parts := getattr(source, "parts", None):
        return all(is_procedural(part) for part in parts)
    return is_procedural_folder(source.path if source.path.is_dir() else source.path.parent)


def is_procedural_folder(folder: Path) -> bool:
    """Whether the description in `folder` says that its images are procedural faces."""
    try:
        content = json.loads((folder / FACES_NAME).read_text(encoding="utf-8"))
        return str(content["content"]).startswith(PROCEDURAL)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def describe_copy(source: Source, folder: Path) -> None:
    """Let a set in `folder` that was made of the images of `source` say that they are procedural, if they are."""
    if is_procedural(source):
        (folder / FACES_NAME).write_text(json.dumps({"schema_version": 1, "content": PROCEDURAL}) + "\n")


PassedOver = dict[str, tuple[int, str]]  # files that are no part of a set: kind -> their number, name of the first


def passed_over(source: Source) -> PassedOver:
    """What an image folder, or those that `source` stands on, leave out."""
    found: PassedOver = dict(getattr(source, "passed_over", {}))
    for part in getattr(source, "parts", []):
        for kind, (count, first) in passed_over(part).items():
            before, name = found.get(kind, (0, first))
            found[kind] = (before + count, name)
    return found


def reading_notes(source: Source) -> list[str]:
    """What the user should know of how `source` was read, a sentence each, without its full stop."""
    sentence = describe_passed_over(passed_over(source))
    return ([f"{source.path}: {sentence}"] if sentence else []) + _notes(source)


def _notes(source: Source) -> list[str]:
    return [*getattr(source, "notes", []), *(note for part in getattr(source, "parts", []) for note in _notes(part))]


def describe_passed_over(found: PassedOver) -> str:
    """What is left out and how to take it, in one sentence; "" if nothing is."""
    kinds = [f"{count:,} {kind} (such as {first})" for kind, (count, first) in sorted(found.items())]
    remedy = "those that are images are taken as <identity>/<name>.jpg, or from a .lst file with any name"
    return f"files are passed over: {', '.join(kinds)}; {remedy}" if kinds else ""


def read_image(source: Source, index: int, out: np.ndarray | None = None) -> tuple[Sample, np.ndarray]:
    """The sample at `index` and its decoded image, uint8 (H, W, 3) RGB. Raises as `Source.read`; `out` as in
    `decode_image`."""
    sample = source.read(index)
    try:
        return sample, decode_image(sample.encoded, out)
    except UnreadableImage as error:
        raise UnreadableImage(f"{sample.name}: {error}") from error


def skip_byte_order_mark(file: BinaryIO) -> None:
    """Leave `file` behind a UTF-8 mark at its start. Raises InputError for text in UTF-16."""
    head = file.read(len(BOM_UTF8))
    if head.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        raise InputError(f"{file.name} is text in UTF-16: save it as UTF-8.")
    if head != BOM_UTF8:
        file.seek(0)


def read_file(path: str) -> bytes:
    """The content of a regular file; anything else, such as a pipe, might keep the reader waiting, and is not read.

    Raises:
        UnreadableImage: it is none, or cannot be read; the message names it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer would block
        try:
            state = os.fstat(descriptor)
            if not stat.S_ISREG(state.st_mode):
                raise UnreadableImage(f"{path}: it is no regular file")
            return os.read(descriptor, state.st_size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UnreadableImage(f"{path}: {error.strerror}") from error


class NoTrainingSet(InputError):
    """There is no training set of any format at a path, and no damaged one either."""


def check_regular(files: Iterable[Path]) -> list[Path]:
    """The paths; an InputError names one at which there is neither a file nor a folder, but a pipe or a dead link."""
    files = list(files)
    for file in files:
        if os.path.lexists(file) and not file.is_file() and not file.is_dir():
            raise InputError(f"{file} is no regular file, but a dead link, a pipe, a socket or a device: remove it.")
    return files


def check_label(sample: Sample, num_classes: int) -> None:
    """Refuse a label outside [0, num_classes) with an InputError that names the record."""
    if not 0 <= sample.label < num_classes:
        raise InputError(
            f"The label of {sample.name} is {sample.label}, outside the range [0, {num_classes}): give the right "
            "num_classes, or correct the data (and its property file)."
        )


def file_name(source: Source, index: int) -> str:
    """The path of an image within its set, as the storage keeps it, "" where it keeps none.

    A source with such names has a method `file_name(index)`; the others need none.
    """
    return str(source.file_name(index)) if hasattr(source, "file_name") else ""


def check_labels(source: Source, labels: np.ndarray) -> None:
    """Refuse labels of `source.labels()` outside the range, as `check_label` does; -1 stands for an unreadable one."""
    for index in np.flatnonzero(labels >= source.num_classes)[:1].tolist():
        check_label(Sample(b"", int(labels[index]), source.name(index)), source.num_classes)
