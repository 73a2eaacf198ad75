"""The official meta files of IJB-B and IJB-C, which lie in a folder or in its subfolder `meta/`.

| file | a line |
|---|---|
| `*_name_5pts_score.txt` | image x1 y1 x2 y2 x3 y3 x4 y4 x5 y5 score |
| `*_face_tid_mid.txt` | image template media |
| `*_template_pair_label.txt` | template template 0-or-1 |
| `*_1N_gallery_*.csv`, `*_1N_probe_mixed.csv` | template,subject (after a header line; more columns are ignored) |
"""

from __future__ import annotations

import csv
import os
from array import array
from codecs import BOM_UTF8
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from partialfc.core.errors import InputError

Integers = NDArray[np.int64]

FACES, MEDIA, PAIRS = "*_name_5pts_score.txt", "*_face_tid_mid.txt", "*_template_pair_label.txt"
GALLERIES, PROBES = "*_1N_gallery_*.csv", "*_1N_probe_mixed.csv"
_CHUNK = 1 << 22  # bytes of the file of pairs that are parsed at a time
_MOST_DIGITS = 9  # of a number of that file


@dataclass(frozen=True)
class FaceList:
    """The detected faces, in the order of `*_name_5pts_score.txt`.

    Attributes:
        names: (N,) of the images, possibly with slashes, relative to the folder of loose crops.
        landmarks: float32 (N, 5, 2), x and y in pixels of eyes, nose and corners of the mouth.
        detector_scores: float64 (N,).
    """

    names: list[str]
    landmarks: NDArray[np.float32]
    detector_scores: NDArray[np.float64]


@dataclass(frozen=True)
class Members:
    """Which face belongs to which template, a line of `*_face_tid_mid.txt` each.

    Attributes:
        faces: int64 (M,), position in the `FaceList`.
        templates: int64 (M,), the template's number.
        media: int64 (M,), the number of the photograph or video.
    """

    faces: Integers
    templates: Integers
    media: Integers


@dataclass(frozen=True)
class TemplatePairs:
    """Pairs of templates to compare.

    Attributes:
        left, right: int32 (P,), numbers of templates.
        is_same: bool (P,), whether both show one person.
    """

    left: NDArray[np.int32]
    right: NDArray[np.int32]
    is_same: NDArray[np.bool_]


def find_files(folder: str | Path, pattern: str) -> list[Path]:
    """The files of that pattern in the folder, or else below `meta/`, sorted; [] without one."""
    return sorted(Path(folder).glob(pattern)) or sorted((Path(folder) / "meta").glob(pattern))


def _find_file(folder: str | Path, pattern: str) -> Path:
    found = find_files(folder, pattern)
    if not found:
        raise InputError(
            f"{folder} has no file {pattern}, neither there nor in its folder meta: IJB needs {FACES}, {MEDIA} and "
            f"{PAIRS}, for 1:N also {GALLERIES} and {PROBES}."
        )
    if len(found) > 1:
        raise InputError(f"{found[0].parent} has {len(found)} files {pattern}: give each benchmark its own folder.")
    return found[0]


def read_faces(folder: str | Path) -> FaceList:
    """Read `*_name_5pts_score.txt`.

    Raises:
        InputError: the file is missing or empty, or a line has another form.
    """
    path = _find_file(folder, FACES)
    names, numbers = _read_table(path, 11, "image x1 y1 x2 y2 x3 y3 x4 y4 x5 y5 score")
    return FaceList(names, numbers[:, :10].reshape(-1, 5, 2).astype(np.float32), numbers[:, 10].copy())


def read_members(folder: str | Path, faces: FaceList) -> Members:
    """Read `*_face_tid_mid.txt`, whose images are those of `faces`, in the same order or in another.

    Raises:
        InputError: the file is missing or empty, a line has another form, or an image is not one of `faces`.
    """
    path = _find_file(folder, MEDIA)
    names, numbers = _read_table(path, 2, "image template media")
    templates, media = numbers.astype(np.int64).T
    fractional = (numbers != np.stack([templates, media], axis=1)).any(axis=1)
    if fractional.any():
        raise InputError(
            f"{path}: image {names[int(np.argmax(fractional))]} has a template or media that is no whole number."
        )
    if names == faces.names:
        return Members(np.arange(len(names)), templates, media)
    positions = {name: position for position, name in enumerate(faces.names)}
    if len(positions) < len(faces.names):
        raise InputError(
            f"{path} has another order of images than {FACES}, in which a name occurs twice: give each image a name."
        )
    unknown = next((name for name in names if name not in positions), None)
    if unknown is not None:
        raise InputError(f"{path} names the image {unknown}, which {FACES} lacks: the files belong to different sets.")
    return Members(np.array([positions[name] for name in names]), templates, media)


def _read_table(path: Path, columns: int, form: str) -> tuple[list[str], NDArray[np.float64]]:
    """Lines of a name and finite numbers: the names, and float64 (lines, columns). Blank lines do not count."""
    names, numbers = [], array("d")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(BOM_UTF8)
            name, *fields = line.rsplit(None, columns) or [b""]
            if not name:
                continue
            try:
                numbers.extend(map(float, fields))
            except ValueError:
                fields = []
            if len(fields) != columns:
                raise _bad_line(path, number, line, form)
            names.append(os.fsdecode(name.lstrip()))
    if not names:
        raise InputError(f"{path} is empty: its lines must be “{form}”.")
    table = np.frombuffer(numbers).reshape(-1, columns)
    if not np.isfinite(table).all():
        raise InputError(f"{path}: {names[int(np.argmin(np.isfinite(table).all(axis=1)))]} has a number not finite.")
    return names, table


def _bad_line(path: Path, number: int, line: bytes, form: str) -> InputError:
    shown = line.strip().decode("utf-8", "replace")[:60]
    return InputError(f"Line {number} of {path} is “{shown}”, but must be “{form}”.")


def read_template_pairs(folder: str | Path) -> TemplatePairs:
    """Read `*_template_pair_label.txt`; the 15,658,489 lines of IJB-C in about two seconds.

    Raises:
        InputError: the file is missing or empty, or a line has another form.
    """
    path = _find_file(folder, PAIRS)
    content = path.read_bytes()
    if not content.strip():
        raise InputError(f"{path} is empty: its lines must be “template template 0-or-1”.")
    chunks: list[list[NDArray[np.int32]]] = []
    start = 0
    while start < len(content):
        stop = content.rfind(b"\n", start, start + _CHUNK) + 1 or len(content)
        text = np.frombuffer(content, np.uint8, stop - start, start)
        chunk = _parse_plain(text)
        if chunk is None:  # an unusual space or an error
            chunk = _parse_lines(path, content[start:stop], content.count(b"\n", 0, start) + 1)
        chunks.append(chunk)
        start = stop
    left, right, labels = (np.concatenate(column) for column in zip(*chunks, strict=True))
    return TemplatePairs(left, right, labels != 0)


def _parse_plain(text: NDArray[np.uint8]) -> list[NDArray[np.int32]] | None:
    """The three columns (P,) of lines "digits digits digit", one space or newline after each; None for other text."""
    digits = text - np.uint8(ord("0"))  # wraps around: whatever is no digit is 10 or more
    ends = np.flatnonzero(digits > 9)
    if not len(ends) or len(ends) % 3 or ends[-1] != len(text) - 1:
        return None
    table = ends.reshape(-1, 3)
    lengths = np.diff(ends, prepend=-1).reshape(-1, 3) - 1
    if (text[table] != np.frombuffer(b"  \n", np.uint8)).any() or lengths.min() < 1 or lengths.max() > _MOST_DIGITS:
        return None
    columns = []
    for column in range(3):
        last, length = table[:, column] - 1, lengths[:, column]
        values = digits[last].astype(np.int32)
        for place in range(1, int(length.max())):
            values += digits[np.maximum(last - place, 0)] * (length > place) * np.int32(10**place)
        columns.append(values)
    return columns if columns[2].max() <= 1 else None


def _parse_lines(path: Path, text: bytes, first: int) -> list[NDArray[np.int32]]:
    """The same of text with other white space, or the error in it; `first` is the number of its first line."""
    rows = []
    for number, line in enumerate(text.splitlines(), first):
        fields = line.split()
        plain = all(field.isdigit() and len(field) <= _MOST_DIGITS for field in fields)
        if fields and (len(fields) != 3 or not plain or int(fields[2]) > 1):
            raise _bad_line(path, number, line, "template template 0-or-1")
        if fields:
            rows.append([int(field) for field in fields])
    return list(np.array(rows, dtype=np.int32).reshape(-1, 3).T)


def read_galleries(folder: str | Path) -> dict[str, dict[int, int]]:
    """The galleries of 1:N by name, G1 and G2 of IJB-C, S1 and S2 of IJB-B: from template to subject.

    Raises:
        InputError: there is none, or a line has another form.
    """
    found = find_files(folder, GALLERIES) or [_find_file(folder, GALLERIES)]
    return {path.stem.rpartition("_")[2]: _read_subjects(path) for path in found}


def read_probes(folder: str | Path) -> dict[int, int]:
    """The probes of 1:N, from template to subject.

    Raises:
        InputError: the file is missing, or a line has another form.
    """
    return _read_subjects(_find_file(folder, PROBES))


def _read_subjects(path: Path) -> dict[int, int]:
    """From template to subject; the files of NIST have a line for each image of a template."""
    subjects: dict[int, int] = {}
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for number, fields in enumerate(csv.reader(file), 1):
            are_numbers = len(fields) >= 2 and all(field.strip().isdecimal() for field in fields[:2])
            if not fields or (number == 1 and not are_numbers):  # a header
                continue
            if not are_numbers:
                raise _bad_line(path, number, ",".join(fields).encode(), "template,subject")
            template, subject = int(fields[0]), int(fields[1])
            if subjects.setdefault(template, subject) != subject:
                raise InputError(f"{path} gives template {template} two subjects, the second in line {number}.")
    if not subjects:
        raise InputError(f"{path} is empty: its lines must be “template,subject”, after a header line.")
    return subjects


def write_ijb(
    folder: Path,
    prefix: str,
    faces: FaceList,
    members: Members,
    pairs: TemplatePairs,
    galleries: Mapping[str, Mapping[int, int]],
    probes: Mapping[int, int],
) -> None:
    """Write all meta files, in `folder/meta`, which must not exist; the images belong into `folder/loose_crop`.

    Args:
        prefix: of the names of the files: "ijbb" or "ijbc".
        galleries, probes: what `read_galleries` and `read_probes` read.

    Raises:
        OSError: a file cannot be written.
    """
    meta = folder / "meta"
    meta.mkdir()

    def write(pattern: str, lines: Iterable[str]) -> None:
        with (meta / pattern.replace("*", prefix, 1)).open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)

    points = (" ".join(f"{value:.3f}" for value in row) for row in faces.landmarks.reshape(-1, 10).tolist())
    rows = zip(faces.names, points, faces.detector_scores.tolist(), strict=True)
    write(FACES, (f"{name} {five} {score:.4f}" for name, five, score in rows))
    rows_of_media = zip(members.faces.tolist(), members.templates.tolist(), members.media.tolist(), strict=True)
    write(MEDIA, (f"{faces.names[face]} {template} {media}" for face, template, media in rows_of_media))
    columns = zip(pairs.left.tolist(), pairs.right.tolist(), pairs.is_same.tolist(), strict=True)
    write(PAIRS, (f"{left} {right} {int(same)}" for left, right, same in columns))
    lists = {GALLERIES.replace("gallery_*", f"gallery_{name}"): gallery for name, gallery in galleries.items()}
    for pattern, subjects in (lists | {PROBES: probes}).items():
        write(pattern, ["TEMPLATE_ID,SUBJECT_ID", *(f"{template},{subject}" for template, subject in subjects.items())])
