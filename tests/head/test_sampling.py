"""The sample: exact totals, uniform, independent over steps, and blind to how the classes are sharded."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from partialfc.distributed.collectives import split_evenly
from partialfc.head import sampling
from partialfc.head.sampling import BLOCK, sample_bound, sample_classes, sample_padded, sample_size, sampling_keys

NOBODY = torch.zeros(0, dtype=torch.int64)


def sample(positives: Tensor, num_classes: int, rate: float, step: int = 0, seed: int = 0, parts: int = 1) -> Tensor:
    """The union over `parts` shards."""
    bounds = [split_evenly(num_classes, parts, part) for part in range(parts)]
    return torch.cat(
        [
            sample_classes(
                positives, num_classes=num_classes, sample_rate=rate, seed=seed, step=step, start=start, stop=stop
            )
            for start, stop in bounds
        ]
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_classes=st.integers(1, 3 * BLOCK + 5), rate=st.floats(0, 1), parts=st.integers(1, 7))
def test_union_of_shards_is_one_valid_sample(data: st.DataObject, num_classes: int, rate: float, parts: int) -> None:
    labels = data.draw(st.lists(st.integers(0, num_classes - 1), min_size=1, max_size=40))
    positives = torch.tensor(labels).unique()
    alone = sample(positives, num_classes, rate, step=3, seed=9)
    assert torch.equal(sample(positives, num_classes, rate, step=3, seed=9, parts=parts), alone)
    assert bool((alone.diff() > 0).all())
    assert 0 <= int(alone[0]) <= int(alone[-1]) < num_classes
    assert bool(torch.isin(positives, alone).all())
    assert sample_size(num_classes, rate) <= len(alone) <= sample_bound(num_classes, rate, len(labels))


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.3, 0.999])
@pytest.mark.parametrize("num_classes", [1, 7, 10, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 54321])
def test_total_is_exact_when_no_block_is_full_of_positives(num_classes: int, rate: float) -> None:
    assert len(sample(NOBODY, num_classes, rate)) == sample_size(num_classes, rate)
    assert sample_size(num_classes, rate) == math.floor(rate * num_classes + 0.5)
    sampled = sample(NOBODY, num_classes, rate)
    if len(sampled):
        again = sample(sampled[:1], num_classes, rate)
        assert len(again) == sample_size(num_classes, rate)


def test_positives_beyond_a_blocks_quota_are_all_used() -> None:
    positives = torch.arange(0, 2 * BLOCK, 3)
    assert torch.equal(sample(positives[positives < BLOCK], BLOCK, 0.1), positives[positives < BLOCK])
    # The second block keeps its own quota.
    first_only = positives[positives < BLOCK]
    assert len(sample(first_only, 2 * BLOCK, 0.1)) == len(first_only) + sample_size(2 * BLOCK, 0.1) - sample_size(
        BLOCK, 0.1
    )


def test_rate_zero_is_the_positives_and_one_is_everything() -> None:
    positives = torch.tensor([3, 5000, 9999])
    assert torch.equal(sample(positives, 10_000, 0.0, parts=3), positives)
    assert torch.equal(sample(positives, 10_000, 1.0, parts=3), torch.arange(10_000))


def test_an_empty_shard_samples_nothing() -> None:
    for rate in (0.0, 0.5, 1.0):
        assert (
            len(sample_classes(torch.tensor([1]), num_classes=4, sample_rate=rate, seed=0, step=0, start=2, stop=2))
            == 0
        )


@pytest.mark.parametrize("num_classes", [1000, 2 * BLOCK, BLOCK + 1500])
def test_every_negative_is_drawn_equally_often_and_apart_from_the_others(num_classes: int) -> None:
    """χ² of inclusion, of inclusion of pairs of neighbours, and of one step after another."""
    steps, rate = 1500, 0.1
    positives = torch.tensor([0, 17, 500])
    drawn = torch.zeros(steps, num_classes)
    for step in range(steps):
        drawn[step, sample(positives, num_classes, rate, step)] = 1
    assert bool(drawn[:, positives].all())
    negatives = torch.ones(num_classes, dtype=torch.bool)
    negatives[positives] = False
    drawn = drawn[:, negatives]
    assert bool((drawn.sum(dim=1) + 3 == sample_size(num_classes, rate)).all())
    share = float(drawn.mean())
    variance = share * (1 - share)
    # Blocks of unequal size round their quotas, so the expected share is that of a class's own block.
    blocks = (torch.arange(num_classes)[negatives] // BLOCK).unique(return_inverse=True)[1]
    expected = torch.stack([drawn[:, blocks == block].mean() for block in range(int(blocks.max()) + 1)])[blocks]
    chi_square = float((((drawn.sum(dim=0) - steps * expected) ** 2) / (steps * variance)).sum())
    assert abs(chi_square - num_classes) < 5 * (2 * num_classes) ** 0.5
    for left, right in ((drawn[:, :-1], drawn[:, 1:]), (drawn[:-1], drawn[1:]), (drawn[:, :-64], drawn[:, 64:])):
        together = float((left * right).mean())
        deviation = (share**2 * (1 - share**2) / left.numel()) ** 0.5
        assert abs(together - share**2) < 6 * deviation + share / num_classes


def test_seeds_and_steps_draw_differently() -> None:
    samples = [sample(NOBODY, 50_000, 0.1, step, seed) for step in range(3) for seed in range(3)]
    for number, one in enumerate(samples):
        for other in samples[:number]:
            shared = len(one) + len(other) - len(torch.cat([one, other]).unique())
            assert abs(shared - 500) < 6 * 500**0.5


def reference_sample(positives: Tensor, num_classes: int, rate: float, keys: Tensor, block: int = BLOCK) -> Tensor:
    """The rule, block by block: the positives, then the first negatives of the block's permutation up to its quota."""
    chosen = [positives]
    for start in range(0, num_classes, block):
        stop = min(start + block, num_classes)
        quota = math.floor(stop * rate + 0.5) - math.floor(start * rate + 0.5)
        own = positives[(positives >= start) & (positives < stop)]
        drawn = sampling._draw(
            torch.tensor([start // block]), block, num_classes, keys, ends=stop == num_classes and stop % block > 0
        )[0]
        drawn = drawn[drawn >= 0]
        assert torch.equal(drawn.sort().values, torch.arange(start, stop))
        chosen.append(drawn[:quota][~torch.isin(drawn[:quota], own)][: max(0, quota - len(own))])
    return torch.cat(chosen).sort().values


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    num_classes=st.sampled_from([1, 7, 149, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 5]),
    rate=st.sampled_from([0.0, 1e-4, 0.01, 0.3, 0.999, 1.0]) | st.floats(0, 1),
    parts=st.integers(1, 7),
)
def test_padded_form_has_the_same_classes_and_a_shape_that_no_label_changes(
    data: st.DataObject, num_classes: int, rate: float, parts: int
) -> None:
    """Against the rule written out, with repeated and impossible labels."""
    labels = torch.tensor(data.draw(st.lists(st.integers(0, num_classes - 1), min_size=1, max_size=40)))
    keys = sampling_keys(5, torch.tensor(2))
    expected = reference_sample(labels.unique(), num_classes, rate, keys)
    bad = torch.tensor([-1, num_classes, 1 << 40, -(1 << 63)])
    for part in range(parts):
        start, stop = split_evenly(num_classes, parts, part)
        options: dict[str, Any] = {"num_classes": num_classes, "sample_rate": rate, "start": start, "stop": stop}
        padded, count = sample_padded(labels, keys=keys, **options)
        own = expected[(expected >= start) & (expected < stop)]
        assert torch.equal(padded[: int(count)], own)
        assert bool((padded[int(count) :] == stop).all())
        assert len(padded) <= min(stop - start, own.numel() + 2 * BLOCK + len(labels))
        others, _ = sample_padded(torch.zeros_like(labels), keys=keys, **options)
        assert others.shape == padded.shape
        mixed, mixed_count = sample_padded(torch.cat([labels, bad, labels]), keys=keys, **options)
        assert torch.equal(mixed[: int(count)], own)
        assert mixed_count == count


def test_padding_is_little() -> None:
    """What a GPU computes for nothing: at most a block's quota at each end, and a class for each label."""
    labels = torch.arange(512) * 1900
    for rate, parts in ((0.1, 1), (0.1, 8), (0.01, 3)):
        for part in range(parts):
            start, stop = split_evenly(1_000_000, parts, part)
            padded, count = sample_padded(
                labels,
                num_classes=1_000_000,
                sample_rate=rate,
                keys=sampling_keys(0, torch.tensor(0)),
                start=start,
                stop=stop,
            )
            assert len(padded) - int(count) <= 512 + 2 * math.ceil(rate * BLOCK)
