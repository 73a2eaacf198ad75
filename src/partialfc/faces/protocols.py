"""Procedural twins of the published benchmarks: sets in their file formats, of people on whom nothing is trained.

A protocol is a description: how many people, and what is special about each part of their images.
"""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from partialfc.core.errors import InputError
from partialfc.core.files import atomic_folder, output_errors
from partialfc.data.ijb_files import FaceList, Members, TemplatePairs, write_ijb
from partialfc.data.sources.base import FACES_NAME
from partialfc.evaluation.all_pairs import CHILDREN, MASK
from partialfc.evaluation.benchmarks import DISTRACTORS, GALLERY, PROBE, UNKNOWN
from partialfc.faces.camera import detector_error, make_camera
from partialfc.faces.encode import EncodedFace, encoded_faces
from partialfc.faces.parameters import draw_parameters, group_of
from partialfc.faces.sets import CONTENT, grid, write_pair_set
from partialfc.faces.settings import FaceSettings
from partialfc.faces.traits import flat

FIRST = 2_000_000  # beyond the people of `FaceWorld`
_FEWEST = 10  # identities: each group has two, and a fifth of them too
_SHOTS_OF_A_PART = 1000  # or fewer: parts of one person have different images
_LOOSE = 1.4  # side of a loose crop over that of the aligned face: the eyes are as far apart in both

USUAL = FaceSettings()
BARE = FaceSettings(mask=0.0)
MASKED = FaceSettings(mask=1.0)
FRONTAL = replace(BARE, yaw=6.0, pitch=6.0)
PROFILE = replace(BARE, yaw=5.0, pitch=6.0, turn=40.0)
YOUNG = replace(BARE, age=0.3, shifts=(("age", -2.0),))
OLD = replace(BARE, age=0.3, shifts=(("age", 2.5),))
CHILD = replace(
    BARE,
    shifts=(
        ("head_height", -1.2), ("forehead", 1.5), ("cheek", 2.0), ("cheekbone", -1.2), ("jaw_width", -1.5),
        ("chin_length", -2.0), ("chin_forward", -1.5), ("eye_size", 1.8), ("eye_open", 1.0), ("iris_size", 1.5),
        ("eye_bag", -1.5), ("brow_thick", -1.2), ("brow_ridge", -2.0), ("nose_length", -1.8), ("nose_bridge", -1.5),
        ("nose_tip", -1.0), ("nose_tip_up", 1.2), ("nose_hump", -1.5), ("mouth_width", -1.2), ("fold", -2.0),
        ("brow_line", -2.0), ("age", -2.0), ("beard", -5.0),
    ),
)  # fmt: skip
WILD = replace(BARE, yaw=24.0, pitch=11.0, blur=1.3)
OCCLUDED = replace(WILD, glasses=0.3, mask=0.08)


@dataclass(frozen=True, kw_only=True)
class Twin(ABC):
    """A protocol and its sizes.

    Attributes:
        identities: people, beside those that a part adds.
        image_size: side of the aligned faces in pixels.
        seed: the images are a function of it.
    """

    identities: int
    image_size: int = 112
    seed: int = 0

    @abstractmethod
    def write(self, folder: Path, name: str, *, quiet: bool) -> str:
        """Write the set into an empty folder, and return what there is given to `evaluate`: a relative path."""


@dataclass(frozen=True, kw_only=True)
class PairTwin(Twin):
    """Verification pairs in a `.bin` file; the first and the second image of each have settings of their own."""

    pairs: int
    first: FaceSettings = BARE
    second: FaceSettings = BARE

    def write(self, folder: Path, name: str, *, quiet: bool) -> str:
        """As `Twin.write`: NAME.bin."""
        write_pair_set(
            folder / f"{name}.bin",
            identities=range(FIRST, FIRST + self.identities),
            pairs=self.pairs,
            size=self.image_size,
            seed=self.seed,
            settings=self.first,
            second=self.second,
            quiet=quiet,
        )
        return f"{name}.bin"


@dataclass(frozen=True, kw_only=True)
class TemplateTwin(Twin):
    """Templates of several media with loose crops, landmarks and detector scores, 1:1 and 1:N.

    Attributes:
        galleries: names of the galleries, which share the people.
        templates: for each template of a person, the frames of its media: 1 is a photograph, more are a video. The
            first template is the one in the gallery, and each of the others is a probe.
    """

    galleries: tuple[str, str]
    templates: tuple[tuple[int, ...], ...] = ((1, 1, 1), (1,), (5,), (1, 1, 4))
    settings: FaceSettings = WILD

    def write(self, folder: Path, name: str, *, quiet: bool) -> str:
        """As `Twin.write`: meta/NAME_*.txt, meta/NAME_*.csv and loose_crop/*.jpg."""
        person, template, media, frame = self._faces()
        media_of_each = sum(map(len, self.templates))
        settings = replace(self.settings, scenes=media_of_each)
        people, shots = torch.from_numpy(FIRST + person), torch.from_numpy(media + media_of_each * frame)
        names = [f"{number}.jpg" for number in range(1, len(person) + 1)]
        size = round(_LOOSE * self.image_size)
        crops = encoded_faces(self.seed, people, shots, size, settings, aligned=False, quiet=quiet)
        landmarks = _write_images([folder / "loose_crop" / name for name in names], crops)
        faces = FaceList(names, *detect(self.seed, people, shots, landmarks, settings))
        templates = 1 + person * len(self.templates) + template
        members = Members(np.arange(len(person)), templates, 1 + person * media_of_each + media)
        write_ijb(folder, name, faces, members, *self._lists())
        return "."

    def _faces(self) -> NDArray[np.int64]:
        """Person, template, media of the person, and frame of the media of every face: (4, N), all from 0."""
        media = [(template, frames) for template, counts in enumerate(self.templates) for frames in counts]
        of_one = np.array([(t, number, f) for number, (t, frames) in enumerate(media) for f in range(frames)]).T
        person = np.arange(self.identities).repeat(of_one.shape[1])
        return np.concatenate([person[None], np.tile(of_one, self.identities)])

    def _lists(self) -> tuple[TemplatePairs, dict[str, dict[int, int]], dict[int, int]]:
        """All pairs of a template in a gallery and a probe; the galleries, and the probes."""
        count = len(self.templates)
        numbers = 1 + np.arange(self.identities * count).reshape(-1, count)
        enrolled, probes = numbers[:, 0], numbers[:, 1:].ravel()

        def subjects(templates: NDArray[np.int64]) -> dict[int, int]:
            return {template: 1 + (template - 1) // count for template in templates.tolist()}

        left, right = np.repeat(enrolled, len(probes)), np.tile(probes, len(enrolled))
        is_same = (left - 1) // count == (right - 1) // count
        halves = dict(zip(self.galleries, map(subjects, np.array_split(enrolled, 2)), strict=True))
        return TemplatePairs(left.astype(np.int32), right.astype(np.int32), is_same), halves, subjects(probes)


def detect(
    seed: int, identities: Tensor, shots: Tensor, landmarks: NDArray[np.float32], settings: FaceSettings
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """What a simulated detector finds: landmarks (N, 5, 2) with its errors, and a score (N,) in [0, 1].

    The score is lower for faces that are turned away, blurred or masked.

    Args:
        seed, identities, shots, settings: as for `render_faces`.
        landmarks: the exact ones.
    """
    parameters = draw_parameters(seed, identities, shots, settings)
    nuisance = flat(parameters.nuisances(settings))
    facing = make_camera(nuisance, settings).rotation[:, 2, 2]
    scores = facing * (1 - 0.3 * nuisance["blur"] ** 2) * (1 - 0.25 * nuisance["mask"])
    eyes = np.linalg.norm(landmarks[:, 1] - landmarks[:, 0], axis=1)[:, None, None]
    return landmarks + detector_error(seed, parameters.keys, settings).numpy() * eyes, scores.double().numpy()


@dataclass(frozen=True)
class Part:
    """A folder of images.

    Attributes:
        first, people: its first person and how many there are, in multiples of the identities of the protocol.
        shots: images of each.
        settings: strengths of the nuisances.
    """

    first: float
    people: float
    shots: int
    settings: FaceSettings = USUAL


@dataclass(frozen=True, kw_only=True)
class PartsTwin(Twin):
    """Folders of parts, in each a folder for each person.

    Attributes:
        parts: by the name of the folder.
        listed: also write NAME.csv, which lists all images with person, group and mask.
    """

    parts: Mapping[str, Part]
    listed: bool = False

    def write(self, folder: Path, name: str, *, quiet: bool) -> str:
        """As `Twin.write`: PART/PERSON/SHOT.jpg, and perhaps NAME.csv."""
        rows: list[list[object]] = [["path", "identity", "group", "mask"]]
        for number, (part_name, part) in enumerate(self.parts.items()):
            start = FIRST + int(part.first * self.identities)
            people, shots = grid(range(start, start + int(part.people * self.identities)), part.shots)
            shots = shots + _SHOTS_OF_A_PART * number
            keys = zip(people.tolist(), shots.tolist(), strict=True)
            paths = [Path(part_name, str(person), f"{shot}.jpg") for person, shot in keys]
            options: dict[str, Any] = {"quiet": quiet, "what": f"rendering {part_name}"}
            faces = encoded_faces(self.seed, people, shots, self.image_size, part.settings, **options)
            _write_images([folder / path for path in paths], faces)
            for path, person, group in zip(paths, people.tolist(), group_of(people).tolist(), strict=True):
                group_name = CHILDREN if part_name == CHILDREN else f"group-{group}"
                rows.append([path, person, group_name, int(part_name == MASK)])
        if not self.listed:
            return "."
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        return f"{name}.csv"


def _write_images(paths: Sequence[Path], faces: Generator[EncodedFace, None, None]) -> NDArray[np.float32]:
    """Write one face to each path, and return the landmarks (N, 5, 2)."""
    landmarks = np.empty((len(paths), 5, 2), np.float32)
    with closing(faces):
        for number, (path, face) in enumerate(zip(paths, faces, strict=True)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(face.image)
            landmarks[number] = face.landmarks
    return landmarks


PROTOCOLS: dict[str, Twin] = {
    "lfw": PairTwin(identities=2000, pairs=6000),
    "cfp_ff": PairTwin(identities=500, pairs=7000, first=FRONTAL, second=FRONTAL),
    "cfp_fp": PairTwin(identities=500, pairs=7000, first=FRONTAL, second=PROFILE),
    "agedb_30": PairTwin(identities=570, pairs=6000, first=YOUNG, second=OLD),
    "ijbb": TemplateTwin(identities=300, galleries=("S1", "S2")),
    "ijbc": TemplateTwin(identities=600, galleries=("G1", "G2"), settings=OCCLUDED),
    "mfr": PartsTwin(
        identities=1000,
        parts={"bare": Part(0, 1, 6, BARE), MASK: Part(0, 1, 1, MASKED), CHILDREN: Part(1, 0.2, 6, CHILD)},
        listed=True,
    ),
    "gallery": PartsTwin(
        identities=500,
        parts={
            GALLERY: Part(0, 1, 2, FRONTAL),
            PROBE: Part(0, 1, 4),
            UNKNOWN: Part(1, 0.5, 4),
            DISTRACTORS: Part(2, 2, 1),
        },
    ),
}


def write_protocol(name: str, folder: Path, *, quiet: bool = True, **sizes: int) -> dict[str, Any]:
    """Write the procedural twin of a benchmark, described by its `faces.json`.

    The folder appears whole or not at all.

    Args:
        name: one of `PROTOCOLS`.
        folder: the folder to make.
        quiet: show no progress.
        sizes: fields of the `Twin`, instead of its own: `identities`, `image_size`, `seed`, and `pairs` of pairs.

    Returns:
        What was written, as JSON can hold it: `benchmark` is the path for `evaluate`.

    Raises:
        InputError: there is no such protocol, the folder exists or cannot be written, or a number makes no set.
        TypeError: the protocol has no such size.
    """
    if name not in PROTOCOLS:
        raise InputError(f"There is no protocol {name!r}: choose one of {', '.join(PROTOCOLS)}.")
    twin = replace(PROTOCOLS[name], **sizes)
    if twin.identities < _FEWEST:
        raise InputError(f"identities is {twin.identities}: the protocol {name} needs at least {_FEWEST}.")
    if twin.image_size < 16:
        raise InputError(f"A face needs at least 16 pixels a side, not {twin.image_size}.")
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder} exists already: remove it, or write somewhere else.")
    about = {"schema_version": 1, "content": CONTENT, "protocol": name, **asdict(twin)}
    with output_errors(folder), atomic_folder(folder) as partial:
        benchmark = twin.write(partial, name, quiet=quiet)
        (partial / FACES_NAME).write_text(json.dumps(about, indent=2) + "\n")
    return {"protocol": name, "benchmark": str(folder / benchmark), **sizes}
