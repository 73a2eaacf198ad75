"""The classes of a step: all positives and uniformly drawn negatives (arXiv 2203.15565, section 3.2); initial centers.

The sample is a pure function of (seed, step, positives of the global batch). The classes are divided into fixed virtual
blocks, each with a keyed permutation; a rank draws for the blocks that its shard overlaps and keeps its own classes. So
the union over the ranks is the same at any world size, and the work is proportional to the sample, not to the number of
classes.

How many negatives a block contributes follows from systematic sampling over the T classes that are not positives: of N
negatives in all, a block that holds the non-positives [a, b) contributes ⌊(b N + U) / T⌋ − ⌊(a N + U) / T⌋, with one U
per step, uniform in [0, T). These numbers sum to exactly N, and each is N (b − a) / T in the mean: every class is
equally likely to be a negative, at any rate and number of classes, and wherever the positives are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from partialfc.core import keyed_random

BLOCK_BITS = 12
BLOCK = 1 << BLOCK_BITS
_ROUNDS = 4
_NO_CLASS = 1 << 62  # beyond every shard and block
_DEVIATION = 0.01  # of initial centers
_ELEMENTS_AT_ONCE = 1 << 20


def sample_size(num_classes: int, sample_rate: float) -> int:
    """Classes of a step that has no more positives than that: sample_rate × C, rounded to nearest."""
    return int(sample_rate * num_classes + 0.5)


def sample_bound(num_classes: int, sample_rate: float, global_batch_size: int) -> int:
    """The most classes of a step: the sample, or a positive for each image where those are more."""
    return min(num_classes, max(sample_size(num_classes, sample_rate), global_batch_size))


def sampling_keys(seed: int, step: Tensor) -> Tensor:
    """The keys for the negatives of a step, () int64 on any device: int64, one per round and two more."""
    return keyed_random.keys_at(
        [keyed_random.derive_key(seed, "negatives", number) for number in range(_ROUNDS + 2)], step
    )


def sample_classes(
    positives: Tensor, *, num_classes: int, sample_rate: float, seed: int, step: int, start: int, stop: int
) -> Tensor:
    """`sample_padded` without the padding: (S,) int64, sorted and distinct. A host read.

    Args:
        seed, step: the negatives are a function of both.
    """
    keys = sampling_keys(seed, torch.full((), step, dtype=torch.int64, device=positives.device))
    padded, count = sample_padded(
        positives, num_classes=num_classes, sample_rate=sample_rate, keys=keys, start=start, stop=stop
    )
    return padded[: int(count)]


def sample_padded(
    positives: Tensor, *, num_classes: int, sample_rate: float, keys: Tensor, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """The classes in [start, stop) of a step. No host read, and no shape that depends on the values of the labels.

    Over all shards they are `sample_size` classes, or all positives where those are more.

    Args:
        positives: (P,) int64, the labels of the global batch in any order, with repetitions; labels outside [0, C)
            are ignored.
        num_classes: C, over all ranks.
        sample_rate: in [0, 1]; 0 uses the positives only, 1 all classes.
        keys: `sampling_keys`; a replayed CUDA graph reads them anew.
        start, stop: the classes of this rank's shard.

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
        drawn = _negatives(positives, is_first, blocks, size, num_classes, keys)
        sampled.append(torch.where((drawn >= start) & (drawn < stop), drawn, stop))
    classes = torch.cat(sampled)
    count = (classes < stop).sum()
    return classes.sort().values[: min(stop - start, most + len(positives))], count


def _negatives(positives: Tensor, is_first: Tensor, blocks: range, size: int, num_classes: int, keys: Tensor) -> Tensor:
    """(n,) int64: the negatives of the blocks, and −1 in between: of each, the first of its permutation.

    Where a positive is among them, a spare class from further behind in the permutation takes its place.

    Args:
        positives: (P,), sorted; `is_first` (P,) bool marks the first of each class.
        size: classes of the whole sample, positives included.
    """
    numbers = torch.arange(blocks.start, blocks.stop, device=keys.device)
    edges = (torch.arange(blocks.start, blocks.stop + 1, device=keys.device) * BLOCK).clamp_max(num_classes)
    begins = torch.searchsorted(positives, edges)  # of each block's labels
    distinct = torch.nn.functional.pad(is_first.cumsum(0), (1, 0))
    others, negatives = num_classes - distinct[-1], (size - distinct[-1]).clamp_min(0)
    shares = (edges - distinct[begins]) * negatives + _offset(keys[_ROUNDS], others)
    counts = shares.div(others.clamp_min(1), rounding_mode="floor").diff()

    width = min(BLOCK, BLOCK * size // num_classes + 1)  # the most of a block
    drawn = _draw(numbers[:, None], torch.arange(width + 1, device=keys.device), num_classes, keys)
    inside = is_first & (positives >= edges[0]) & (positives < edges[-1])
    block = torch.where(inside, positives // BLOCK - blocks.start, 0)
    position = torch.where(inside, _position(positives, num_classes, keys), width).clamp_max(width)
    drawn[block, position] = -1
    drawn = torch.where(torch.arange(width + 1, device=keys.device) < counts[:, None], drawn, -1)

    missing = torch.zeros_like(counts).index_add_(0, block, (inside & (position < counts[block])).long())
    order = distinct[:-1] - distinct[begins[block]]  # of a positive among those of its block
    spare = _draw(block + blocks.start, counts[block] + order, num_classes, keys)
    usable = inside & ~_is_member(spare, positives)
    order = torch.nn.functional.pad(usable.cumsum(0), (1, 0))
    usable &= order[1:] - order[begins[block]] <= missing[block]
    return torch.cat([drawn.flatten(), torch.where(usable, spare, -1)])


def _offset(key: Tensor, stop: Tensor) -> Tensor:
    """() int64, uniform in [0, stop); 0 for an empty range."""
    return (keyed_random.uniform(key, torch.zeros_like(stop)) * stop).long().clamp_max(stop - 1).clamp_min(0)


def _draw(blocks: Tensor, positions: Tensor, num_classes: int, keys: Tensor) -> Tensor:
    """The classes at `positions` of the permutations of `blocks`, int64 that broadcast together."""
    drawn = keyed_random.permute_bits(positions, BLOCK_BITS, _round_keys(blocks, keys)) + blocks * BLOCK
    last = num_classes // BLOCK
    if num_classes % BLOCK:
        order = _order_of_last(num_classes, keys)
        drawn = torch.where(blocks == last, last * BLOCK + order[positions.clamp(0, len(order) - 1)], drawn)
    return drawn


def _position(classes: Tensor, num_classes: int, keys: Tensor) -> Tensor:
    """The inverse of `_draw`: the position of each of `classes` (n,) in the permutation of its block."""
    blocks, last = classes // BLOCK, num_classes // BLOCK
    position = keyed_random.permute_bits_back(classes % BLOCK, BLOCK_BITS, _round_keys(blocks, keys))
    if num_classes % BLOCK:
        order = _order_of_last(num_classes, keys).argsort()
        position = torch.where(blocks == last, order[(classes - last * BLOCK).clamp(0, len(order) - 1)], position)
    return position


def _round_keys(blocks: Tensor, keys: Tensor) -> list[Tensor]:
    return list(keyed_random.bits(keys[:_ROUNDS].view(_ROUNDS, *[1] * blocks.ndim), blocks))


def _order_of_last(num_classes: int, keys: Tensor) -> Tensor:
    """The permutation of the last block, whose size is not a power of two: the order of keyed bits."""
    return keyed_random.bits(keys[_ROUNDS + 1], torch.arange(num_classes % BLOCK, device=keys.device)).argsort()


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
