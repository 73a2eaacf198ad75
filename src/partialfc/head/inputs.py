"""The inputs of a head: what it refuses, and the labels and sample counts of all ranks.

A GPU that reads nothing back cannot raise at once. There `InputFlag` defers the validation: the device records the
first bad batch and suppresses updates, and the host raises later.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from partialfc.core.errors import InputError
from partialfc.distributed.collectives import (
    Group,
    Shard,
    all_gather_rows,
    all_reduce,
    gather_json,
    rank_of,
    split_evenly,
)
from partialfc.head.center_state import CenterState
from partialfc.head.margins.base import Margin
from partialfc.head.sampling import Sampler

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class NonFiniteEmbeddings(InputError):
    """The backbone returned NaN or infinity; every rank raises it in the same step, and nothing is updated."""


@dataclass(frozen=True)
class GlobalLabels:
    """The samples of all ranks. A training loop that knows them before it calls the head saves two collectives.

    Attributes:
        counts: the number of samples of each rank, in rank order.
        labels: int64 (G,), their labels, in the same order.
    """

    counts: list[int]
    labels: Tensor


def gather_labels(
    embeddings: Tensor,
    labels: Tensor,
    step_labels: Tensor | None,
    known: GlobalLabels | None,
    centers: Tensor,
    state: CenterState,
    shard: Shard,
) -> GlobalLabels:
    """The sample counts and labels of all ranks. Two collectives, none if they are known.

    Raises:
        InputError: this rank's batch does not fit the head, or there is no sample; on all ranks alike, unless the
            labels are known: then the ranks exchange nothing before they raise.
    """
    if known is None:
        counts = batch_counts(embeddings, labels, step_labels, centers, state, shard)
        known = GlobalLabels(counts, all_gather_rows(labels, counts, shard.group))
    elif (problem := _batch_problem(embeddings, labels, step_labels, centers)) is not None:
        raise InputError(problem)
    else:
        _check_counts(known.counts, len(embeddings), shard)
    if sum(known.counts) == 0:
        raise InputError("the global batch is empty: the head needs at least one image on one rank.")
    return known


def batch_counts(
    embeddings: Tensor,
    labels: Tensor,
    step_labels: Tensor | None,
    centers: Tensor,
    state: CenterState,
    shard: Shard,
) -> list[int]:
    """The number of samples of each rank. One collective, which also makes a batch refused on one rank an error on all.

    Raises:
        InputError: some rank's batch has a problem, or the ranks disagree in the dtype of embeddings or in the step.
    """
    problem = _batch_problem(embeddings, labels, step_labels, centers)
    if shard.world_size == 1:
        if problem is not None:
            raise InputError(problem)
        return [len(embeddings)]
    cards = torch.zeros(shard.world_size, 3, dtype=torch.int64, device=centers.device)
    own = (-1, 0, 0) if problem else (len(embeddings), _FLOATS.index(embeddings.dtype), state.step)
    cards[shard.rank] = torch.tensor(own)
    counts, dtypes, steps = zip(*all_reduce(cards, group=shard.group).tolist(), strict=True)
    if problem is not None:
        raise InputError(problem)
    if min(counts) < 0:
        raise InputError(f"the head refuses the batch of process {counts.index(-1)}, whose own error says why.")
    for name, values in (("the dtype of embeddings", [_FLOATS[one] for one in dtypes]), ("head.step", steps)):
        _check_equal(name, values)
    return list(counts)


def _check_equal(name: str, values: Any) -> None:
    """Raise InputError unless all ranks have the same value; `values` are in rank order."""
    for rank, value in enumerate(values):
        if value != values[0]:
            raise InputError(
                f"the processes disagree in {name}: it is {values[0]} on process 0 and {value} on process {rank}, but "
                "has to be the same on all."
            )


def check_head(
    num_classes: int,
    embedding_dim: int,
    sample_rate: float,
    margin: Margin,
    update: str,
    sampler: str,
    seed: int,
    scratch_bytes: int,
    dtype: torch.dtype,
    group: Group | None,
) -> None:
    """Raise InputError for arguments that no head accepts."""
    whole = {"num_classes": num_classes, "embedding_dim": embedding_dim, "seed": seed, "scratch_bytes": scratch_bytes}
    for name, value in whole.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise InputError(f"{name} is {value!r}; it is a whole number.")
    if num_classes < 1 or embedding_dim < 1:
        raise InputError(f"PartialFC needs at least 1 class and 1 dimension, not {num_classes} and {embedding_dim}.")
    if not (isinstance(sample_rate, Real) and 0 <= sample_rate <= 1):
        raise InputError(f"sample_rate is {sample_rate!r}; it is a part of the classes, from 0 (positives only) to 1.")
    if not isinstance(margin, Margin):
        raise InputError(f"margin is {margin!r}; it is a Margin, such as CosFace(0.4) or ArcFace(0.5).")
    if update not in ("sparse", "deferred"):
        raise InputError(f"update is {update!r}; it is 'sparse' or 'deferred'.")
    if sampler not in get_args(Sampler):
        raise InputError(f"sampler is {sampler!r}; it is one of {', '.join(get_args(Sampler))}.")
    if dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise InputError(f"dtype is {dtype}; centers are torch.float32, torch.bfloat16 or torch.float64.")
    if group is not None and (not isinstance(group, Group) or rank_of(group) < 0):
        raise InputError(
            f"this process is no member of the head's group ({group!r}): give a torch.distributed.ProcessGroup, and "
            "build the head on its members only."
        )


def plain(value: Any) -> Any:
    """A number of NumPy as one of Python; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def plain_margin(margin: Margin) -> Margin:
    """The margin without numbers of NumPy."""
    options = {field.name: getattr(margin, field.name) for field in fields(margin)}
    changed = {name: plain(value) for name, value in options.items() if isinstance(value, np.generic)}
    return replace(margin, **changed) if changed else margin


def check_shard(shard: Shard) -> None:
    """Raise InputError if the head's classes are not those of this process among the processes there are now."""
    expected = split_evenly(shard.total, shard.world_size, shard.rank)
    if (shard.start, shard.stop) != expected:
        raise InputError(
            f"the head holds the classes {shard.start}:{shard.stop} of {shard.total}, but process {shard.rank} of "
            f"{shard.world_size} owns {expected[0]}:{expected[1]}: build it after init_process_group, on each process, "
            "and load its weights there."
        )


def check_agreement(settings: dict[str, Any], device: torch.device, group: Group | None) -> None:
    """Raise InputError, on all ranks, if their heads differ in a setting. Two collectives, none for one process."""
    gathered = gather_json({name: str(value) for name, value in settings.items()}, device, group)
    for name in settings:
        _check_equal(name, [one.get(name) for one in gathered])


def check_not_wrapped(centers: Tensor, rows: int, width: int, is_replica: bool) -> None:
    """Raise InputError inside a parallel wrapper, whose centers are not the (rows, width) that the head made."""
    inside_ddp = getattr(DistributedDataParallel, "_active_ddp_module", None) is not None
    resharded = type(centers.data) is not Tensor or centers.shape != (rows, width)
    if inside_ddp or resharded or is_replica:
        raise InputError(
            "PartialFC stands inside a parallel wrapper, which would overwrite its shards with rank 0's: "
            "wrap the backbone alone and call the head beside it."
        )


def _batch_problem(embeddings: Tensor, labels: Tensor, step_labels: Tensor | None, centers: Tensor) -> str | None:
    """What does not fit in shapes, dtypes and devices, None if all does; nothing is read from a device."""
    for name, value in (("embeddings", embeddings), ("labels", labels), ("step_labels", step_labels)):
        if not isinstance(value, Tensor) and not (value is None and name == "step_labels"):
            return f"{name} are a {type(value).__name__}; the head expects a torch.Tensor."
    if embeddings.ndim != 2 or embeddings.shape[1] != centers.shape[1] or embeddings.dtype not in _FLOATS:
        return (
            f"embeddings are {tuple(embeddings.shape)} of {embeddings.dtype}; the head expects floating point of 16 to "
            f"64 bits and (B, {centers.shape[1]})."
        )
    if labels.shape != embeddings.shape[:1] or labels.dtype != torch.int64:
        return (
            f"labels are {tuple(labels.shape)} of {labels.dtype}; the head expects int64 of ({len(embeddings)},), as "
            "labels.long() gives."
        )
    if step_labels is not None and (step_labels.ndim != 1 or step_labels.dtype != torch.int64):
        return f"step_labels are {tuple(step_labels.shape)} of {step_labels.dtype}; the head expects int64 of (n,)."
    if not embeddings.device == labels.device == centers.device:
        return (
            f"embeddings are on {embeddings.device}, labels on {labels.device} and centers on "
            f"{centers.device}; move all to one device."
        )
    return None


def _check_counts(counts: list[int], samples: int, shard: Shard) -> None:
    """Raise InputError for sample counts of the ranks that do not match this rank's batch."""
    if len(counts) != shard.world_size or counts[shard.rank] != samples:
        raise InputError(
            f"counts are {counts}; the head expects the number of images of each of {shard.world_size} processes, "
            f"{samples} for process {shard.rank}."
        )


def check_values(embeddings: Tensor, labels: Tensor, num_classes: int, step: int) -> None:
    """Check the global batch, (G, D) and (G,), at once: host reads.

    Raises:
        InputError: a label lies outside [0, num_classes).
        NonFiniteEmbeddings: NaN or infinity among the embeddings of any rank.
    """
    outside = ((labels < 0) | (labels >= num_classes)).nonzero()[:, 0]
    if len(outside):
        raise _bad_label(int(labels[outside[0]]), num_classes)
    if not bool(torch.isfinite(embeddings).all()):
        raise _bad_embeddings(step)


def check_sums(sums: Tensor, step: int) -> None:
    """Raise InputError, on all ranks alike, if some center has no direction: a host read of (G,) or ().

    Args:
        sums: sums over cosines with centers, the same on all ranks.
    """
    if not bool(sums.isfinite().all()):
        raise _bad_centers(step)


def _bad_centers(step: int) -> InputError:
    return InputError(
        f"a center that step {step} uses is zero, NaN, infinite or longer than 1.8e19, or the scale of a margin that "
        "raises negatives is too large: load an earlier state, initialise the centers with numbers other than "
        "zeros, or lower the scale."
    )


def _bad_label(label: int, num_classes: int) -> InputError:
    reason = "labels count from 0" if label < 0 else "the data has more classes than the head"
    return InputError(f"label {label} lies outside [0, {num_classes}): {reason}.")


def _bad_embeddings(step: int) -> NonFiniteEmbeddings:
    return NonFiniteEmbeddings(
        f"embeddings of step {step} contain NaN or infinity: lower the learning rate or check the input."
    )


_LABEL, _EMBEDDINGS, _CENTERS = 1, 2, 3


class InputFlag:
    """`check_values` without a host read: the device records the first bad batch until the host has raised it.

    The global batch is the same on all ranks, and so is the flag.

    Attributes:
        state: (3,) int64 on the device: not 0 if a batch was bad, the bad label, the step.
    """

    def __init__(self, num_classes: int, device: torch.device, center_state: CenterState) -> None:
        self._num_classes, self._center_state = num_classes, center_state
        self.state = torch.zeros(3, dtype=torch.int64, device=device)
        center_state.flag = self.state[:1]
        self._on_cuda = device.type == "cuda"
        self._pending_copies: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()  # of the state, oldest first

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the head has no pending copies, since an event cannot be copied."""
        return self.__dict__ | {"_pending_copies": deque()}

    def record(self, embeddings: Tensor, labels: Tensor, step: Tensor) -> Tensor:
        """Set the flag if the global batch, (G, D) and (G,), is bad; () bool, whether it is set."""
        outside = (labels < 0) | (labels >= self._num_classes)
        finite = torch.isfinite(embeddings).all()
        kind = torch.where(outside.any(), _LABEL, torch.where(finite, 0, _EMBEDDINGS))
        first = outside.int().argmax(dim=0, keepdim=True)  # with a () index the host would read it
        return self._set(kind, labels[first][0], step)

    def record_sums(self, sums: Tensor, step: Tensor) -> Tensor:
        """Set the flag if `check_sums` would raise, and copy it to the host; () bool, whether it is set."""
        is_set = self._set(torch.where(sums.isfinite().all(), 0, _CENTERS), torch.zeros_like(step), step)
        self._copy_to_host()
        return is_set

    def _set(self, kind: Tensor, label: Tensor, step: Tensor) -> Tensor:
        self.state.copy_(torch.where(self.state[:1] == 0, torch.stack([kind, label, step]), self.state))
        return self.state[0] != 0

    def _copy_to_host(self) -> None:
        """Start an asynchronous copy of the state."""
        if self._on_cuda and torch.cuda.is_current_stream_capturing():
            return  # `check` reads what a replayed graph records
        # Page-locked, so that the copy is asynchronous.
        copy = torch.empty(3, dtype=torch.int64, device="cpu", pin_memory=self._on_cuda)
        copy.copy_(self.state, non_blocking=True)
        event = None
        if self._on_cuda:
            event = torch.cuda.Event()
            event.record()
        self._pending_copies.append((copy, event))

    def poll(self, wait: bool) -> None:
        """Raise for an earlier bad batch, as `check` does, from the copies that followed each batch.

        A single process polls only the copies that have arrived, however far ahead of its device it is. Several wait
        for all copies, since they must raise in the same step: the last copy was started a whole step ago, and their
        devices still have that step's backward pass to run.
        """
        if self._on_cuda and torch.cuda.is_current_stream_capturing():
            return
        arrived: Tensor | None = None
        while self._pending_copies:
            copy, event = self._pending_copies[0]
            if event is not None:
                if not wait and not event.query():
                    break
                event.synchronize()
            arrived = copy
            self._pending_copies.popleft()
        if arrived is not None:
            self._raise(arrived)

    def check(self) -> None:
        """Raise for any bad batch since the last error, and clear the flag. A host read.

        Raises:
            InputError: a label was out of range.
            NonFiniteEmbeddings: NaN or infinity among the embeddings.
        """
        self._pending_copies.clear()
        self._raise(self.state)

    def _raise(self, state: Tensor) -> None:
        """Raise what `state` records; gradients that wait for the optimizer are then invalid."""
        kind, label, step = state.tolist()
        if kind:
            self._pending_copies.clear()
            self.state.zero_()
            self._center_state.deferred.clear()
            raise {
                _LABEL: _bad_label(label, self._num_classes),
                _EMBEDDINGS: _bad_embeddings(step),
                _CENTERS: _bad_centers(step),
            }[kind]
