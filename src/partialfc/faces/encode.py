"""Faces rendered and encoded as JPEG by several processes, in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from partialfc.core.console import Progress
from partialfc.data.images import encode_jpeg
from partialfc.faces.parameters import jpeg_quality
from partialfc.faces.render import render_faces
from partialfc.faces.settings import FaceSettings

_IMAGES_PER_TASK = 128
_WORTH_WORKERS = 1024  # images; starting workers for fewer costs more than it gains


class EncodedFace(NamedTuple):
    """A face as files hold it.

    Attributes:
        image: a JPEG file.
        landmarks: float32 (5, 2), exact, as those of `Faces`.
    """

    image: bytes
    landmarks: NDArray[np.float32]


def encoded_faces(
    seed: int,
    identities: Tensor,
    shots: Tensor,
    size: int,
    *settings: FaceSettings,
    aligned: bool = True,
    workers: int | None = None,
    quiet: bool = True,
    what: str = "rendering",
) -> Generator[EncodedFace, None, None]:
    """The faces of `render_faces`, encoded, in order.

    Args:
        seed, identities, shots, size, aligned: as for `render_faces`.
        settings: strengths of the nuisances, of the images in turn: of one setting all, of two the even and the odd.
        workers: processes that render (0: none but this one); by default one for each core, none for few images.
        quiet: show no progress.
        what: what the progress is of.
    """
    total, done = len(identities), 0
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if total >= _WORTH_WORKERS else 0
    step = _IMAGES_PER_TASK * len(settings)
    tasks = (
        (seed, identities[rows].numpy(), shots[rows].numpy(), size, aligned, settings)
        for rows in (slice(start, start + step) for start in range(0, total, step))
    )
    with Progress(what, total, quiet=quiet) as progress:
        for faces in _run(tasks, workers) if workers > 0 else (_encode(*task) for task in tasks):
            yield from faces
            done += len(faces)
            progress.update(done)


def _encode(
    seed: int,
    identities: NDArray[np.int64],
    shots: NDArray[np.int64],
    size: int,
    aligned: bool,
    settings: tuple[FaceSettings, ...],
) -> list[EncodedFace]:
    """Render and encode the images of one task."""
    encoded: dict[int, EncodedFace] = {}
    for turn, strengths in enumerate(settings):
        rows = range(turn, len(identities), len(settings))
        keys = torch.from_numpy(identities)[turn :: len(settings)], torch.from_numpy(shots)[turn :: len(settings)]
        faces = render_faces(seed, *keys, size=size, aligned=aligned, settings=strengths)
        qualities = jpeg_quality(seed, *keys, strengths).tolist()
        for row, image, quality, landmarks in zip(
            rows, faces.images.numpy(), qualities, faces.landmarks.numpy(), strict=True
        ):
            encoded[row] = EncodedFace(encode_jpeg(image, quality), landmarks)
    return [encoded[row] for row in range(len(identities))]


def _run(tasks: Iterable[tuple[Any, ...]], workers: int) -> Iterator[list[EncodedFace]]:
    """`_encode` of each task, in order, with a few tasks for each worker in flight."""
    # Spawned, not forked: a fork of a process with running threads of torch can hang.
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        pending: deque[Future[list[EncodedFace]]] = deque()
        try:
            for task in tasks:
                pending.append(pool.submit(_encode, *task))
                if len(pending) > 3 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
