"""Data sets of procedural faces, in the file formats of real training sets and benchmarks."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from partialfc.core import keyed_random
from partialfc.core.errors import InputError
from partialfc.core.files import atomic_file, atomic_folder, output_errors
from partialfc.core.keyed_random import derive_key
from partialfc.data.pair_files import write_pairs
from partialfc.data.sources.base import FACES_NAME, PROCEDURAL
from partialfc.data.sources.recordio import RecordWriter
from partialfc.faces.encode import encoded_faces
from partialfc.faces.parameters import GROUPS, group_of
from partialfc.faces.render import render_faces
from partialfc.faces.settings import FaceSettings

Layout = Literal["recordio", "folder"]

FOLDS = 10
FIRST_HELD_OUT = 1_000_000
CONTENT = f"{PROCEDURAL}: drawings of people who do not exist"


@dataclass(frozen=True)
class FaceWorld:
    """A training set, and verification pairs of identities that are not in it; all of it a function of the seed.

    Args:
        identities, shots: identities of the training set, and images of each.
        pairs: test pairs, half of them genuine, a multiple of 20; impostors are of one group.
        pair_identities: further identities for the pairs, numbered from `FIRST_HELD_OUT`.
        image_size: side of the images in pixels.
        layout: format of the training set.
        accessory_sets: sets of accessories that an identity of the training set has, as in `FaceSettings`.

    Raises:
        InputError: a number makes no set, or the identities of the training set would reach those of the pairs.
    """

    identities: int = 1_000
    shots: int = 8
    pairs: int = 6_000
    pair_identities: int = 1_000
    image_size: int = 112
    seed: int = 0
    layout: Layout = "recordio"
    accessory_sets: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.identities <= FIRST_HELD_OUT:
            raise InputError(f"identities is {self.identities}; it lies between 1 and {FIRST_HELD_OUT:,}.")
        if self.accessory_sets < 0:
            raise InputError(f"accessory_sets is {self.accessory_sets}: give a positive number, or 0 for none.")
        _check_training_set(range(self.identities), self.shots, self.image_size, self.layout)
        _check_pair_set(self._held_out(), self.pairs, self.image_size)

    def _held_out(self) -> range:
        return range(FIRST_HELD_OUT, FIRST_HELD_OUT + self.pair_identities)

    def write(self, folder: Path, *, resume: bool = False, quiet: bool = True) -> dict[str, Any]:
        """Write `folder/train` and `folder/pairs.bin`.

        Args:
            folder: the folder to make.
            resume: keep what an interrupted call has finished in the folder, rather than refuse it.
            quiet: show no progress.

        Returns:
            What was written, as JSON can hold it.

        Raises:
            InputError: the folder exists and `resume` is False, or it cannot be written.
        """
        train, pairs = folder / "train", folder / "pairs.bin"
        if folder.exists() and not resume:
            raise InputError(f"{folder} exists already: remove it, or write somewhere else.")
        folder.mkdir(parents=True, exist_ok=True)
        common: dict[str, Any] = {"size": self.image_size, "seed": self.seed, "quiet": quiet}
        if not train.exists():
            identities = range(self.identities)
            worn = FaceSettings(accessory_sets=self.accessory_sets)
            write_training_set(
                train, identities=identities, shots=self.shots, layout=self.layout, settings=worn, **common
            )
        if not pairs.exists():
            write_pair_set(pairs, identities=self._held_out(), pairs=self.pairs, **common)
        return {"train": str(train), "images": self.identities * self.shots, "pairs_file": str(pairs), **asdict(self)}


def write_training_set(
    folder: str | Path,
    *,
    identities: range,
    shots: int,
    size: int = 112,
    seed: int = 0,
    layout: Layout = "recordio",
    settings: FaceSettings | None = None,
    workers: int | None = None,
    quiet: bool = True,
) -> None:
    """Write aligned procedural faces as a training set, described by its `faces.json`.

    Class i is the i-th of `identities`. The folder appears whole or not at all; its content depends on neither
    `workers` nor the machine's load.

    Args:
        folder: the folder to make.
        identities: numbers of the identities.
        shots: images of each.
        size: side of the images in pixels.
        seed: another seed gives other identities and images.
        layout: "recordio" (train.rec with header, train.idx, property) or "folder" (`<identity>/<shot>.jpg`).
        settings: strengths of the nuisances.
        workers: processes that render; by default one for each core, none for small sets. Scripts that start
            processes need the usual `if __name__ == "__main__":`.
        quiet: show no progress.

    Raises:
        InputError: the folder exists, cannot be written, or a number makes no set.
    """
    folder = Path(folder)
    _check_training_set(identities, shots, size, layout)
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder} exists already: remove it, or write somewhere else.")
    settings = settings or FaceSettings()
    faces = encoded_faces(seed, *grid(identities, shots), size, settings, workers=workers, quiet=quiet)
    with output_errors(folder), atomic_folder(folder) as partial, closing(faces):
        if layout == "recordio":
            with RecordWriter(partial / "train.rec", num_classes=len(identities)) as writer:
                for number, face in enumerate(faces):
                    writer.write(face.image, number // shots)
        else:
            digits = len(str(max(identities)))
            for number, face in enumerate(faces):
                target = partial / f"{identities[number // shots]:0{digits}d}"
                target.mkdir(exist_ok=True)
                (target / f"{number % shots:0{len(str(shots - 1))}d}.jpg").write_bytes(face.image)
        about = _about(seed, identities, size, settings) | {"shots": shots, "layout": layout}
        (partial / FACES_NAME).write_text(json.dumps(about, indent=2) + "\n")


def write_pair_set(
    path: str | Path,
    *,
    identities: range,
    pairs: int = 6000,
    size: int = 112,
    seed: int = 0,
    settings: FaceSettings | None = None,
    second: FaceSettings | None = None,
    workers: int | None = None,
    quiet: bool = True,
) -> None:
    """Write aligned procedural pairs as a verification `.bin`, described by a `.json` of the same stem.

    The order is LFW's: ten folds, in each first the genuine, then as many impostor pairs. Both images of an impostor
    pair are of one group, so that the look of a group does not give them away. No image appears twice.

    Args:
        path: the `.bin` file to make.
        identities: numbers of the identities, disjoint from those trained on.
        pairs: a multiple of 20.
        size, seed, settings, workers, quiet: as for `write_training_set`.
        second: strengths of the nuisances in the second image of each pair, by default those of the first.

    Raises:
        InputError: the file exists, cannot be written, or a number makes no set.
    """
    path = Path(path)
    about_path = path.with_suffix(".json")
    _check_pair_set(identities, pairs, size)
    for target in (path, about_path):
        if target.exists():
            raise InputError(f"{target} exists already: remove it, or write somewhere else.")
    if not path.parent.is_dir():
        raise InputError(f"Cannot write {path}: there is no folder {path.parent}.")
    settings = settings or FaceSettings()
    members, is_same = draw_pairs(seed, identities, pairs)
    shots = torch.arange(2 * pairs)
    second = second or settings
    faces = encoded_faces(seed, members.flatten(), shots, size, settings, second, workers=workers, quiet=quiet)
    encoded = [face.image for face in faces]
    about = _about(seed, identities, size, settings) | {"pairs": pairs, "folds": FOLDS, "second": asdict(second)}
    with output_errors(path), atomic_file(about_path) as file:
        file.write((json.dumps(about, indent=2) + "\n").encode())
        write_pairs(path, encoded, is_same.tolist())


def draw_pairs(seed: int, identities: range, pairs: int) -> tuple[Tensor, Tensor]:
    """The identities of each pair, int64 (pairs, 2), and whether they are the same, bool (pairs,).

    Genuine pairs cycle through all identities in a keyed order, so that their counts differ by at most one. Impostor
    pairs cycle through the groups.

    Raises:
        InputError: a group has fewer than two of the identities.
    """
    numbers = torch.tensor(identities, dtype=torch.int64)
    half = torch.arange(pairs // 2)
    order = keyed_random.permute(half % len(numbers), len(numbers), derive_key(seed, "genuine pairs"))
    genuine = numbers[order][:, None].expand(-1, 2)
    impostor = torch.empty_like(genuine)
    for group in range(GROUPS):
        candidates = numbers[group_of(numbers) == group]
        rows = half[half % GROUPS == group]
        if len(candidates) < 2:
            raise InputError(f"Group {group} has fewer than two of the identities {identities}: take more of them.")
        first = (keyed_random.uniform(derive_key(seed, "first impostor"), rows) * len(candidates)).long()
        step = 1 + (keyed_random.uniform(derive_key(seed, "second impostor"), rows) * (len(candidates) - 1)).long()
        impostor[rows] = torch.stack([candidates[first], candidates[(first + step) % len(candidates)]], dim=1)
    members = torch.cat([genuine.view(FOLDS, -1, 2), impostor.view(FOLDS, -1, 2)], dim=1).view(-1, 2)
    is_same = torch.arange(pairs) % (pairs // FOLDS) < pairs // (2 * FOLDS)
    return members, is_same


def write_contact_sheet(
    path: str | Path,
    *,
    identities: range,
    shots: int,
    size: int = 112,
    seed: int = 0,
    aligned: bool = True,
    settings: FaceSettings | None = None,
) -> None:
    """Write one image with a row for each identity and a column for each shot, as JPEG or PNG by its suffix.

    Raises:
        InputError: the file cannot be written, or a number makes no sheet.
    """
    _check_images(identities, shots, size)
    faces = render_faces(seed, *grid(identities, shots), size=size, aligned=aligned, settings=settings)
    rows = faces.images.view(len(identities), shots, size, size, 3).permute(0, 2, 1, 3, 4)
    sheet = rows.reshape(len(identities) * size, shots * size, 3).numpy()
    try:
        Image.fromarray(sheet).save(path, quality=88)
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot write a contact sheet to {path}: {error}.") from error


def _check_training_set(identities: range, shots: int, size: int, layout: str) -> None:
    _check_images(identities, shots, size)
    if layout not in get_args(Layout):
        raise InputError(f'Unknown layout "{layout}": choose recordio or folder.')


def _check_pair_set(identities: range, pairs: int, size: int) -> None:
    _check_images(identities, 1, size)
    if pairs < 1 or pairs % (2 * FOLDS):
        raise InputError(f"{pairs} pairs do not make {FOLDS} balanced folds: take a multiple of {2 * FOLDS}.")
    if len(identities) < 2 * GROUPS:
        raise InputError(f"{len(identities)} identities give no impostors in each group: take at least {2 * GROUPS}.")


def _check_images(identities: range, shots: int, size: int) -> None:
    if not identities or min(identities) < 0:
        raise InputError(f"{identities} is no range of identities: give at least one, counting from 0.")
    if shots < 1:
        raise InputError(f"shots is {shots}: an identity has at least 1 image.")
    if size < 16:
        raise InputError(f"A face needs at least 16 pixels a side, not {size}.")


def grid(identities: range, shots: int) -> tuple[Tensor, Tensor]:
    """Identity and shot of every image, identity by identity: int64 (len(identities) * shots,) each."""
    numbers = torch.tensor(identities, dtype=torch.int64)
    return numbers.repeat_interleave(shots), torch.arange(shots).repeat(len(identities))


def _about(seed: int, identities: range, size: int, settings: FaceSettings) -> dict[str, object]:
    return {
        "schema_version": 1,
        "content": CONTENT,
        "seed": seed,
        "identities": [identities.start, identities.stop, identities.step],
        "size": size,
        "settings": asdict(settings),
    }
