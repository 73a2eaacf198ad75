"""A set of images of any kind, embedded into one file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from partialfc.core.console import say
from partialfc.core.errors import InputError
from partialfc.core.files import output_errors
from partialfc.data.images import UnreadableImage
from partialfc.data.photographs.align import crop_scores
from partialfc.data.photographs.face import Detector
from partialfc.data.photographs.files import read_photograph, upright
from partialfc.data.sources import open_source
from partialfc.data.sources.base import NoTrainingSet, Source, read_image, reading_notes
from partialfc.data.sources.folder import IMAGE_SUFFIXES
from partialfc.data.sources.parquet import import_pyarrow
from partialfc.distributed.collectives import rank_of
from partialfc.evaluation.images import Files
from partialfc.model.embed import Precision, embed_source
from partialfc.model.feature_table import SUFFIX, write_table
from partialfc.model.features import Features, describe, sidecar_path
from partialfc.model.files import Model
from partialfc.use.pictures import check_new, crop_of


@dataclass(frozen=True)
class Crops:
    """Images, brought from 112 × 112, or by a detector from photographs, to the size of a model."""

    images: Files | Source
    size: int
    faces_in: Detector | None = None

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """As `Images.name`."""
        return self.images.name(index)

    def image(self, index: int) -> NDArray[np.uint8]:
        """As `Images.image`; one that is no aligned crop is an error, but for a detector a failure to enrol."""
        if isinstance(self.images, Files):
            path = self.images.paths[index]
            pixels = self.images.image(index) if self.faces_in is None else read_photograph(str(path))
        else:
            sample, pixels = read_image(self.images, index)
            pixels = pixels if self.faces_in is None else upright(pixels, sample.encoded)
        try:
            return crop_of(pixels, self.size, self.faces_in)
        except InputError as error:
            kind = InputError if self.faces_in is None else UnreadableImage
            raise kind(str(error).replace("The picture", self.name(index), 1)) from error


def embed_into(
    model: Model,
    data: str | Path,
    out: Path,
    *,
    batch_size: int = 256,
    precision: Precision = "float32",
    workers: int = 2,
    faces_in: Detector | None = None,
    quiet: bool = False,
) -> Features:
    """Embed all images of a set into a new file; an interrupted call is continued.

    Args:
        data: a set as `open_source` takes it, a folder of images without identities, or one image.
        out: a `.parquet` (see `model.feature_table`) or `.npy` file (see `model.features`).
        batch_size, precision, workers, quiet: as `model.embed.embed_source`.
        faces_in: the detector for photographs; one that shows no face or several is listed as failed.

    Raises:
        InputError: there are no images, one is no aligned crop, or `out` exists, has another suffix or cannot be
            written.
    """
    check_new(out, "--out")
    if out.suffix not in (SUFFIX, ".npy"):
        raise InputError(f"{out} has the suffix {out.suffix!r}: features are written as {SUFFIX} or .npy.")
    if out.suffix == SUFFIX:
        import_pyarrow()  # before hours of work
    images, labels, identities = _open(Path(data))
    scores = crop_scores(Path(data))
    for note in reading_notes(images) if not isinstance(images, Files) and rank_of() == 0 else ():
        say(note)
    # Part of the description, so that rows of another detector are not continued.
    source = str(data)
    if faces_in is not None:
        about = json.dumps(getattr(faces_in, "facts", {}), sort_keys=True)
        source += f", faces found by detector {hashlib.sha256(about.encode()).hexdigest()[:12]}"
    names = [images.name(index) for index in range(len(images))]
    part = out if out.suffix == ".npy" else out.with_name(f".{out.name}.npy")
    options: dict[str, Any] = {"batch_size": batch_size, "precision": precision, "workers": workers, "quiet": quiet}
    with output_errors(out):
        crops = Crops(images, model.config.image_size, faces_in)
        features = embed_source(model, crops, part, source=source, names=names, **options)
        if out.suffix == SUFFIX and rank_of() == 0:
            contract, mirrored = features.contract or "", bool(features.mirrored)
            facts = describe(features.embeddings.shape, contract, mirrored=mirrored, source=source)
            columns: dict[str, Any] = {"names": names, "labels": labels, "identities": identities}
            columns["scores"] = [scores.get(name) for name in names]
            write_table(out, features.embeddings, features.failed, facts, **columns)
            for leftover in (part, sidecar_path(part)):
                leftover.unlink()
    return features


def _open(data: Path) -> tuple[Files | Source, NDArray[np.int64] | None, list[str] | None]:
    """The images of a path, their labels and the names of the labels, as far as it has them."""
    if data.is_file() and data.suffix.lower() in IMAGE_SUFFIXES:
        return Files([data]), None, None
    try:
        source = open_source(data)
    except NoTrainingSet:
        entries = sorted(data.iterdir()) if data.is_dir() else []
        files = [file for file in entries if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
        if not files or any(entry.is_dir() and not entry.name.startswith(".") for entry in entries):
            raise
        return Files(files), None, None
    return source, source.labels(), source.identities
