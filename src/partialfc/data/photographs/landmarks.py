"""Five points a face that somebody else has found, in a text file or in one of ours, in whatever order."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from partialfc.core.errors import InputError
from partialfc.core.schema import check_schema_version
from partialfc.data.align import MIRRORED, TEMPLATE, TEMPLATE_SIZE, similarity_transform, transform_points
from partialfc.data.photographs.face import Face
from partialfc.data.sources.base import check_regular

SCHEMA_VERSION = 1
_FORM = "name x1 y1 x2 y2 x3 y3 x4 y4 x5 y5, perhaps with a score behind"
_NAMES = ("image-left eye", "image-right eye", "nose", "image-left mouth corner", "image-right mouth corner")
_HEADERS = 2  # lines before the first face that may say anything
_PROBES = 1000  # faces that tell the order
_NEAR, _CLEARLY = 10.0, 1.3  # pixels of an aligned face to the template; how much farther the next order must be
_UPRIGHT = 60.0  # degrees
_NARROW = 96  # the width of the older template, which lacks 8 pixels at either side


@dataclass(frozen=True)
class Landmarks:
    """The points of a file.

    Attributes:
        path: the file.
        rows: the rows of each photograph, by its path or that without suffix.
        points: float64 (N, 5, 2), in the order of the template.
        scores: float64 (N,), 1 where the file has none.
        reading: how the numbers were understood, in words.
        crop: width and height of the aligned crops that the points belong to, None if to photographs.
    """

    path: Path
    rows: dict[str, list[int]]
    points: NDArray[np.float64]
    scores: NDArray[np.float64]
    reading: str
    crop: tuple[int, int] | None

    @property
    def facts(self) -> dict[str, Any]:
        """What is recorded of them, as of a detector."""
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        return {
            "name": "landmarks",
            "file": str(self.path.absolute()),
            "sha256": {self.path.name: digest},
            "order": self.reading,
        }

    def of(self, photograph: str) -> list[Face]:
        """The faces of a photograph; their boxes reach from the lowest to the highest of the points."""
        rows = self.rows.get(photograph) or self.rows.get(os.path.splitext(photograph)[0], [])
        boxes = [np.concatenate([self.points[row].min(0), self.points[row].max(0)]) for row in rows]
        return [Face(box, self.points[row], float(self.scores[row])) for box, row in zip(boxes, rows, strict=True)]


def residual(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far points (N, 5, 2) are from the template after alignment: root of the mean square, in pixels (N,)."""
    return _fit(points)[0]


def is_mirrored(points: NDArray[np.float64]) -> bool:
    """Whether five points (5, 2) fit the template better with left and right exchanged."""
    own, other = residual(np.stack([points, points[MIRRORED]]))
    return bool(other < own)


def read_landmarks(path: Path) -> Landmarks:
    """The points of a file: lines of a name and ten numbers, with spaces or commas, or a `landmarks.jsonl` of ours.

    The order of the points is recognised, if the file has another than ours, by the shape of its faces. A similarity
    never mirrors, so that points whose left and right are exchanged fit badly.

    Raises:
        InputError: the file cannot be read, a line has another form, or no order gives upright faces.
    """
    check_regular([path])
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            first = file.readline()
            file.seek(0)
            lines = list(_own(path, file) if first.startswith("{") else _text(path, file))
    except OSError as error:
        raise InputError(f"Cannot read --landmarks {path}: {error.strerror}.") from error
    if not lines:
        raise InputError(f"{path} has no face: its lines must be “{_FORM}”.")
    rows: dict[str, list[int]] = {}
    for row, (name, _) in enumerate(lines):
        rows.setdefault(name, []).append(row)
    numbers = np.array([[*numbers, 1.0][:11] for _, numbers in lines])
    if not np.isfinite(numbers).all():
        name = lines[int(np.argmin(np.isfinite(numbers).all(axis=1)))][0]
        raise InputError(f"{path}: the face of {name} has a number that is not finite.")
    if np.abs(numbers[:, :10]).max() <= 1:
        raise InputError(f"All numbers of {path} are fractions: give the points in pixels of the upright photograph.")
    order, reading = _order(path, numbers[:: max(1, len(numbers) // _PROBES), :10])
    points = numbers[:, order].reshape(-1, 5, 2)
    return Landmarks(path, rows, points, numbers[:, 10], reading, _crop_of(points))


def _own(path: Path, lines: Iterator[str]) -> Iterator[tuple[str, list[float]]]:
    try:
        check_schema_version(path, json.loads(next(lines)), SCHEMA_VERSION)
        for line in lines:
            record = json.loads(line)
            for face in record.get("faces", []):
                yield (
                    record["photograph"],
                    [*np.array(face["points"], float).reshape(10).tolist(), float(face["score"])],
                )
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no sound file of landmarks ({error!r}): get a fresh copy of it.") from error


def _text(path: Path, lines: Iterator[str]) -> Iterator[tuple[str, list[float]]]:
    has_begun = False
    for number, line in enumerate(lines, 1):
        words = [word.strip(' "\r\n') for word in (line.split(",") if "," in line else line.rsplit(None, 11))]
        values: list[float] = []
        for word in words[:0:-1]:
            try:
                values.insert(0, float(word))
            except ValueError:
                break
        if len(values) in (10, 11):
            has_begun = True
            yield " ".join(words[: -len(values)]).lstrip("./"), values
        elif line.strip() and (has_begun or number > _HEADERS):
            raise InputError(f"Line {number} of {path} is “{line.strip()[:60]}”, but must be “{_FORM}”.")


def _fit(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distance from the template after alignment, in pixels, and the turn, in degrees, of points (N, 5, 2); infinite
    of points that coincide."""
    centred = torch.from_numpy(points - points.mean(axis=1, keepdims=True))
    sound = centred.square().sum((1, 2)) > 0
    matrices = similarity_transform(torch.where(sound[:, None, None], centred, TEMPLATE), TEMPLATE)
    distances = (transform_points(matrices, centred) - TEMPLATE).square().sum(2).mean(1).sqrt()
    turns = torch.rad2deg(torch.atan2(matrices[:, 1, 0], matrices[:, 0, 0])).abs()
    return torch.where(sound, distances, torch.inf).numpy(), turns.numpy()


def _order(path: Path, numbers: NDArray[np.float64]) -> tuple[list[int], str]:
    """Which of the ten numbers of a line are x and y of our five points, and that in words.

    All orders are tried, with x and y in turn or all x first. The right one fits best, leaves most faces upright, and
    no other that does so comes near.
    """
    orders = [(order, x_first) for x_first in (False, True) for order in itertools.permutations(range(5))]
    columns = [
        [place for point in order for place in ((point, point + 5) if x_first else (2 * point, 2 * point + 1))]
        for order, x_first in orders
    ]
    found = _fit(numbers[:, columns].reshape(-1, 5, 2))
    distances, turns = (np.median(values.reshape(len(numbers), -1), axis=0) for values in found)
    best = int(distances.argmin())
    distance, turn, (order, x_first) = distances[best], turns[best], orders[best]
    upright = np.sort(distances[turns <= _UPRIGHT])
    if distance > _NEAR or turn > _UPRIGHT or (len(upright) > 1 and upright[1] < _CLEARLY * distance):
        lying = f" (as they stand, the faces are turned by {turn:.0f} degrees)" if turn > _UPRIGHT else ""
        raise InputError(
            f"The points of {path} are in an order that cannot be told from their shape{lying}: give "
            f"{', '.join(_NAMES)}, in pixels of the upright photograph."
        )
    words = [_NAMES[order.index(place)] for place in range(5)]
    return columns[best], f"{', '.join(words)}{'; all x before all y' if x_first else ''}"


def _crop_of(points: NDArray[np.float64]) -> tuple[int, int] | None:
    """The size of the aligned crops in which most of the faces stand where a template has them."""
    for width in (TEMPLATE_SIZE, _NARROW):
        template = TEMPLATE.numpy() - ((TEMPLATE_SIZE - width) / 2, 0)
        if np.median(np.linalg.norm(points - template, axis=2).mean(axis=1)) < _NEAR / 2:
            return width, TEMPLATE_SIZE
    return None
