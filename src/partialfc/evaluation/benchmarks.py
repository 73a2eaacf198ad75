"""Benchmarks: what a path is, found out from its files, and the protocol that belongs to it.

NAME.bin                              pairs of images, as those of LFW
FOLDER with .bin or .xz files         the same, a group a file, as those of RFW
FOLDER with *_face_tid_mid.txt        IJB-B or IJB-C, 1:1, and 1:N if its galleries are there
LIST.csv: path,identity,group,mask    all pairs of a list, as those of MFR
PAIRS.csv: left,right,is_same         pairs of one's own images
FOLDER with gallery/ and probe/       1:N on one's own people; unknown/ holds people that the gallery lacks, and
                                      distractors/ images that are added to the gallery for another rank-1
FOLDER with folders of identities     all pairs of one's own people
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from partialfc.core.errors import InputError
from partialfc.data.ijb_files import (
    FACES,
    GALLERIES,
    find_files,
    read_faces,
    read_galleries,
    read_members,
    read_probes,
    read_template_pairs,
)
from partialfc.data.pair_files import PairSet, read_pairs
from partialfc.data.sources.base import Source
from partialfc.data.sources.folder import open_folder
from partialfc.evaluation.all_pairs import ImageList, evaluate_all_pairs, group_names, read_list
from partialfc.evaluation.identification import evaluate_gallery, identify_templates
from partialfc.evaluation.images import Files, JoinedImages, LooseCrops
from partialfc.evaluation.pairs import evaluate_pairs
from partialfc.evaluation.statistics.figures import Result
from partialfc.evaluation.statistics.metrics import Scores
from partialfc.evaluation.templates import template_features, verify_templates
from partialfc.evaluation.verification import (
    FARS,
    failure_to_enrol,
    verification_facts,
    verification_figures,
    verify_listed_pairs,
    with_groups,
    with_quality,
)
from partialfc.model.embed import Images, SourceImages
from partialfc.model.features import Features

PAIR_COLUMNS = ["left", "right", "is_same"]
GALLERY, PROBE, UNKNOWN, DISTRACTORS = "gallery", "probe", "unknown", "distractors"
_PARTS = (GALLERY, PROBE, UNKNOWN, DISTRACTORS)
_KINDS = ("genuine", "impostor")


class Benchmark(Protocol):
    """A benchmark that was read.

    Attributes:
        what: what the path was found to be, for messages.
    """

    what: str

    @property
    def images(self) -> Images:
        """In the order of the features."""
        ...

    def evaluate(self, features: Features) -> Result:
        """The result of features (N, D), not normalised, one row an image.

        Raises:
            InputError: they do not fit the images.
        """
        ...


def open_benchmark(path: Path, image_size: int, *, compat: bool = False) -> Benchmark:
    """Read the benchmark at `path`; images are read when they are embedded.

    Args:
        image_size: of the model; only the faces of IJB are aligned to it here, all others must have it.
        compat: read the ROC of IJB as the public script of insightface does.

    Raises:
        InputError: there is nothing, or nothing that is known.
    """
    if not path.exists():
        raise InputError(f"There is no benchmark {path}: give a .bin file, a .csv list, or a folder.")
    if path.is_file() and path.suffix == ".csv":
        columns = _columns(path)
        if columns == PAIR_COLUMNS:
            return PairList.read(path)
        return ListedImages.read(path)
    if path.is_file():
        return PairFile(read_pairs(path), path)
    if files := sorted([*path.glob("*.xz"), *path.glob("*.bin")], key=lambda file: file.name.lower()):
        groups = {file.name.lower().removesuffix(".xz").removesuffix(".bin"): file for file in files}
        return PairFiles({name: PairFile(read_pairs(file), file) for name, file in groups.items()})
    if find_files(path, FACES) or find_files(path, "*_face_tid_mid.txt"):
        return Templates(path, image_size, compat=compat)
    if (path / GALLERY).is_dir() or (path / PROBE).is_dir():
        return Gallery(path)
    source = open_folder(path, None)
    if source is None:
        raise InputError(
            f"{path} is no benchmark that is known: a folder holds the meta files of IJB, or folders of identities, or "
            f"{GALLERY}/ and {PROBE}/."
        )
    return People(source)


def _columns(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        return next(csv.reader(file), [])


class PairFile:
    """Pairs of a verification `.bin` file."""

    def __init__(self, pairs: PairSet, path: Path) -> None:
        self.what = f"{len(pairs.is_same):,} pairs of images"
        self._pairs, self._path = pairs, path
        self.images = self

    def __len__(self) -> int:
        return len(self._pairs.images)

    def name(self, index: int) -> str:
        """As `Images.name`."""
        return f"image {index} of {self._path}"

    def image(self, index: int) -> NDArray[np.uint8]:
        """As `Images.image`."""
        image: NDArray[np.uint8] = self._pairs.images[index]
        return image

    def evaluate(self, features: Features) -> Result:
        """As `Benchmark.evaluate`; pairs with an image that could not be used count as in a list of pairs."""
        failed = features.failed[0::2] | features.failed[1::2]
        result = evaluate_pairs(features.embeddings, self._pairs.is_same, failed).result()
        return with_quality(replace(result, figures=result.figures | failure_to_enrol(features.failed)), features)


class PairFiles:
    """Pairs of several verification files, each of one group."""

    def __init__(self, groups: Mapping[str, PairFile]) -> None:
        self._groups, self.images = groups, JoinedImages(groups)
        self.what = f"{len(self.images) // 2:,} pairs of images in {len(groups)} groups: {', '.join(groups)}"

    def evaluate(self, features: Features) -> Result:
        """As `Benchmark.evaluate`."""
        results = {name: group.evaluate(features.take(self.images.rows[name])) for name, group in self._groups.items()}
        figures = {f"{name}/{figure}": value for name, one in results.items() for figure, value in one.figures.items()}
        scores = {name: one.scores[""] for name, one in results.items()}
        genuine, impostor = (np.concatenate([getattr(of, kind) for of in scores.values()]) for kind in _KINDS)
        rows = [
            np.concatenate([self.images.rows[name][getattr(of, f"{kind}_rows")] for name, of in scores.items()])
            for kind in _KINDS
        ]
        lost = sum(of.failures for of in scores.values())
        whole = Scores(genuine, impostor, len(impostor), failures=lost, genuine_rows=rows[0], impostor_rows=rows[1])
        figures |= verification_figures(whole) | failure_to_enrol(features.failed)
        facts = verification_facts(whole) | {"parts": {name: one.facts for name, one in results.items()}}
        return with_groups(Result("pairs", figures, facts, {"": whole} | scores), scores)


class Templates:
    """IJB-B or IJB-C, 1:1, and 1:N if the folder has galleries."""

    def __init__(self, folder: Path, image_size: int, *, compat: bool) -> None:
        self.faces = read_faces(folder)
        self.members = read_members(folder, self.faces)
        self.pairs = read_template_pairs(folder)
        has_galleries = bool(find_files(folder, GALLERIES))
        self.galleries = read_galleries(folder) if has_galleries else {}
        self.probes = read_probes(folder) if has_galleries else None
        self.what = f"IJB 1:1{' and 1:N' if has_galleries else ''}, {len(self.faces.names):,} faces"
        self.images = LooseCrops(folder / "loose_crop", self.faces, image_size)
        self.compat = compat

    def evaluate(self, features: Features) -> Result:
        """As `Benchmark.evaluate`."""
        templates, units = template_features(features.embeddings, self.faces, self.members)
        result = verify_templates(templates, units, self.pairs, compat=self.compat)
        failures, fte = {"failures": int(features.failed.sum())}, failure_to_enrol(features.failed)
        if self.probes is None:
            return replace(result, figures=result.figures | fte, facts=result.facts | failures)
        found = identify_templates(templates, units, self.galleries, self.probes)
        facts = {"1:1": result.facts, "1:n": found.facts, **failures}
        return Result("ijb", result.figures | found.figures | fte, facts, result.scores)


class ListedImages:
    """All pairs of a list with identities, groups and masks."""

    def __init__(self, listed: ImageList, folder: Path) -> None:
        self.groupless = int((group_names(listed.groups, len(listed.paths)) == "").sum())
        self.listed = listed
        self.images = Files([folder / path for path in listed.paths])
        self.what = f"a list of {len(listed.paths):,} images, all pairs"

    @classmethod
    def read(cls, path: Path) -> ListedImages:
        """Of a `.csv` file; its paths are relative to its folder."""
        listed = read_list(path)
        try:
            return cls(listed, path.parent)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def evaluate(self, features: Features) -> Result:
        """As `Benchmark.evaluate`."""
        listed = self.listed
        units = torch.from_numpy(features.units())
        result = evaluate_all_pairs(units, listed.identities, listed.groups, listed.masked, failed=features.failed)
        if result.scores[""].complete:  # a list too small for the FAR of MFR alone
            result = replace(result, figures=verification_figures(result.scores[""]) | result.figures)
        if 0 < self.groupless < len(listed.paths):
            note = f"{self.groupless:,} of {len(listed.paths):,} images name no group and are in no figure of a group."
            result = replace(result, facts=result.facts | {"notes": [*result.facts.get("notes", ()), note]})
        return with_quality(result, features, listed.qualities)


class PairList:
    """Pairs of image files, and whether they show one person."""

    def __init__(self, paths: list[Path], pairs: NDArray[np.int64], is_same: NDArray[np.bool_]) -> None:
        self.images, self.pairs, self.is_same = Files(paths), pairs, is_same
        self.what = f"a list of {len(is_same):,} pairs of {len(paths):,} images"

    @classmethod
    def read(cls, path: Path) -> PairList:
        """Of a `.csv` file with the columns left, right and is_same; paths are relative to its folder."""
        rows: dict[str, int] = {}
        pairs, answers = [], []
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                lines = list(csv.reader(file))[1:]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path} cannot be read as a CSV file in UTF-8: {error}.") from error
        for number, fields in enumerate(lines, 2):
            if not fields:
                continue
            if len(fields) != 3 or fields[2] not in ("0", "1") or not (fields[0] and fields[1]):
                raise InputError(f"Line {number} of {path} is {fields}, but must be two paths and 0 or 1.")
            pairs.append([rows.setdefault(name, len(rows)) for name in fields[:2]])
            answers.append(fields[2] == "1")
        if not pairs:
            raise InputError(f"{path} lists no pairs: write a line for each below {','.join(PAIR_COLUMNS)}.")
        return cls([path.parent / name for name in rows], np.array(pairs), np.array(answers))

    def evaluate(self, features: Features) -> Result:
        """As `Benchmark.evaluate`."""
        return verify_listed_pairs(features, self.pairs, self.is_same)


class People:
    """All pairs of one's own people, such as a folder of identity folders."""

    def __init__(self, source: Source) -> None:
        self.images, self._identities = SourceImages(source), source.labels()
        self.what = f"{source.num_classes:,} people with {len(source):,} images, all pairs"

    def evaluate(self, features: Features) -> Result:
        """As `Benchmark.evaluate`."""
        units = torch.from_numpy(features.units())
        result = evaluate_all_pairs(units, self._identities, fars=FARS, failed=features.failed)
        return with_quality(replace(result, figures=verification_figures(result.scores[""]) | result.figures), features)


class Gallery:
    """1:N on one's own people.

    Args:
        folder: with gallery/, probe/ and perhaps unknown/ and distractors/, each with folders of identities, whose
            images may stand in folders of their own. The order is that of the whole folder as an image folder.
    """

    def __init__(self, folder: Path) -> None:
        source = open_folder(folder, None)
        files = [] if source is None else [source.file_name(row).split("/") for row in range(len(source))]
        places = [place for place in files if place[0] in _PARTS and len(place) > 2]
        sizes = Counter(part for part, *_ in places)
        for part in _PARTS:
            if part not in sizes and (part in (GALLERY, PROBE) or (folder / part).is_dir()):
                raise InputError(f"{folder / part} holds no folders of identities with images: 1:N needs them.")
        self._part = np.array([part for part, *_ in places])
        self.images = Files([folder.joinpath(*place) for place in places])
        # A stranger or a distractor has the name of nobody in the gallery, even if the folder is called alike.
        people = [person if part in (GALLERY, PROBE) else f"{part}/{person}" for part, person, *_ in places]
        self._identities = np.unique(people, return_inverse=True)[1].astype(np.int64)
        self.what = f"1:N, {', '.join(f'{sizes[part]:,} images of {part}' for part in _PARTS if part in sizes)}"

    def evaluate(self, features: Features) -> Result:
        """As `Benchmark.evaluate`; among distractors only rank-1, as in MegaFace."""
        in_gallery = np.isin(self._part, [GALLERY, DISTRACTORS])
        known = np.flatnonzero(self._part != DISTRACTORS)
        result = evaluate_gallery(features.take(known), self._identities[known], in_gallery[known])
        if len(known) == len(self._part):
            return result
        among = evaluate_gallery(features, self._identities, in_gallery)
        name = f"{DISTRACTORS}/rank-1"
        facts = {DISTRACTORS: len(self._part) - len(known)}
        return replace(result, figures=result.figures | {name: among.figures["rank-1"]}, facts=result.facts | facts)
