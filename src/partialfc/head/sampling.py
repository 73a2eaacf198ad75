"""The classes of a step: all positives and uniformly drawn negatives (arXiv 2203.15565, section 3.2); initial centers.

The sample is a pure function of (seed, step, positives of the global batch). The classes are divided into fixed virtual
blocks, each with a keyed permutation and a quota of the sample; a rank draws for the blocks that its shard overlaps and
keeps its own classes. So the union over the ranks is the same at any world size, and the work is proportional to the
sample, not to the number of classes.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
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
    """Classes of a step if no block has more positives than its quota: sample_rate × C, rounded to nearest."""
    return int(sample_rate * num_classes + 0.5)


def sample_bound(num_classes: int, sample_rate: float, global_batch_size: int) -> int:
    """The most classes of a step: the sample, and for each image a positive beyond the quota of its block."""
    return min(num_classes, sample_size(num_classes, sample_rate) + global_batch_size)


def sampling_keys(seed: int, step: Tensor) -> Tensor:
    """The keys for the negatives of a step, () int64 on any device: int64, one per round and one more."""
    return keyed_random.keys_at(
        [keyed_random.derive_key(seed, "negatives", number) for number in range(_ROUNDS + 1)], step
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

    A block contributes max(quota, its positives) classes, and the quotas sum to `sample_size`.

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
    inside = (positives >= 0) & (positives < num_classes)
    positives = torch.where(inside, positives, _NO_CLASS).sort().values
    first = torch.ones_like(inside)
    first[1:] = positives[1:] != positives[:-1]
    sampled = [torch.where(first & (positives >= start) & (positives < stop), positives, stop)]
    width, bound = _sizes(num_classes, sample_rate, start, stop)
    if width > 0:
        blocks = torch.arange(start // BLOCK, (stop - 1) // BLOCK + 1, device=device)
        drawn = _draw(blocks, width, num_classes, keys, ends=(stop - 1) // BLOCK == num_classes // BLOCK)
        negatives = _negatives(positives, first, drawn, _quotas(blocks, num_classes, sample_rate), blocks)
        sampled.append(torch.where((negatives >= start) & (negatives < stop), negatives, stop).flatten())
    classes = torch.cat(sampled)
    count = (classes < stop).sum()
    return classes.sort().values[: min(stop - start, bound + len(positives))], count


@lru_cache(maxsize=64)
def _sizes(num_classes: int, sample_rate: float, start: int, stop: int) -> tuple[int, int]:
    """The largest quota of the blocks that a shard overlaps, and the most classes that it samples beside the labels."""
    if stop <= start or sample_rate <= 0:
        return 0, 0
    blocks = np.arange(start // BLOCK, (stop - 1) // BLOCK + 1)
    quotas = np.diff(
        np.floor(np.minimum([blocks * BLOCK, (blocks + 1) * BLOCK], num_classes) * sample_rate + 0.5), axis=0
    )
    quotas = quotas[0].astype(np.int64)  # equal to `_quotas`
    overlaps = np.minimum((blocks + 1) * BLOCK, stop) - np.maximum(blocks * BLOCK, start)
    return int(quotas.max()), int(np.minimum(quotas, overlaps).sum())


def _negatives(positives: Tensor, first: Tensor, drawn: Tensor, quotas: Tensor, blocks: Tensor) -> Tensor:
    """(n, width) int64: the negatives of n blocks among their `drawn` classes, −1 elsewhere.

    Args:
        positives: (P,), sorted.
        first: (P,) bool, whether a positive is the first of its class.
        quotas, blocks: (n,), the quota and the number of each block.
    """
    is_negative = ~_is_member(drawn, positives)
    is_negative &= torch.arange(drawn.shape[1], device=drawn.device) < quotas[:, None]
    distinct_before = torch.nn.functional.pad(first.cumsum(0), (1, 0))
    ends = torch.searchsorted(positives, torch.stack([blocks, blocks + 1]) * BLOCK)
    positives_per_block = distinct_before[ends].diff(dim=0)[0]
    wanted = (quotas - positives_per_block).clamp_min(0)
    # A prefix as long as the quota holds at least `wanted` negatives, since at most all positives are in it.
    is_negative &= is_negative.cumsum(dim=1) <= wanted[:, None]
    return torch.where(is_negative, drawn, -1)


def _quotas(blocks: Tensor, num_classes: int, sample_rate: float) -> Tensor:
    """(n,) int64: the part of the sample of each block; the sum over all blocks telescopes to `sample_size`."""
    ends = torch.stack([blocks, blocks + 1]) * BLOCK
    return (ends.clamp_max(num_classes).double() * sample_rate + 0.5).floor().long().diff(dim=0)[0]


def _draw(blocks: Tensor, width: int, num_classes: int, keys: Tensor, *, ends: bool) -> Tensor:
    """(n, width) int64: the first classes of each block's permutation; `ends` if the last block is not full."""
    rounds = [keyed_random.bits(keys[number], blocks)[:, None] for number in range(_ROUNDS)]
    positions = torch.arange(width, device=blocks.device).expand(len(blocks), width)
    drawn = keyed_random.permute_bits(positions, BLOCK_BITS, rounds) + blocks[:, None] * BLOCK
    if ends:
        # The size of the last block is not a power of two: its permutation is the order of keyed bits.
        classes = torch.arange(num_classes // BLOCK * BLOCK, num_classes, device=blocks.device)
        order = classes[keyed_random.bits(keys[_ROUNDS], classes).argsort()][:width]
        drawn[-1] = -1
        drawn[-1, : len(order)] = order
    return drawn


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
