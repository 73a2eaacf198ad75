"""A folder of photographs, to a training set of aligned crops, with a record of every file."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from partialfc.core.console import Progress
from partialfc.core.errors import InputError
from partialfc.core.files import fsync, output_errors, temporary_name, write_file
from partialfc.core.threads import run_parallel
from partialfc.data.images import UnreadableImage, encode_jpeg
from partialfc.data.photographs.contact_sheet import contact_sheet
from partialfc.data.photographs.crop import align_face
from partialfc.data.photographs.face import Detector, Face, Pixels
from partialfc.data.photographs.files import list_files, read_photograph
from partialfc.data.photographs.landmarks import SCHEMA_VERSION, Landmarks, is_mirrored, residual

LANDMARKS, LEFT_OUT, SHEET = "landmarks.jsonl", "left-out.csv", "contact-sheet.html"
Record = dict[str, Any]
_QUALITY = 95
_AT_ONCE = 8  # photographs a core between two records of what is done
_DIGITS = 3  # of coordinates, in pixels


def align_photographs(
    photographs: str | Path,
    out: str | Path,
    finder: Detector | Landmarks,
    *,
    every_face: bool = False,
    quiet: bool = True,
) -> dict[str, Any]:
    """Cut the faces out of photographs, aligned to 112 x 112 pixels; a call after an interruption goes on.

    `out` has the folders of `photographs`, with a crop (JPEG) under the name of each photograph; `landmarks.jsonl`, a
    line of each file with boxes, points (in pixels of the upright photograph) and scores, or the reason why it is left
    out; `left-out.csv` with those reasons; and `contact-sheet.html`.

    Args:
        photographs: a folder, whose folders are identities if the crops are to be a training set, or one file.
        out: the folder to make.
        finder: what finds the faces, or knows them.
        every_face: take all faces of a photograph, and number the crops; otherwise the largest.
        quiet: show no progress.

    Returns:
        out, photographs (files), crops, several_faces (photographs with more than one), left_out, reasons (the number
        of files by reason), and what is known of the finder.

    Raises:
        InputError: there are no photographs, none gives a crop, `out` exists or holds another interrupted call, or
            something cannot be read or written.
    """
    root, out = Path(photographs), Path(out)
    names = list_files(photographs)
    if out.exists() or out.is_symlink():
        raise InputError(f"{out} exists already: remove it, or write somewhere else.")
    if out.resolve().is_relative_to(root.resolve()):
        raise InputError(f"{out} lies in {root}, whose files are to be aligned: write somewhere else.")
    work = temporary_name(out)
    listing = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()
    header: Record = {"schema_version": SCHEMA_VERSION, "photographs": str(root.absolute()), "files": listing}
    about = getattr(finder, "facts", {})
    header |= {"finder": about, "every_face": every_face}
    with output_errors(out):
        work.mkdir(parents=True, exist_ok=True)
        done = _done(work / LANDMARKS, header)
        _align(root if root.is_dir() else root.parent, names, done, work, finder, every_face, quiet)
        facts = _summarise(work)
        if not facts["crops"]:
            first = next(_records(work))
            reasons = "; ".join(f"{count:,} × {reason}" for reason, count in list(facts["reasons"].items())[:3])
            shutil.rmtree(work)
            raise InputError(
                f"No file of {root} gives a crop ({reasons}), such as {first['photograph']}, {first['left_out']}: "
                "give photographs with faces."
            )
        write_file(work / SHEET, contact_sheet(header, facts, lambda: _records(work), work))
        work.rename(out)
        fsync(out.absolute().parent)
    return {"out": str(out), **facts, **about}


def _align(
    root: Path, names: list[str], done: int, work: Path, finder: Detector | Landmarks, every_face: bool, quiet: bool
) -> None:
    """Align what comes after the first `done` files, and record it."""
    stems = _stems(names)

    def align(number: int) -> Record:
        record: Record = {"photograph": names[number]}
        try:
            image = _read(root / names[number])
            faces = sorted(_faces(names[number], image, finder), key=lambda face: -face.area)
            record |= {"height": image.shape[0], "width": image.shape[1], "faces_found": len(faces)}
            if every_face:
                crops = [f"{stems[number]}-{place}.jpg" for place in range(1, len(faces) + 1)]
            else:
                crops = [f"{stems[number]}.jpg"]
            record["faces"] = [_write(work, crop, image, face) for crop, face in zip(crops, faces, strict=False)]
        except UnreadableImage as error:
            record["left_out"] = str(error)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            record["left_out"] = "a name that is too long"
        return record

    step = _AT_ONCE * torch.get_num_threads()
    with (
        Progress("aligning", len(names), unit="photograph", quiet=quiet) as progress,
        (work / LANDMARKS).open("a", encoding="utf-8") as lines,
    ):
        progress.update(done)
        for start in range(done, len(names), step):
            numbers = range(start, min(start + step, len(names)))
            lines.writelines(json.dumps(record) + "\n" for record in run_parallel(align, numbers))
            lines.flush()
            os.fsync(lines.fileno())
            progress.update(numbers.stop)


def _stems(names: list[str]) -> list[str]:
    """The paths of the crops without suffix: those of the photographs, whose suffix stays where it tells them apart."""
    stems = [os.path.splitext(name)[0] for name in names]
    taken = Counter([*stems, *names])
    return [stem if taken[stem] == 1 else name for stem, name in zip(stems, names, strict=True)]


def _read(path: Path) -> Pixels:
    if path.name.startswith("."):
        raise UnreadableImage("hidden file")
    try:
        return read_photograph(str(path))
    except UnreadableImage as error:
        raise UnreadableImage(f"unreadable: {error}") from error


def _faces(name: str, image: Pixels, finder: Detector | Landmarks) -> Sequence[Face]:
    """The faces of a photograph. Raises UnreadableImage where there is none to use."""
    if not isinstance(finder, Landmarks):
        if found := finder(image):
            return found
        raise UnreadableImage("no face found")
    size = image.shape[1::-1]
    if not (known := finder.of(name)):
        raise UnreadableImage(f"no landmarks in {finder.path.name}")
    if finder.crop not in (None, size):
        raise UnreadableImage(f"landmarks of an aligned crop of {finder.crop} pixels: the file has {size}")
    if not (known := [face for face in known if np.ptp(face.points.round(_DIGITS), axis=0).any()]):
        raise UnreadableImage("landmarks that coincide")
    if not (known := [face for face in known if ((face.points >= 0) & (face.points < size)).any()]):
        raise UnreadableImage("landmarks outside the photograph")
    if not (sound := [face for face in known if not is_mirrored(face.points)]):
        raise UnreadableImage("landmarks whose left and right are exchanged")
    return sound


def _write(work: Path, crop: str, image: Pixels, face: Face) -> Record:
    """Write the crop of a face; the face for the record, whose points give the same crop again."""
    points = face.points.round(_DIGITS)
    (work / crop).parent.mkdir(parents=True, exist_ok=True)
    write_file(work / crop, encode_jpeg(align_face(image, points), _QUALITY))
    numbers = {"box": face.box.round(_DIGITS).tolist(), "points": points.tolist(), "score": face.score}
    return {"crop": crop, **numbers, "residual": round(float(residual(points[None])[0]), _DIGITS)}


# -- the record --------------------------------------------------------------------------------------------------------


def _done(path: Path, header: Record) -> int:
    """How many files an interrupted call with this header has finished; begins a record where there is none."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []  # without one that was cut off
    if lines and json.loads(lines[0]) != header:
        raise InputError(
            f"{path.parent} is what another call, or one for other photographs, has left: remove it and align again."
        )
    write_file(path, "".join(f"{line}\n" for line in lines or [json.dumps(header)]))
    return max(0, len(lines) - 1)


def _records(work: Path) -> Iterator[Record]:
    with (work / LANDMARKS).open(encoding="utf-8") as lines:
        next(lines, None)
        yield from map(json.loads, lines)


def _summarise(work: Path) -> Record:
    """Write the list of what is left out; the numbers of `align_photographs`."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["photograph", "reason"])
    count: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for record in _records(work):
        crops, found = len(record.get("faces", [])), record.get("faces_found", 0)
        count.update(photographs=1, crops=crops, several_faces=int(found > 1), left_out=int(not crops))
        if not crops:
            reasons[record["left_out"].partition(":")[0]] += 1
            writer.writerow([record["photograph"], record["left_out"]])
    write_file(work / LEFT_OUT, table.getvalue())
    return {**count, "reasons": dict(reasons.most_common())}


def crop_scores(folder: Path) -> dict[str, float]:
    """The detector's score of each crop in a folder that `align_photographs` has made, by path; of others empty.

    Raises:
        InputError: the record of the folder is damaged.
    """
    if not (folder / LANDMARKS).is_file():
        return {}
    try:
        faces = [face for record in _records(folder) for face in record.get("faces", ())]
        return {str(folder / face["crop"]): float(face["score"]) for face in faces}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / LANDMARKS} is damaged ({error!r}): remove it, or align again.") from error
