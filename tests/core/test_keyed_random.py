"""Keyed random numbers: pure functions, bijections, and statistics that a fair generator passes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from partialfc.core import keyed_random

COUNTERS = torch.arange(200_000)


def chi_square(counts: torch.Tensor, expected: float) -> float:
    """Standard deviations by which the χ² of `counts` exceeds its mean."""
    degrees = counts.numel() - 1
    statistic = float(((counts.double() - expected) ** 2 / expected).sum())
    return (statistic - degrees) / (2 * degrees) ** 0.5


def test_mix_is_splitmix64() -> None:
    # The first outputs of SplitMix64 with seed 0, from its authors' C code.
    golden = -7046029254386353131
    states = torch.tensor([0, golden])
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert [value % 2**64 for value in keyed_random.mix(states).tolist()] == expected


def test_keys_tell_parts_apart() -> None:
    paths: list[tuple[int | str, ...]]
    paths = [(1,), ("1",), (1, 1), (11,), ("1", 1), (1, "1"), (1, "a"), (1, "b"), (), ("",)]
    keys = {keyed_random.derive_key(*path) for path in paths}
    assert len(keys) == 10
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert keyed_random.derive_key(3, "flip", 5) == keyed_random.derive_key(3, "flip", 5)


def test_uniform_is_uniform() -> None:
    drawn = keyed_random.uniform(keyed_random.derive_key(0, "test"), COUNTERS)
    assert drawn.dtype == torch.float64
    assert 0 <= float(drawn.min()) < float(drawn.max()) < 1
    assert abs(chi_square((drawn * 1000).long().bincount(minlength=1000), len(drawn) / 1000)) < 4
    neighbours = torch.stack([drawn[:-1], drawn[1:]])
    assert abs(float(torch.corrcoef(neighbours)[0, 1])) < 0.01


def test_streams_of_different_keys_are_independent() -> None:
    first, second = (keyed_random.uniform(keyed_random.derive_key(0, "test", n), COUNTERS) for n in (0, 1))
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.01


def test_normal_has_the_moments_of_a_normal() -> None:
    drawn = keyed_random.normal(keyed_random.derive_key(0, "test"), COUNTERS)
    assert float(drawn.mean()) == pytest.approx(0, abs=0.01)
    assert float(drawn.std()) == pytest.approx(1, abs=0.01)
    assert float(drawn.pow(4).mean()) == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("width", [1, 2, 7, 64])
def test_normal_rows_do_not_depend_on_the_range_asked_for(width: int) -> None:
    whole = keyed_random.normal_rows(5, 0, 300, width)
    assert torch.equal(whole[37:211], keyed_random.normal_rows(5, 37, 211, width))
    assert keyed_random.normal_rows(5, 8, 8, width).shape == (0, width)


def test_normal_rows_have_the_moments_of_a_normal() -> None:
    rows = keyed_random.normal_rows(5, 0, 2000, 101)
    assert rows.dtype == torch.float32
    assert bool(torch.isfinite(rows).all())
    assert float(rows.mean()) == pytest.approx(0, abs=0.01)
    assert float(rows.std()) == pytest.approx(1, abs=0.01)
    assert float(rows.double().pow(4).mean()) == pytest.approx(3, abs=0.1)
    correlation = torch.corrcoef(rows[:, :20].T) - torch.eye(20)
    assert float(correlation.abs().max()) < 0.12


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(-(2**63), 2**63 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    image = keyed_random.permute(torch.arange(size), size, key)
    assert torch.equal(image.sort().values, torch.arange(size))


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 12), keys=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5))
def test_permute_bits_is_a_permutation_for_numbers_and_tensors_alike(width: int, keys: list[int]) -> None:
    values = torch.arange(1 << width)
    image = keyed_random.permute_bits(values, width, keys)
    assert torch.equal(image.sort().values, values)
    tensors = [torch.tensor(key) for key in keys]
    assert torch.equal(image, keyed_random.permute_bits(values, width, tensors))
    assert torch.equal(keyed_random.permute_bits_back(image, width, keys), values)
    assert torch.equal(keyed_random.permute_bits_back(image, width, tensors), values)


@pytest.mark.slow
def test_permute_sends_each_position_everywhere() -> None:
    size, draws = 23, 4600
    counts = torch.zeros(size, size)
    positions = torch.arange(size)
    for key in range(draws):
        counts[positions, keyed_random.permute(positions, size, keyed_random.derive_key(key))] += 1
    assert abs(chi_square(counts, draws / size)) < 5


@pytest.mark.parametrize("outside", [-1, 10])
def test_permute_refuses_positions_outside(outside: int) -> None:
    with pytest.raises(ValueError, match="lie in"):
        keyed_random.permute(torch.tensor([0, outside]), 10, 1)
