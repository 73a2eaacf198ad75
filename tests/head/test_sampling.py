"""The sample: exact totals, uniform, independent over steps, and blind to how the classes are sharded."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from partialfc.distributed.collectives import split_evenly
from partialfc.head import sampling
from partialfc.head.sampling import BLOCK, RUN_BITS, Sampler, sample_bound, sample_classes, sample_padded, sample_size

SAMPLERS = get_args(Sampler)
NOBODY = torch.zeros(0, dtype=torch.int64)


def sample(
    positives: Tensor,
    num_classes: int,
    rate: float,
    step: int = 0,
    seed: int = 0,
    parts: int = 1,
    sampler: Sampler = "uniform",
) -> Tensor:
    """The union over `parts` shards."""
    options: dict[str, Any] = {"num_classes": num_classes, "sample_rate": rate, "seed": seed, "sampler": sampler}
    bounds = [split_evenly(num_classes, parts, part) for part in range(parts)]
    return torch.cat(
        [sample_classes(positives, step=step, start=start, stop=stop, **options) for start, stop in bounds]
    )


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    num_classes=st.integers(1, 3 * BLOCK + 5),
    rate=st.floats(0, 1),
    parts=st.integers(1, 7),
    sampler=st.sampled_from(SAMPLERS),
    step=st.integers(0, 1 << 40),
)
def test_union_of_shards_is_one_valid_sample(
    data: st.DataObject, num_classes: int, rate: float, parts: int, sampler: Sampler, step: int
) -> None:
    labels = data.draw(st.lists(st.integers(0, num_classes - 1), min_size=1, max_size=40))
    positives = torch.tensor(labels).unique()
    alone = sample(positives, num_classes, rate, step, seed=9, sampler=sampler)
    assert torch.equal(sample(positives, num_classes, rate, step, seed=9, parts=parts, sampler=sampler), alone)
    assert bool((alone.diff() > 0).all())
    assert 0 <= int(alone[0]) <= int(alone[-1]) < num_classes
    assert bool(torch.isin(positives, alone).all())
    assert len(alone) == max(sample_size(num_classes, rate), len(positives))
    assert len(alone) <= sample_bound(num_classes, rate, len(labels))


@pytest.mark.parametrize("rate", [1e-5, 0.001, 0.1, 0.3, 0.999])
@pytest.mark.parametrize("num_classes", [1, 7, 10, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 54321])
@pytest.mark.parametrize("clustered", [False, True])
def test_the_total_is_exact(num_classes: int, rate: float, clustered: bool) -> None:
    """Also where the positives alone fill whole blocks, which then contribute no negatives."""
    size = sample_size(num_classes, rate)
    assert size == math.floor(rate * num_classes + 0.5)
    for count in (0, 1, num_classes // 20, num_classes // 2):
        positives = torch.arange(count) if clustered else torch.randperm(num_classes)[:count]
        assert len(sample(positives, num_classes, rate)) == max(size, count)


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_classes", "rate"), [(1000, 0.1), (BLOCK + 1, 0.1), (BLOCK + 4, 0.5), (2 * BLOCK, 0.002), (BLOCK + 1500, 0.7)]
)
@pytest.mark.parametrize("clustered", [False, True])
def test_every_class_is_a_negative_equally_often_and_apart_from_the_others(
    num_classes: int, rate: float, clustered: bool
) -> None:
    """χ² of inclusion over classes and over blocks, of pairs of neighbours, and of one step after another.

    Clustered positives are the first classes, three quarters of a sample of them: their block must give negatives too.
    """
    steps = 600
    size = sample_size(num_classes, rate)
    positives = torch.arange(max(1, 3 * size // 4)) if clustered else torch.tensor([0, 17, 500])
    positives = positives[: max(1, size - 1)]
    drawn = torch.zeros(steps, num_classes)
    for step in range(steps):
        drawn[step, sample(positives, num_classes, rate, step)] = 1
    assert bool(drawn[:, positives].all())
    is_negative = torch.ones(num_classes, dtype=torch.bool)
    is_negative[positives] = False
    drawn = drawn[:, is_negative]
    share = (size - len(positives)) / int(is_negative.sum())
    assert bool((drawn.sum(dim=1) == size - len(positives)).all())
    expected, count = steps * share, drawn.shape[1]
    chi_square = float(((drawn.sum(dim=0) - expected) ** 2).sum() / (expected * (1 - share)))
    assert abs(chi_square - count) < 5 * (2 * count) ** 0.5
    blocks = torch.arange(num_classes)[is_negative] // BLOCK
    for block in blocks.unique():
        inside = drawn[:, blocks == block]
        # Systematic sampling spreads no wider than independent draws.
        deviation = (inside.numel() * share * (1 - share)) ** 0.5
        assert abs(float(inside.sum()) - inside.numel() * share) < 5 * deviation
    for left, right in ((drawn[:, :-1], drawn[:, 1:]), (drawn[:-1], drawn[1:]), (drawn[:, :-64], drawn[:, 64:])):
        together = float((left * right).mean())
        deviation = (share**2 * (1 - share**2) / left.numel()) ** 0.5
        assert abs(together - share**2) < 6 * deviation + share / num_classes


@pytest.mark.slow
@pytest.mark.parametrize(("num_classes", "rate", "clustered"), [(BLOCK + 4, 0.5, True), (BLOCK + 1500, 0.1, False)])
@pytest.mark.parametrize("sampler", ["sweep", "runs"])
def test_other_samplers_draw_every_class_equally_often(
    sampler: Sampler, num_classes: int, rate: float, clustered: bool
) -> None:
    """χ² of inclusion over classes and groups. A sweep spreads by far less than independent draws, runs about as much.

    Clustered positives leave the sweep a quarter of the sample, so that most classes miss their turn.

    Positives, which are none of the negatives that are counted, are the same in all steps.
    """
    steps, size = 300, sample_size(num_classes, rate)
    positives = torch.arange(3 * size // 4) if clustered else torch.arange(0, num_classes, num_classes // 20)
    drawn = torch.zeros(steps, num_classes)
    for step in range(steps):
        drawn[step, sample(positives, num_classes, rate, step, sampler=sampler)] = 1
    is_negative = torch.ones(num_classes, dtype=torch.bool)
    is_negative[positives] = False
    drawn, classes = drawn[:, is_negative], torch.arange(num_classes)[is_negative]
    share = (size - len(positives)) / drawn.shape[1]
    assert bool((drawn.sum(dim=1) == size - len(positives)).all())
    times = drawn.sum(dim=0)
    for number in (classes // 1024).unique():
        group = times[classes // 1024 == number]
        deviation = (steps * len(group) * share * (1 - share) * (1 << RUN_BITS)) ** 0.5
        assert abs(float(group.sum()) - steps * share * len(group)) < 5 * deviation
    chi_square = float(((times - steps * share) ** 2 / (steps * share * (1 - share))).mean())
    together = float((drawn[:, 1:] * drawn[:, :-1])[:, classes.diff() == 1].mean()) / share
    if sampler == "sweep":
        assert chi_square < (0.9 if clustered else 0.2)
        assert together < share + 0.05
    else:
        assert 0.7 < chi_square < 1.4
        assert together > 0.6 + 0.4 * share


def test_a_sweep_comes_to_every_class_before_it_comes_back_to_one() -> None:
    """Without positives ten steps at a tenth of the classes are one sweep, also over a last block that is smaller."""
    for num_classes in (2 * BLOCK, 5 * BLOCK + 1000, 5000):
        seen = [sample(NOBODY, num_classes, 0.1, step, sampler="sweep") for step in range(20)]
        for sweep in (seen[:10], seen[10:]):
            times = torch.bincount(torch.cat(sweep), minlength=num_classes)
            # What a block contributes is rounded, down or up by chance.
            assert float((times == 1).float().mean()) > 0.98
        assert not torch.equal(seen[0], seen[10])


def test_runs_are_neighbours() -> None:
    drawn = sample(NOBODY, 1_000_000, 0.1, 3, sampler="runs")
    lengths = torch.diff((drawn.diff() != 1).nonzero()[:, 0])
    assert 16 <= float(lengths.double().mean()) <= 64


@pytest.mark.slow
def test_no_class_is_left_out_at_a_small_rate() -> None:
    """10 of 4,096 + 3 classes: a block of 3, of which a step wants 0.007 classes, beside one of 4,096."""
    num_classes, steps = BLOCK + 3, 4000
    drawn = torch.zeros(num_classes)
    for step in range(steps):
        drawn[sample(NOBODY, num_classes, 10 / num_classes, step)] += 1
    for block in (drawn[:-3], drawn[-3:]):
        expected = len(block) * steps * 10 / num_classes  # 29 of the last three
        assert float(block.sum()) == pytest.approx(expected, abs=5 * expected**0.5)


def test_seeds_and_steps_draw_differently() -> None:
    samples = [sample(NOBODY, 50_000, 0.1, step, seed) for step in range(3) for seed in range(3)]
    for number, one in enumerate(samples):
        for other in samples[:number]:
            shared = len(one) + len(other) - len(torch.cat([one, other]).unique())
            assert abs(shared - 500) < 6 * 500**0.5


def reference_sample(positives: Tensor, num_classes: int, rate: float, sampler: Sampler) -> Tensor:
    """The rule in exact integers, block by block: all positives, then the first negatives of each permutation."""
    chosen = [positives]
    if rate >= 1:
        return torch.arange(num_classes)
    others = num_classes - len(positives)
    size = sample_size(num_classes, rate)
    order, key = sampling.order_of_step(sampler, num_classes, max(1, size), seed=5, step=torch.tensor(2))
    negatives = max(0, size - len(positives))
    offset = int(sampling._offset(key, torch.tensor(others)))
    below = 0
    for start in range(0, num_classes, BLOCK):
        stop = min(start + BLOCK, num_classes)
        own = positives[(positives >= start) & (positives < stop)]
        count = stop - start - len(own)
        share = ((below + count) * negatives + offset) // max(others, 1) - (below * negatives + offset) // max(
            others, 1
        )
        below += count
        permutation = order.draw(torch.tensor([start // BLOCK]), torch.arange(stop - start))
        assert torch.equal(permutation.sort().values, torch.arange(start, stop))
        chosen.append(permutation[~torch.isin(permutation, own)][:share])
    return torch.cat(chosen).sort().values


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    num_classes=st.sampled_from([1, 7, 149, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 5]),
    rate=st.sampled_from([0.0, 1e-4, 0.01, 0.3, 0.999, 1.0]) | st.floats(0, 1),
    parts=st.integers(1, 7),
    sampler=st.sampled_from(SAMPLERS),
)
def test_padded_form_has_the_same_classes_and_a_shape_that_no_label_changes(
    data: st.DataObject, num_classes: int, rate: float, parts: int, sampler: Sampler
) -> None:
    """Against the rule written out, with repeated and impossible labels."""
    labels = torch.tensor(data.draw(st.lists(st.integers(0, num_classes - 1), min_size=1, max_size=40)))
    expected = reference_sample(labels.unique(), num_classes, rate, sampler)
    bad = torch.tensor([-1, num_classes, 1 << 40, -(1 << 63)])
    for part in range(parts):
        start, stop = split_evenly(num_classes, parts, part)
        options: dict[str, Any] = {"num_classes": num_classes, "sample_rate": rate, "start": start, "stop": stop}
        options |= {"seed": 5, "step": torch.tensor(2), "sampler": sampler}
        padded, count = sample_padded(labels, **options)
        own = expected[(expected >= start) & (expected < stop)]
        assert torch.equal(padded[: int(count)], own)
        assert bool((padded[int(count) :] == stop).all())
        assert len(padded) <= min(stop - start, math.ceil((stop - start + 2 * BLOCK) * rate) + 2 + len(labels))
        others, _ = sample_padded(torch.zeros_like(labels), **options)
        assert others.shape == padded.shape
        mixed, mixed_count = sample_padded(torch.cat([labels, bad, labels]), **options)
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
                seed=0,
                step=torch.tensor(0),
                start=start,
                stop=stop,
            )
            assert len(padded) - int(count) <= 512 + 2 * math.ceil(rate * BLOCK) + 1
