"""Batches of the infinite sample stream, in which each position's image is a pure function of the seed.

Position p of the stream is position p % N of epoch p // N, and every epoch is a keyed permutation of the N images.
Step k takes the positions [k * G, (k + 1) * G) for a global batch of G images. A batch that crosses the end of an epoch
is filled with the first images of the next, so that no batch is partial, each image is seen once an epoch, and the step
number is the whole state to resume from, at any world size.
"""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from partialfc.core import keyed_random
from partialfc.core.errors import InputError, JobError
from partialfc.data.images import UnreadableImage
from partialfc.data.sources.base import Source, check_label, read_image
from partialfc.distributed.collectives import split_evenly

ColorOrder = Literal["rgb", "bgr"]
T = TypeVar("T")
PREFETCH = 2  # micro-batches that each worker reads ahead
_PROBES = 32  # images whose size is looked at before a training
_MAX_ATTEMPTS = 1000  # replacements tried for one position


@dataclass(frozen=True)
class Batch:
    """The images of one micro-batch of one rank.

    Attributes:
        images: uint8 (B, H, W, 3), RGB.
        labels: int64 (B,).
        positions: int64 (B,), each image's position in the sample stream.
        step: the optimizer step it belongs to.
        micro_step: its number within the step.
        unreadable: records that could not be read and were replaced, name -> reason.
    """

    images: Tensor
    labels: Tensor
    positions: Tensor
    step: int = 0
    micro_step: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, which a GPU copies from while the host goes on; DataLoader calls it."""
        pinned = {name: getattr(self, name).pin_memory() for name in ("images", "labels", "positions")}
        return replace(self, **pinned)


class _Read(NamedTuple):
    """What a worker sends: arrays, since each tensor would be a file in shared memory. `images` unless in a slot."""

    labels: np.ndarray
    unreadable: dict[str, str]
    images: np.ndarray | None


def sample_index(positions: Tensor, images: int, seed: int) -> Tensor:
    """The index of the image at each position of the sample stream.

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
        rows = epochs == epoch
        key = keyed_random.derive_key(seed, "order", epoch)
        indices[rows] = keyed_random.permute(positions[rows] % images, images, key)
    return indices


class Loader:
    """Reads a rank's micro-batches from any step on, in worker processes if there are any.

    A step's positions are cut into `micro_steps` even parts (`split_evenly`), and each part into one even share a rank,
    of at most `micro_batch_size` images. For a given number of micro-steps, a micro-step has the same images at any
    world size. A share is empty where there are fewer images than ranks. Global random generators are left alone.

    A record that cannot be read is named in `unreadable` and replaced by another one, drawn by (seed, position): a
    batch keeps its size, and a resumed run makes the same choice.

    Attributes:
        micro_steps: micro-batches a step.
        steps_per_epoch: optimizer steps an epoch, not a whole number in general.
        num_classes: of the source.
        image_size: height and width of most of the images that are looked at, which all others must have.
        unreadable: unreadable records met so far by this rank, name -> reason.
        max_unreadable: how many of them are allowed.

    Args:
        source: the training set.
        global_batch_size: images of an optimizer step, over all ranks.
        micro_batch_size: images that a rank holds at once, at most.
        seed: the run's seed.
        rank, world_size: this process and the number of processes.
        workers: reading processes; 0 reads in this one.
        max_unreadable: by default 10, or a thousandth of the images where that is more.
        color_order: "bgr" for sets whose images were stored with red and blue exchanged; they are changed back.
        micro_steps: by default as few as `micro_batch_size` allows.

    Raises:
        InputError: a size is not positive, the micro-steps are too few for `micro_batch_size`, the images that are
            looked at are not square or of several sizes.
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
        color_order: ColorOrder = "rgb",
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
        self.num_classes = source.num_classes
        self.max_unreadable = max(10, len(source) // 1000) if max_unreadable is None else max_unreadable
        self.unreadable: dict[str, str] = {}
        self.image_size = self._find_image_size()
        fewest = -(-global_batch_size // (world_size * micro_batch_size))
        self.micro_steps = fewest if micro_steps is None else micro_steps
        if self.micro_steps < fewest:
            raise InputError(
                f"micro_steps is {micro_steps}, too few for {global_batch_size} images on {world_size} processes that "
                f"hold at most {micro_batch_size} each: raise data.micro_batch_size, take more processes or, in a new "
                f"run, {fewest} micro-steps."
            )
        self.steps_per_epoch = len(source) / global_batch_size
        self._global_batch_size, self._seed = global_batch_size, seed
        self._rank, self._world_size = rank, world_size
        self._workers, self._color_order = workers, color_order

    def __len__(self) -> int:
        """The number of images."""
        return len(self.source)

    def names(self, positions: list[int]) -> list[str]:
        """What messages call the images at these positions of the sample stream."""
        indices = sample_index(torch.tensor(positions, dtype=torch.int64), len(self), self._seed)
        return [self.source.name(index) for index in indices.tolist()]

    def counts(self, micro_step: int) -> list[int]:
        """The number of images of each rank in a micro-step, in rank order, without communication."""
        shares = (self._share(micro_step, rank) for rank in range(self._world_size))
        return [stop - start for start, stop in shares]

    def batches(self, first_step: int, last_step: int) -> Generator[Batch, None, None]:
        """The micro-batches of the steps [first_step, last_step), in order.

        Close the generator, however the work ends: this stops the worker processes. They ignore SIGTERM, with which
        Python would stop them at exit, and it would then wait for them forever.

        Raises:
            InputError: a label lies outside [0, num_classes), an image has another size, or more than `max_unreadable`
                records are unreadable. The message names the record.
            JobError: a worker process died.
        """
        numbers = range(first_step * self.micro_steps, last_step * self.micro_steps)
        slots = self._shared_slots() if self._workers else None
        with closing(read_ahead(numbers, partial(self._read, slots=slots), self._workers)) as outcomes:
            for number, outcome in zip(numbers, outcomes, strict=False):
                if isinstance(outcome, InputError):
                    raise outcome
                step, micro_step = divmod(number, self.micro_steps)
                for name, reason in outcome.unreadable.items():
                    self._count(name, reason)
                labels, positions = torch.from_numpy(outcome.labels), self._positions(step, micro_step)
                if slots is None:
                    images = torch.from_numpy(outcome.images)
                else:
                    images = slots[number % len(slots), : len(labels)]
                    images = images if torch.cuda.is_available() else images.clone()
                batch = Batch(images, labels, positions, step, micro_step, outcome.unreadable)
                yield batch.pin_memory() if torch.cuda.is_available() else batch

    def _shared_slots(self) -> Tensor:
        """Shared memory (slots, B, S, S, 3) for the images of the micro-batches in work; number n is in slot n % slots.

        Memory that is new for each batch costs a worker a third of its time. No worker begins with number n + slots
        before n + 1 is asked for, and n has then been copied.
        """
        most = max(max(self.counts(micro_step)) for micro_step in range(self.micro_steps))
        shape = (self._workers * PREFETCH + 1, most, self.image_size, self.image_size, 3)
        return torch.empty(shape, dtype=torch.uint8).share_memory_()

    def _share(self, micro_step: int, rank: int) -> tuple[int, int]:
        """Start and stop, within the step, of a rank's share of a micro-step."""
        start, stop = split_evenly(self._global_batch_size, self.micro_steps, micro_step)
        first, last = split_evenly(stop - start, self._world_size, rank)
        return start + first, start + last

    def _positions(self, step: int, micro_step: int) -> Tensor:
        return torch.arange(*self._share(micro_step, self._rank)) + step * self._global_batch_size

    def _read(self, number: int, slots: Tensor | None) -> _Read | InputError:
        """Read a micro-batch by number, its images into a slot if there are any.

        An InputError comes back as a value: torch would rewrite its message.
        """
        try:
            positions = self._positions(*divmod(number, self.micro_steps))
            if slots is None:
                images = np.empty((len(positions), self.image_size, self.image_size, 3), np.uint8)
            else:
                images = slots[number % len(slots), : len(positions)].numpy()
            labels, unreadable = self._read_into(images, positions)
            return _Read(labels, unreadable, images if slots is None else None)
        except InputError as error:
            return error

    def _read_into(self, images: np.ndarray, positions: Tensor) -> tuple[np.ndarray, dict[str, str]]:
        indices = sample_index(positions, len(self), self._seed).tolist()
        unreadable: dict[str, str] = {}
        labels = [
            self._read_sample(position, index, unreadable, image)
            for position, index, image in zip(positions.tolist(), indices, images, strict=True)
        ]
        if self._color_order == "bgr":
            images[:] = images[..., ::-1].copy()
        return np.array(labels, np.int64), unreadable

    def _read_sample(self, position: int, index: int, unreadable: dict[str, str], out: np.ndarray) -> int:
        """Put the image at `index` into `out` (S, S, 3), and return its label.

        If it is unreadable, a replacement drawn by (seed, position) takes its place.
        """
        for attempt in range(_MAX_ATTEMPTS):
            try:
                sample, image = read_image(self.source, index, out)
            except UnreadableImage as error:
                unreadable[self.source.name(index)] = str(error)
                key = keyed_random.derive_key(self._seed, "replacement", position)
                index = int(keyed_random.bits(key, torch.tensor(attempt))) % len(self)
                continue
            check_label(sample, self.num_classes)
            if image.shape[:2] != (self.image_size, self.image_size):
                raise InputError(
                    f"{sample.name} is {image.shape[1]} x {image.shape[0]} and not {self.image_size} x "
                    f"{self.image_size} like the others: align all images to one size first."
                )
            if image is not out:
                out[:] = image
            return sample.label
        raise InputError(f"{self.source.path}: {_MAX_ATTEMPTS} records drawn in a row cannot be read.")

    def _find_image_size(self) -> int:
        """The size of some images that are spread over the set; an InputError names one that has another."""
        probes = np.unique(np.linspace(0, len(self) - 1, _PROBES, dtype=np.int64)).tolist()
        sizes: dict[str, tuple[int, int]] = {}  # width and height, by name
        for number, index in enumerate(chain(probes, range(len(self)))):
            if sizes and number >= len(probes):
                break
            try:
                sample, image = read_image(self.source, index)
            except UnreadableImage as error:
                if number >= len(probes):
                    self._count(self.source.name(index), str(error))
                continue
            check_label(sample, self.num_classes)
            sizes[sample.name] = (image.shape[1], image.shape[0])
        if not sizes:
            raise InputError(f"None of the {len(self)} images of {self.source.path} can be read.")
        [(usual, count)] = Counter(sizes.values()).most_common(1)
        for name, (width, height) in sizes.items():
            if (width, height) != usual:
                raise InputError(
                    f"{name} is {width} x {height}, but {count} of the {len(sizes)} images looked at are "
                    f"{usual[0]} x {usual[1]}: align all images to one size first."
                )
            if width != height:
                raise InputError(f"{name} is {width} x {height}, but images must be square: align them.")
        return usual[0]

    def _count(self, name: str, reason: str) -> None:
        self.unreadable.setdefault(name, reason)
        if len(self.unreadable) > self.max_unreadable:
            raise InputError(
                f"{len(self.unreadable)} records cannot be read, more than the {self.max_unreadable} allowed by "
                f"max_unreadable; the last is {reason}."
            )


def read_ahead(numbers: Sequence[int], read: Callable[[int], T], workers: int) -> Generator[T, None, None]:
    """`read(number)` for each of the numbers, in order, from worker processes that read some ahead.

    Close the generator, however the work ends: see `Loader.batches`.

    Args:
        numbers: what to read.
        read: returns tensors, or values that hold them; torch would rewrite the message of what it raises.
        workers: reading processes; 0 reads in this one.

    Raises:
        JobError: a worker process died.
    """
    batches: DataLoader[Any] = DataLoader(
        numbers,  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=read,  # type: ignore[arg-type]
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_stop_signals,
        generator=torch.Generator(),  # without one, torch draws the workers' seeds from its global generator
    )
    return _guarded(batches)


def _ignore_stop_signals(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which reach every process of a job, to the main process: it needs one more batch."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _guarded(batches: DataLoader[Any]) -> Generator[Any, None, None]:
    """Iterate; the death of a worker raises a JobError here, rather than an exception anywhere in the process."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD)
    iterator = iter(batches)
    if in_main_thread and handler is not None:
        # torch installs a handler that raises in whatever line runs when a worker dies, such as in the middle of an
        # optimizer step. Without it, the iterator notices at its next batch, within 5 seconds.
        signal.signal(signal.SIGCHLD, handler)
    try:
        while True:
            try:
                outcome = next(iterator)
            except StopIteration:
                return
            except (RuntimeError, EOFError, OSError) as error:
                # A worker that dies while it hands over a batch leaves an EOFError or OSError; the message of an
                # exception raised in a worker begins with "Caught".
                died = batches.num_workers and not str(error).startswith("Caught")
                if not died or (isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker")):
                    raise
                raise JobError(
                    f"A process that reads the data died ({_dead_workers(iterator) or repr(error)}): is memory, or "
                    "shared memory (/dev/shm), exhausted?"
                ) from error
            yield outcome
    finally:
        # Explicitly, because the traceback of an uncaught error keeps the iterator alive.
        getattr(iterator, "_shutdown_workers", lambda: None)()


def _dead_workers(iterator: Any) -> str:
    """The dead workers of torch's iterator, with their exit statuses."""
    dead = []
    for number, worker in enumerate(getattr(iterator, "_workers", [])):
        worker.join(timeout=1)
        if worker.exitcode:
            dead.append(f"worker {number}, pid {worker.pid}, exit status {worker.exitcode}")
    return "; ".join(dead)
