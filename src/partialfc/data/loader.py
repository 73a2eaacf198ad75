"""Batches in the endless order: which image stands where is a pure function of the seed.

Position p of the endless order is place p % N of epoch p // N, and every epoch is a keyed permutation of the N images.
Step k of the global batch takes the positions [k * G, (k + 1) * G): a batch that crosses the end of an epoch is filled
up with the first images of the next, so that none is dropped or partial, each image is seen once an epoch, and the step
number alone is the position to resume from, at any world size.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from partialfc.core import keyed_random
from partialfc.core.errors import InputError, JobError
from partialfc.data.images import UnreadableImage
from partialfc.data.sources.base import Source, check_label, read_image
from partialfc.distributed.collectives import split_evenly

ColorOrder = Literal["rgb", "bgr"]
PREFETCH = 2  # micro-batches that each worker reads ahead
_MAX_ATTEMPTS = 1000  # replacements tried for one position


@dataclass(frozen=True)
class Batch:
    """The images of one micro-batch of one rank.

    Attributes:
        images: uint8 (B, H, W, 3), RGB.
        labels: int64 (B,).
        positions: int64 (B,), each image's place in the endless order.
        step: the optimizer step it belongs to.
        micro_step: which of the step's micro-batches it is.
        unreadable: records that could not be read and were replaced by others, name -> what is wrong.
    """

    images: Tensor
    labels: Tensor
    positions: Tensor
    step: int = 0
    micro_step: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)


def order(positions: Tensor, images: int, seed: int) -> Tensor:
    """Which image stands at each place of the endless order.

    Args:
        positions: int64 (B,), from 0.
        images: N, the number of images.
        seed: the run's seed.

    Returns:
        int64 (B,) in [0, N).
    """
    epochs = positions // images
    indices = torch.empty_like(positions)
    for epoch in epochs.unique().tolist():
        chosen = epochs == epoch
        key = keyed_random.derive_key(seed, "order", epoch)
        indices[chosen] = keyed_random.permute(positions[chosen] % images, images, key)
    return indices


@dataclass(frozen=True)
class _Plan:
    """All that a worker must know to make any micro-batch of its rank: picklable, and never changed."""

    source: Source
    global_batch_size: int
    micro_steps: int
    seed: int
    rank: int
    world_size: int
    num_classes: int
    color_order: ColorOrder
    image_size: int

    def positions(self, step: int, micro_step: int) -> Tensor:
        """The places in the endless order that a micro-batch of this rank takes: int64 (B,)."""
        first, last = self.share(micro_step, self.rank)
        offset = step * self.global_batch_size
        return torch.arange(offset + first, offset + last)

    def share(self, micro_step: int, rank: int) -> tuple[int, int]:
        """Start and stop, in the step, of what a rank takes of a micro-step."""
        start, stop = split_evenly(self.global_batch_size, self.micro_steps, micro_step)
        first, last = split_evenly(stop - start, self.world_size, rank)
        return start + first, start + last

    def read(self, step: int, micro_step: int) -> Batch:
        """Read and decode a micro-batch."""
        positions = self.positions(step, micro_step)
        indices = order(positions, len(self.source), self.seed)
        images = np.empty((len(positions), self.image_size, self.image_size, 3), np.uint8)
        labels = np.empty(len(positions), np.int64)
        unreadable: dict[str, str] = {}
        for row, (position, index) in enumerate(zip(positions.tolist(), indices.tolist(), strict=True)):
            labels[row], images[row] = self._read_one(position, index, unreadable)
        if self.color_order == "bgr":
            images = np.ascontiguousarray(images[..., ::-1])
        return Batch(torch.from_numpy(images), torch.from_numpy(labels), positions, step, micro_step, unreadable)

    def _read_one(self, position: int, index: int, unreadable: dict[str, str]) -> tuple[int, np.ndarray]:
        """The label and image at `index`, or of another one, drawn by (seed, position), if that is unreadable."""
        for attempt in range(_MAX_ATTEMPTS):
            try:
                sample, image = read_image(self.source, index)
            except UnreadableImage as error:
                unreadable[self.source.name(index)] = str(error)
                key = keyed_random.derive_key(self.seed, "replacement", position)
                index = int(keyed_random.bits(key, torch.tensor(attempt))) % len(self.source)
                continue
            check_label(sample, self.num_classes)
            if image.shape[:2] != (self.image_size, self.image_size):
                raise InputError(
                    f"{sample.name} is {image.shape[1]} x {image.shape[0]} and not {self.image_size} x "
                    f"{self.image_size} like the others: align all images to one size first."
                )
            return sample.label, image
        raise InputError(f"{self.source.path}: {_MAX_ATTEMPTS} records drawn in a row cannot be read.")


class _Places(Sampler[tuple[int, int]]):
    """(step, micro_step) of every micro-batch from one step up to another, in order."""

    def __init__(self, first_step: int, last_step: int, micro_steps: int) -> None:
        self.first_step, self.last_step, self.micro_steps = first_step, last_step, micro_steps

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for step in range(self.first_step, self.last_step):
            for micro_step in range(self.micro_steps):
                yield step, micro_step


class _MicroBatches(Dataset[Batch | InputError]):
    """Micro-batches by (step, micro_step). A user's mistake comes back as a value: torch would rewrite its message."""

    def __init__(self, plan: _Plan) -> None:
        self.plan = plan

    def __getitem__(self, place: tuple[int, int]) -> Batch | InputError:
        try:
            return self.plan.read(*place)
        except InputError as error:
            return error


class Loader:
    """Reads a rank's micro-batches, in worker processes if asked to, from any step on.

    A step's positions are cut into `micro_steps` even parts (`distributed.split_evenly`), and each of these into one
    even part of at most `micro_batch_size` images for each rank: the images of a micro-step are the same ones at any
    world size, if only the number of micro-steps is. A rank's part is empty where there are fewer images than ranks.
    Nothing is drawn from a global random generator.

    A record that cannot be read is named in `unreadable` and replaced by another one, drawn by (seed, position): a
    batch keeps its size, and a resumed run makes the same choice.

    Attributes:
        micro_steps: micro-batches a step.
        steps_per_epoch: optimizer steps an epoch, not a whole number in general.
        num_classes, image_size: as given, or as found in the data.
        unreadable: unreadable records met so far by this rank, name -> what is wrong.
        max_unreadable: how many of them are allowed.

    Args:
        source: the training set.
        global_batch_size: images an optimizer step takes over all ranks.
        micro_batch_size: images that a rank holds at once, at most.
        seed: the run's seed.
        rank, world_size: this process and the number of processes.
        workers: reading processes; 0 reads in this one.
        max_unreadable: by default 10, or a thousandth of the images where that is more.
        num_classes: by default the source's.
        color_order: "bgr" for sets whose images were stored with red and blue exchanged; they are changed back.
        image_size: height and width that all images must have; by default those of the first readable one.
        prefetch: micro-batches that each worker reads ahead.
        micro_steps: by default as few as `micro_batch_size` allows.

    Raises:
        InputError: a size is not positive, the micro-steps are too few for `micro_batch_size`, or the images have no
            common square size.
    """

    def __init__(
        self,
        source: Source,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        max_unreadable: int | None = None,
        num_classes: int | None = None,
        color_order: ColorOrder = "rgb",
        image_size: int | None = None,
        prefetch: int = PREFETCH,
        micro_steps: int | None = None,
    ) -> None:
        for name, value in (("global_batch_size", global_batch_size), ("micro_batch_size", micro_batch_size)):
            if value < 1:
                raise InputError(f"{name} is {value}, but a batch has at least one image.")
        if color_order not in get_args(ColorOrder):
            raise InputError(f"color_order is {color_order!r}: choose rgb or bgr.")
        if workers < 0:
            raise InputError(f"workers is {workers}: give 0 to read without worker processes, or their number.")
        self.source = source
        self.workers = workers
        self.prefetch = prefetch
        self.max_unreadable = max(10, len(source) // 1000) if max_unreadable is None else max_unreadable
        self.num_classes = num_classes or source.num_classes
        self.unreadable: dict[str, str] = {}
        self.image_size = image_size or self._find_image_size()
        fewest = -(-global_batch_size // (world_size * micro_batch_size))
        self.micro_steps = fewest if micro_steps is None else micro_steps
        if self.micro_steps < fewest:
            raise InputError(
                f"micro_steps is {micro_steps}, too few for {global_batch_size} images on {world_size} processes that "
                f"hold at most {micro_batch_size} each: raise data.micro_batch_size, take more processes or, in a new "
                f"run, {fewest} micro-steps."
            )
        self.steps_per_epoch = len(source) / global_batch_size
        self._plan = _Plan(
            source,
            global_batch_size,
            self.micro_steps,
            seed,
            rank,
            world_size,
            self.num_classes,
            color_order,
            self.image_size,
        )

    def __len__(self) -> int:
        """The number of images."""
        return len(self.source)

    def names(self, positions: list[int]) -> list[str]:
        """What messages call the images at these places of the endless order."""
        indices = order(torch.tensor(positions, dtype=torch.int64), len(self.source), self._plan.seed)
        return [self.source.name(index) for index in indices.tolist()]

    def batches(self, first_step: int, last_step: int) -> Generator[Batch, None, None]:
        """The micro-batches of the steps from `first_step` up to, not including, `last_step`, in order.

        Close it, however the work ends: the worker processes end with it, and do not listen to SIGTERM, with which
        Python would end them, and then wait for them for ever, when this process ends before they do.

        Raises:
            InputError: a label lies outside [0, num_classes), an image has another size, or more than `max_unreadable`
                records are unreadable. The message names the record.
            JobError: a worker process died.
        """
        micro_batches: DataLoader[Any] = DataLoader(
            _MicroBatches(self._plan),
            batch_size=None,
            sampler=_Places(first_step, last_step, self.micro_steps),
            num_workers=self.workers,
            prefetch_factor=self.prefetch if self.workers else None,
            collate_fn=_as_it_is,
            worker_init_fn=_ignore_stop_signals,
            generator=torch.Generator(),  # without one, torch draws the workers' seeds from its global generator
        )
        with closing(_guarded(micro_batches)) as outcomes:
            for outcome in outcomes:
                if isinstance(outcome, InputError):
                    raise outcome
                for name, reason in outcome.unreadable.items():
                    self._count(name, reason)
                yield outcome

    def counts(self, micro_step: int) -> list[int]:
        """How many images each rank takes in a micro-step, in rank order: known without asking the ranks."""
        shares = [self._plan.share(micro_step, rank) for rank in range(self._plan.world_size)]
        return [stop - start for start, stop in shares]

    def _find_image_size(self) -> int:
        for index in range(len(self.source)):
            try:
                sample, image = read_image(self.source, index)
            except UnreadableImage as error:
                self._count(self.source.name(index), str(error))
                continue
            if image.shape[0] != image.shape[1]:
                raise InputError(
                    f"{sample.name} is {image.shape[1]} x {image.shape[0]}, but images must be square: align them."
                )
            return image.shape[0]
        raise InputError(f"None of the {len(self.source)} images of {self.source.path} can be read.")

    def _count(self, name: str, reason: str) -> None:
        self.unreadable.setdefault(name, reason)
        if len(self.unreadable) > self.max_unreadable:
            raise InputError(
                f"{len(self.unreadable)} records cannot be read, more than the {self.max_unreadable} allowed by "
                f"max_unreadable; the last is {reason}."
            )


def _as_it_is(batch: Any) -> Any:
    return batch


def _ignore_stop_signals(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which come to every process of a job, to the main process: it wants one more batch."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _guarded(micro_batches: DataLoader[Any]) -> Generator[Any, None, None]:
    """Iterate, turning the death of a worker into a JobError here rather than into an exception anywhere."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD)
    iterator = iter(micro_batches)
    if in_main_thread and handler is not None:
        # torch installs a handler that raises in whatever line happens to run when a worker dies, be it the middle of
        # an optimizer step. Without it, the iterator finds out at its next batch, within 5 seconds.
        signal.signal(signal.SIGCHLD, handler)
    try:
        while True:
            try:
                outcome = next(iterator)
            except StopIteration:
                return
            except (RuntimeError, EOFError, OSError) as error:
                # A worker that dies in the middle of a hand-over leaves an EOFError or OSError; an exception that was
                # raised in a worker comes as "Caught ...".
                died = micro_batches.num_workers and not str(error).startswith("Caught")
                if not died or (isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker")):
                    raise
                raise JobError(
                    f"A process that reads the data died ({_dead_workers(iterator) or repr(error)}): is memory, or "
                    "shared memory (/dev/shm), exhausted?"
                ) from error
            yield outcome
    finally:
        # Not left to the iterator's end: an error that is kept, as one that nobody caught, keeps it alive.
        getattr(iterator, "_shutdown_workers", lambda: None)()


def _dead_workers(iterator: Any) -> str:
    """Which of the workers behind torch's iterator died, and of what."""
    dead = []
    for number, worker in enumerate(getattr(iterator, "_workers", [])):
        worker.join(timeout=1)
        if worker.exitcode:
            dead.append(f"worker {number}, pid {worker.pid}, exit status {worker.exitcode}")
    return "; ".join(dead)
