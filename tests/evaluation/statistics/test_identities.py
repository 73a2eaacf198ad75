"""Compact identities and connected components, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partialfc.evaluation.statistics.identities import components, number_identities

pairs_of = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12), st.booleans()), min_size=1, max_size=25)


@given(pairs=pairs_of, factor=st.sampled_from([1, 10**12, -7]))
@settings(max_examples=150, deadline=None)
def test_components_are_what_genuine_pairs_connect(pairs: list[tuple[int, int, bool]], factor: int) -> None:
    reached = {node: {node} for left, right, _ in pairs for node in (left, right)}
    for left, right, same in pairs:
        if same and reached[left] is not reached[right]:
            reached[left] |= reached[right]
            for node in reached[left]:
                reached[node] = reached[left]
    ids = components([(left * factor, right * factor) for left, right, _ in pairs], [same for *_, same in pairs])
    found: dict[int, int] = {}
    for (left, right, _), ends in zip(pairs, ids.tolist(), strict=True):
        for node, identity in zip((left, right), ends, strict=True):
            assert found.setdefault(node, identity) == identity
    for node, identity in found.items():
        assert {other for other in found if found[other] == identity} == reached[node]


def test_a_long_chain_is_one_component() -> None:
    order = np.random.default_rng(0).permutation(5000)
    ids = components(np.stack([order[:-1], order[1:]], axis=1), np.ones(4999, dtype=bool))
    assert (ids == 0).all()


@pytest.mark.parametrize("offset", [0, -5, 1 << 40])
def test_impostor_pairs_of_all_identities_in_closed_form(offset: int) -> None:
    generator = np.random.default_rng(0)
    left, right = generator.integers(9, size=20) + offset, generator.integers(9, size=30) + offset
    ends = np.array([(a, b) for a in left for b in right if a != b])
    genuine = np.array([a for a in left for b in right if a == b])
    counted = number_identities(genuine, ends, len(ends))
    closed = number_identities(genuine, ends[:10], len(ends), scanned=(left, right))
    assert (counted.source, closed.source) == ("counted", "closed form")
    np.testing.assert_allclose(closed.impostor_pairs, counted.impostor_pairs, rtol=1e-12)
    assert closed.impostor_pairs.sum() == pytest.approx(2 * len(ends))

    images = generator.integers(7, size=25) + offset
    places = [(i, j) for i in range(25) for j in range(i) if images[i] != images[j]]
    ends = np.array([(images[i], images[j]) for i, j in places])
    counted = number_identities(images, ends, len(ends))
    closed = number_identities(images, ends[:3], len(ends), scanned=(images, images))
    np.testing.assert_allclose(closed.impostor_pairs, counted.impostor_pairs, rtol=1e-12)


def test_without_counts_all_identities_share_alike() -> None:
    people = number_identities(np.array([3, 3, 7]), np.array([[3, 9]]), 12, failures=2)
    assert (people.count, people.source) == (5, "equal share")
    assert people.failures.tolist() == [3, 4]
    assert people.impostor.tolist() == [[0, 2]]
    np.testing.assert_allclose(people.impostor_pairs, [8, 8, 8, 0, 0])
