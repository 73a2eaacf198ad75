"""The classes of a step: all positives and evenly drawn negatives (arXiv 2203.15565, section 3.2); initial centers.

The sample is a pure function of (seed, step, positives of the global batch). The classes are divided into fixed virtual
blocks, each with a keyed permutation; a rank draws for the blocks that its shard overlaps and keeps its own classes. So
the union over the ranks is the same at any world size, and the work is proportional to the sample, not to the number of
classes.

How many negatives a block contributes follows from systematic sampling over the T classes that are not positives: of N
negatives in all, a block that holds the non-positives [a, b) contributes ⌊(b N + U) / T⌋ − ⌊(a N + U) / T⌋, with one U
per step, uniform in [0, T). These numbers sum to exactly N, and each is N (b − a) / T in the mean: every class is
equally likely to be a negative, at any rate and number of classes, and wherever the positives are. Which ones of a
block these are is the sampler's choice: the first in the order in which it offers the classes of the block (`_Order`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from partialfc.core import keyed_random

BLOCK_BITS = 12
BLOCK = 1 << BLOCK_BITS
RUN_BITS = 5
_ROUNDS = 4
_NO_CLASS = 1 << 62  # beyond every shard and block
_DEVIATION = 0.01  # of initial centers
_ELEMENTS_AT_ONCE = 1 << 20

Sampler = Literal["uniform", "sweep", "runs"]
"""How the negatives of a step are drawn: always as many, and every class equally often.

- uniform: a new order of each block in every step (the paper).
- sweep: the steps of a sweep, C / sample size of them rounded down, share an order and take up where the step before
  ends: at rates of 1 / n each class is drawn once in a sweep, but for what positives shift.
- runs: 32 neighbouring classes together, in a new order of the runs in every step: storage reads them at once. At
  rates below 1 % a block contributes less than a run.
"""


def sample_size(num_classes: int, sample_rate: float) -> int:
    """Classes of a step that has no more positives than that: sample_rate × C, rounded to nearest."""
    return int(sample_rate * num_classes + 0.5)


def sample_bound(num_classes: int, sample_rate: float, global_batch_size: int) -> int:
    """The most classes of a step: the sample, or a positive for each image where those are more."""
    return min(num_classes, max(sample_size(num_classes, sample_rate), global_batch_size))


@dataclass(frozen=True)
class _Order:
    """The order in which each block offers its classes in one step: a keyed permutation, rotated by an offset.

    Attributes:
        num_classes: C.
        keys: (_ROUNDS + 1,) int64, one for each round of a full block's permutation, and one for the last block's.
        run_bits: that many low bits of a position are not permuted, so that neighbours stay together.
        rotation: (blocks) -> their offsets, as parts of their lengths in [0, 1): float64; None for none.
    """

    num_classes: int
    keys: Tensor
    run_bits: int = 0
    rotation: Callable[[Tensor], Tensor] | None = None

    def draw(self, blocks: Tensor, positions: Tensor) -> Tensor:
        """The classes at `positions` of `blocks`, int64 that broadcast together."""
        positions = self._rotate(blocks, positions, 1)
        runs, place = positions >> self.run_bits, positions & ((1 << self.run_bits) - 1)
        runs = keyed_random.permute_bits(runs, BLOCK_BITS - self.run_bits, self._round_keys(blocks))
        drawn = (runs << self.run_bits) + place + blocks * BLOCK
        last = self.num_classes // BLOCK
        if self.num_classes % BLOCK:
            order = self._order_of_last()
            drawn = torch.where(blocks == last, last * BLOCK + order[positions.clamp(0, len(order) - 1)], drawn)
        return drawn

    def position(self, classes: Tensor) -> Tensor:
        """The inverse of `draw`: the position of each of `classes` (n,) in its block."""
        blocks, within, last = classes // BLOCK, classes % BLOCK, self.num_classes // BLOCK
        runs, place = within >> self.run_bits, within & ((1 << self.run_bits) - 1)
        runs = keyed_random.permute_bits_back(runs, BLOCK_BITS - self.run_bits, self._round_keys(blocks))
        position = (runs << self.run_bits) + place
        if self.num_classes % BLOCK:
            order = self._order_of_last().argsort()
            position = torch.where(blocks == last, order[within.clamp(0, len(order) - 1)], position)
        return self._rotate(blocks, position, -1)

    def _rotate(self, blocks: Tensor, positions: Tensor, sign: int) -> Tensor:
        if self.rotation is None:
            return positions
        lengths = (self.num_classes - blocks * BLOCK).clamp(1, BLOCK)
        return (positions + sign * (self.rotation(blocks) * lengths).long()) % lengths

    def _round_keys(self, blocks: Tensor) -> list[Tensor]:
        return list(keyed_random.bits(self.keys[:_ROUNDS].view(_ROUNDS, *[1] * blocks.ndim), blocks))

    def _order_of_last(self) -> Tensor:
        """The order of the last block, whose size is not a power of two: that of keyed bits, alike within a run."""
        places = torch.arange(self.num_classes % BLOCK, device=self.keys.device)
        return keyed_random.bits(self.keys[_ROUNDS], places >> self.run_bits).argsort(stable=True)


def order_of_step(sampler: Sampler, num_classes: int, size: int, seed: int, step: Tensor) -> tuple[_Order, Tensor]:
    """The order of a step, and the key of its systematic sampling; `step` is () int64 on any device. No host read."""
    *numbers, quota, last, offset = [keyed_random.derive_key(seed, "negatives", n) for n in range(_ROUNDS + 3)]
    key, offset_key = keyed_random.keys_at([quota, offset], step)
    if sampler == "sweep":
        steps = num_classes // size  # of a sweep
        keys = keyed_random.keys_at([*numbers, last], step // steps)
        return _Order(num_classes, keys, rotation=lambda blocks: (step % steps).double() / steps), key
    keys = keyed_random.keys_at([*numbers, last], step)
    if sampler == "runs":
        return _Order(num_classes, keys, RUN_BITS, lambda blocks: keyed_random.uniform(offset_key, blocks)), key
    return _Order(num_classes, keys), key


def sample_classes(positives: Tensor, *, step: int, **options: Any) -> Tensor:
    """`sample_padded` without the padding: (S,) int64, sorted and distinct. A host read.

    Args:
        step: a whole number.
        options: the others of `sample_padded`.
    """
    on_device = torch.full((), step, dtype=torch.int64, device=positives.device)
    padded, count = sample_padded(positives, step=on_device, **options)
    return padded[: int(count)]


def sample_padded(
    positives: Tensor,
    *,
    num_classes: int,
    sample_rate: float,
    seed: int,
    step: Tensor,
    start: int,
    stop: int,
    sampler: Sampler = "uniform",
) -> tuple[Tensor, Tensor]:
    """The classes in [start, stop) of a step. No host read, and no shape that depends on the values of the labels.

    Over all shards they are `sample_size` classes, or all positives where those are more.

    Args:
        positives: (P,) int64, the labels of the global batch in any order, with repetitions; labels outside [0, C)
            are ignored.
        num_classes: C, over all ranks.
        sample_rate: in [0, 1]; 0 uses the positives only, 1 all classes.
        seed, step: the negatives are a function of both; step is () int64, which a replayed CUDA graph reads anew.
        start, stop: the classes of this rank's shard.
        sampler: how negatives are drawn.

    Returns:
        (N,) int64, sorted and distinct class numbers, padded with `stop`; and () int64, their number, on the device.
    """
    device = positives.device
    if sample_rate >= 1:
        return torch.arange(start, stop, device=device), torch.full((), stop - start, device=device)
    valid = (positives >= 0) & (positives < num_classes)
    positives = torch.where(valid, positives, _NO_CLASS).sort().values
    is_first = positives < num_classes
    is_first[1:] &= positives[1:] != positives[:-1]
    sampled = [torch.where(is_first & (positives >= start) & (positives < stop), positives, stop)]
    size, most = sample_size(num_classes, sample_rate), 0
    if size > 0 and stop > start:
        blocks = range(start // BLOCK, (stop - 1) // BLOCK + 1)
        span = min(blocks.stop * BLOCK, num_classes) - blocks.start * BLOCK
        most = min(size, span * size // num_classes + 1)  # since N / T <= size / C
        order, key = order_of_step(sampler, num_classes, size, seed, step)
        drawn = _negatives(positives, is_first, blocks, size, order, key)
        sampled.append(torch.where((drawn >= start) & (drawn < stop), drawn, stop))
    classes = torch.cat(sampled)
    count = (classes < stop).sum()
    return classes.sort().values[: min(stop - start, most + len(positives))], count


class SamplingGraph:
    """`sample_padded` on a GPU as a CUDA graph: hundreds of small kernels take the host milliseconds to launch.

    A graph is recorded when two steps in succession have labels of one size. It is not copied with the head.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._graph: torch.cuda.CUDAGraph | None = None

    def __reduce__(self) -> tuple[type[SamplingGraph], tuple[()]]:
        return SamplingGraph, ()

    def __call__(self, positives: Tensor, *, step: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """As `sample_padded`."""
        if options["sample_rate"] >= 1 or torch.cuda.is_current_stream_capturing():
            return sample_padded(positives, step=step, **options)
        key = positives.shape, positives.device, *options.items()
        if key != self._key:
            self._key, self._graph = key, None
            return sample_padded(positives, step=step, **options)
        if self._graph is None:
            self._positives, self._step = positives.clone(), step.clone()
            graph = torch.cuda.CUDAGraph()
            # By default the stream would be that of the first capture of the process, perhaps on another device. Other
            # threads, such as the loader's, may allocate meanwhile.
            stream = torch.cuda.Stream(positives.device)
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._sampled = sample_padded(self._positives, step=self._step, **options)
            self._graph = graph
        self._positives.copy_(positives)
        self._step.copy_(step)
        self._graph.replay()
        classes, count = self._sampled
        return classes.clone(), count.clone()


def _negatives(positives: Tensor, is_first: Tensor, blocks: range, size: int, order: _Order, key: Tensor) -> Tensor:
    """(n,) int64: the negatives of the blocks, and −1 in between: of each, the first of its order.

    Where a positive is among them, a spare class from further behind in the order takes its place.

    Args:
        positives: (P,), sorted; `is_first` (P,) bool marks the first of each class.
        size: classes of the whole sample, positives included.
    """
    num_classes, device = order.num_classes, positives.device
    numbers = torch.arange(blocks.start, blocks.stop, device=device)
    edges = (torch.arange(blocks.start, blocks.stop + 1, device=device) * BLOCK).clamp_max(num_classes)
    begins = torch.searchsorted(positives, edges)  # of each block's labels
    distinct = torch.nn.functional.pad(is_first.cumsum(0), (1, 0))
    others, negatives = num_classes - distinct[-1], (size - distinct[-1]).clamp_min(0)
    shares = (edges - distinct[begins]) * negatives + _offset(key, others)
    counts = shares.div(others.clamp_min(1), rounding_mode="floor").diff()

    width = min(BLOCK, BLOCK * size // num_classes + 1)  # the most of a block
    drawn = order.draw(numbers[:, None], torch.arange(width + 1, device=device))
    inside = is_first & (positives >= edges[0]) & (positives < edges[-1])
    block = torch.where(inside, positives // BLOCK - blocks.start, 0)
    position = torch.where(inside, order.position(positives), width).clamp_max(width)
    drawn.view(-1).index_fill_(0, block * (width + 1) + position, -1)  # assigning would wait for the device
    drawn = torch.where(torch.arange(width + 1, device=device) < counts[:, None], drawn, -1)

    missing = torch.zeros_like(counts).index_add_(0, block, (inside & (position < counts[block])).long())
    place = distinct[:-1] - distinct[begins[block]]  # of a positive among those of its block
    spare = order.draw(block + blocks.start, counts[block] + place)
    usable = inside & ~_is_member(spare, positives)
    ordinal = torch.nn.functional.pad(usable.cumsum(0), (1, 0))
    usable &= ordinal[1:] - ordinal[begins[block]] <= missing[block]
    return torch.cat([drawn.flatten(), torch.where(usable, spare, -1)])


def _offset(key: Tensor, stop: Tensor) -> Tensor:
    """() int64, uniform in [0, stop); 0 for an empty range."""
    return (keyed_random.uniform(key, torch.zeros_like(stop)) * stop).long().clamp_max(stop - 1).clamp_min(0)


def _is_member(values: Tensor, sorted_set: Tensor) -> Tensor:
    """Whether each of `values` is in the sorted, distinct `sorted_set`."""
    if len(sorted_set) == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    positions = torch.searchsorted(sorted_set, values).clamp_max_(len(sorted_set) - 1)
    return sorted_set[positions] == values


def initial_centers(
    rows: range, width: int, seed: int, device: torch.device | str | None, dtype: torch.dtype
) -> Tensor:
    """(len(rows), width) normal with deviation 0.01: rows `rows` of the whole head, the same at any world size."""
    centers = torch.empty(len(rows), width, dtype=dtype, device=device)
    key = keyed_random.derive_key(seed, "centers")
    step = max(1, _ELEMENTS_AT_ONCE // width)
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        values = keyed_random.normal_rows(key, start, stop, width, device=centers.device)
        centers[start - rows.start : stop - rows.start] = values * _DEVIATION
    return centers
