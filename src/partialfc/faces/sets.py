"""Procedural sets in the real benchmarks' file formats, so that everything else treats them like real data."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from partialfc.core import keyed_random
from partialfc.core.errors import InputError
from partialfc.core.files import atomic_file, atomic_folder, output_errors
from partialfc.core.keyed_random import derive_key
from partialfc.data.images import encode_jpeg
from partialfc.data.pair_files import write_pairs
from partialfc.data.sources.recordio import RecordWriter
from partialfc.faces.render import GROUPS, FaceSettings, jpeg_quality, render_faces

Layout = Literal["recordio", "folder"]
Progress = Callable[[int, int], None]

FOLDS = 10
# Images that a worker renders for one request, and below which starting workers costs more than it gains.
_REQUEST = 128
_WORTH_WORKERS = 1024


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
    progress: Progress | None = None,
) -> None:
    """Write aligned procedural faces as a training set, with `faces.json` saying what they are.

    The class of an identity is its place in `identities`. The files are written beside the target and renamed when
    whole; what they hold depends on neither `workers` nor the machine's load.

    Args:
        folder: the folder to make.
        identities: numbers of the identities.
        shots: images of each.
        size: side of the images in pixels.
        seed: the world from which identities and shots are drawn.
        layout: "recordio" (train.rec with header, train.idx, property) or "folder" (`<identity>/<shot>.jpg`).
        settings: strengths of the nuisances.
        workers: processes that render; by default one for each core, none for small sets. Scripts that start
            processes need the usual `if __name__ == "__main__":`.
        progress: called with (images done, images in all).

    Raises:
        InputError: the folder exists, cannot be written, or the numbers make no set.
    """
    _check_numbers(identities, size)
    if shots < 1:
        raise InputError(f"A training set needs at least 1 shot of each identity, not {shots}.")
    if layout not in ("recordio", "folder"):
        raise InputError(f'Unknown layout "{layout}": choose recordio or folder.')
    settings = settings or FaceSettings()
    people = torch.tensor(identities, dtype=torch.int64).repeat_interleave(shots)
    takes = torch.arange(shots).repeat(len(identities))
    images = _encoded_images(seed, people, takes, size, settings, workers, progress)
    with _new_folder(Path(folder)) as partial:
        if layout == "recordio":
            with RecordWriter(partial / "train.rec", num_classes=len(identities), size=size) as writer:
                for number, image in enumerate(images):
                    writer.write(image, number // shots)
        else:
            digits = len(str(max(identities)))
            for number, image in enumerate(images):
                home = partial / f"{identities[number // shots]:0{digits}d}"
                home.mkdir(exist_ok=True)
                (home / f"{number % shots:0{len(str(shots - 1))}d}.jpg").write_bytes(image)
        about = _about(seed, identities, size, settings) | {"shots": shots, "layout": layout}
        (partial / "faces.json").write_text(json.dumps(about, indent=2) + "\n")


def write_pair_set(
    path: str | Path,
    *,
    identities: range,
    pairs: int = 6000,
    size: int = 112,
    seed: int = 0,
    settings: FaceSettings | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write aligned procedural pairs as a verification `.bin`, with a `.json` of the same stem saying what they are.

    The order is LFW's: ten folds, in each first the genuine, then as many impostor pairs. Impostors belong to the same
    group, so that a group's looks do not tell them apart. No shot appears twice.

    Args:
        path: the `.bin` file to make.
        identities: numbers of the identities; keep them apart from those trained on.
        pairs: a multiple of 20.
        size, seed, settings, workers, progress: as for `write_training_set`.

    Raises:
        InputError: the file exists, cannot be written, or the numbers make no set.
    """
    path = Path(path)
    about_path = path.with_suffix(".json")
    _check_numbers(identities, size)
    if pairs < 1 or pairs % (2 * FOLDS):
        raise InputError(f"{pairs} pairs do not make {FOLDS} balanced folds: take a multiple of {2 * FOLDS}.")
    if len(identities) < 2 * GROUPS:
        raise InputError(f"{len(identities)} identities give no impostors in each group: take at least {2 * GROUPS}.")
    for target in (path, about_path):
        if target.exists():
            raise InputError(f"{target} exists already: remove it, or write somewhere else.")
    if not path.parent.is_dir():
        raise InputError(f"Cannot write {path}: there is no folder {path.parent}.")
    settings = settings or FaceSettings()
    people, is_same = draw_pairs(seed, identities, pairs)
    takes = torch.arange(2 * pairs)
    encoded = list(_encoded_images(seed, people.flatten(), takes, size, settings, workers, progress))
    about = _about(seed, identities, size, settings) | {"pairs": pairs, "folds": FOLDS}
    with output_errors(path), atomic_file(about_path) as file:
        file.write((json.dumps(about, indent=2) + "\n").encode())
        write_pairs(path, encoded, is_same.tolist())


def draw_pairs(seed: int, identities: range, pairs: int) -> tuple[Tensor, Tensor]:
    """Who stands in which pair: identities int64 (pairs, 2) and whether they are the same, bool (pairs,).

    Genuine pairs go round all identities in a keyed order, so that each appears as often as the others (give or take
    one). Impostor pairs take the groups in turn.
    """
    numbers = torch.tensor(identities, dtype=torch.int64)
    half = torch.arange(pairs // 2)
    order = keyed_random.permute(half % len(numbers), len(numbers), derive_key(seed, "genuine pairs"))
    genuine = numbers[order][:, None].expand(-1, 2)
    impostor = torch.empty_like(genuine)
    for group in range(GROUPS):
        members = numbers[numbers % GROUPS == group]
        mine = half[half % GROUPS == group]
        if len(members) < 2:
            raise InputError(f"Group {group} has fewer than two of the identities {identities}: take more of them.")
        first = (keyed_random.uniform(derive_key(seed, "first impostor"), mine) * len(members)).long()
        step = 1 + (keyed_random.uniform(derive_key(seed, "second impostor"), mine) * (len(members) - 1)).long()
        impostor[mine] = torch.stack([members[first], members[(first + step) % len(members)]], dim=1)
    people = torch.cat([genuine.view(FOLDS, -1, 2), impostor.view(FOLDS, -1, 2)], dim=1).view(-1, 2)
    is_same = torch.arange(pairs) % (pairs // FOLDS) < pairs // (2 * FOLDS)
    return people, is_same


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
    """Write one picture with a row for each identity and a column for each shot; the suffix decides JPEG or PNG.

    Raises:
        InputError: the file cannot be written, or the numbers make no sheet.
    """
    _check_numbers(identities, size)
    if shots < 1:
        raise InputError(f"A contact sheet needs at least 1 shot of each identity, not {shots}.")
    people = torch.tensor(identities, dtype=torch.int64).repeat_interleave(shots)
    takes = torch.arange(shots).repeat(len(identities))
    faces = render_faces(seed, people, takes, size=size, aligned=aligned, settings=settings)
    rows = faces.images.view(len(identities), shots, size, size, 3).permute(0, 2, 1, 3, 4)
    sheet = rows.reshape(len(identities) * size, shots * size, 3).numpy()
    try:
        Image.fromarray(sheet).save(path, quality=88)
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot write a contact sheet to {path}: {error}.") from error


def _check_numbers(identities: range, size: int) -> None:
    if not identities or min(identities) < 0:
        raise InputError(f"{identities} is no range of identities: give at least one, counting from 0.")
    if size < 16:
        raise InputError(f"A face needs at least 16 pixels a side, not {size}.")


def _about(seed: int, identities: range, size: int, settings: FaceSettings) -> dict[str, object]:
    return {
        "content": "procedural faces: drawings of people who do not exist",
        "seed": seed,
        "identities": [identities.start, identities.stop, identities.step],
        "size": size,
        "settings": asdict(settings),
    }


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` at a clean end and is removed otherwise."""
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder} exists already: remove it, or write somewhere else.")
    with output_errors(folder), atomic_folder(folder) as temporary:
        yield temporary


def _encode_some(seed: int, people: np.ndarray, takes: np.ndarray, size: int, settings: FaceSettings) -> list[bytes]:
    """Render and encode one request: what a worker does."""
    identities, shots = torch.from_numpy(people), torch.from_numpy(takes)
    images = render_faces(seed, identities, shots, size=size, settings=settings).images.numpy()
    qualities = jpeg_quality(seed, identities, shots, settings).tolist()
    return [encode_jpeg(image, quality) for image, quality in zip(images, qualities, strict=True)]


def _encoded_images(
    seed: int,
    people: Tensor,
    takes: Tensor,
    size: int,
    settings: FaceSettings,
    workers: int | None,
    progress: Progress | None,
) -> Iterator[bytes]:
    """JPEG files of the shots, in order, rendered by `workers` processes (0: in this one)."""
    total = len(people)
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if total >= _WORTH_WORKERS else 0
    requests = (
        (seed, people[start : start + _REQUEST].numpy(), takes[start : start + _REQUEST].numpy(), size, settings)
        for start in range(0, total, _REQUEST)
    )
    done = 0
    for images in _answers(requests, workers):
        yield from images
        done += len(images)
        if progress is not None:
            progress(done, total)


_Request = tuple[int, np.ndarray, np.ndarray, int, FaceSettings]


def _answers(requests: Iterator[_Request], workers: int) -> Iterator[list[bytes]]:
    """Answers in the order of the requests, a few of which are under way at a time."""
    if workers <= 0:
        for request in requests:
            yield _encode_some(*request)
        return
    # Spawned, not forked: a fork of a process whose torch has running threads can hang.
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        under_way: deque[Future[list[bytes]]] = deque()
        try:
            for request in requests:
                under_way.append(pool.submit(_encode_some, *request))
                if len(under_way) > 3 * workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()
