"""Which classes a step uses: all positives, filled up with uniformly drawn negatives (arXiv 2203.15565, section 3.2).

The sample is a pure function of (seed, step, positives of the global batch). The classes stand in fixed virtual blocks,
each with a keyed permutation of its own and a quota of the sample; a rank draws for the blocks that its shard overlaps
and keeps its own classes. So the union over the ranks is the same at any world size, and the work is proportional to
the sample, not to the classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from partialfc import keyed_random

BLOCK_BITS = 12
BLOCK = 1 << BLOCK_BITS
_ROUNDS = 4


def sample_size(num_classes: int, sample_rate: float) -> int:
    """Classes a step uses when no block's positives exceed its quota: sample_rate × C, rounded to nearest."""
    return int(sample_rate * num_classes + 0.5)


def sample_bound(num_classes: int, sample_rate: float, global_batch_size: int) -> int:
    """The most classes a step can use: the sample, and a positive that found its block's quota full for each image."""
    return min(num_classes, sample_size(num_classes, sample_rate) + global_batch_size)


def sample_classes(
    positives: Tensor, *, num_classes: int, sample_rate: float, seed: int, step: int, start: int, stop: int
) -> Tensor:
    """The classes in [start, stop) that a step uses.

    A block gives max(quota, its positives) classes, and the quotas sum to `sample_size`.

    Args:
        positives: (P,) int64, the distinct labels of the global batch, sorted.
        num_classes: C, over all ranks.
        sample_rate: in [0, 1]; 0 uses the positives only.
        seed, step: what the negatives are drawn from.
        start, stop: the rows of this rank's shard.

    Returns:
        (S,) int64, sorted and distinct class numbers.
    """
    device = positives.device
    if sample_rate >= 1:
        return torch.arange(start, stop, device=device)
    own = positives[(positives >= start) & (positives < stop)]
    if stop <= start:
        return own
    blocks = torch.arange(start // BLOCK, (stop - 1) // BLOCK + 1, device=device)
    quotas = _quotas(blocks, num_classes, sample_rate)
    width = int(quotas.max()) if sample_rate > 0 else 0
    if width == 0:
        return own
    drawn = _draw(blocks, width, num_classes, seed, step)
    is_negative = ~_is_member(drawn, positives)
    is_negative &= torch.arange(width, device=device) < quotas[:, None]
    positives_per_block = torch.searchsorted(positives, torch.stack([blocks, blocks + 1]) * BLOCK).diff(dim=0)[0]
    wanted = (quotas - positives_per_block).clamp_min(0)
    # A prefix as long as the quota holds at least `wanted` negatives, since at most all positives stand in it.
    is_negative &= is_negative.cumsum(dim=1) <= wanted[:, None]
    negatives = drawn[is_negative]
    negatives = negatives[(negatives >= start) & (negatives < stop)]
    return torch.cat([own, negatives]).sort().values


def _quotas(blocks: Tensor, num_classes: int, sample_rate: float) -> Tensor:
    """(n,) int64: each block's part of the sample; over all blocks they telescope to exactly `sample_size`."""
    ends = torch.stack([blocks, blocks + 1]) * BLOCK
    return (ends.clamp_max(num_classes).double() * sample_rate + 0.5).floor().long().diff(dim=0)[0]


def _draw(blocks: Tensor, width: int, num_classes: int, seed: int, step: int) -> Tensor:
    """(n, width) int64: the first classes of each block's permutation of this step."""
    keys = [
        keyed_random.bits(keyed_random.derive_key(seed, "negatives", step, number), blocks)[:, None]
        for number in range(_ROUNDS)
    ]
    places = torch.arange(width, device=blocks.device).expand(len(blocks), width)
    drawn = keyed_random.permute_bits(places, BLOCK_BITS, keys) + blocks[:, None] * BLOCK
    last_start = num_classes // BLOCK * BLOCK
    if int(blocks[-1]) * BLOCK == last_start:
        # The last block is no power of two: its permutation is the order of keyed bits.
        classes = torch.arange(last_start, num_classes, device=blocks.device)
        key = keyed_random.derive_key(seed, "negatives of the last block", step)
        order = classes[keyed_random.bits(key, classes).argsort()][:width]
        drawn[-1] = -1
        drawn[-1, : len(order)] = order
    return drawn


def _is_member(values: Tensor, sorted_set: Tensor) -> Tensor:
    """Whether each of `values` stands in the sorted, distinct `sorted_set`."""
    if len(sorted_set) == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    places = torch.searchsorted(sorted_set, values).clamp_max_(len(sorted_set) - 1)
    return sorted_set[places] == values
