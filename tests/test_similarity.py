"""Scans against brute force: every pair computed, sorted by similarity and then by rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed_workers import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from partialfc import similarity
from partialfc.core.errors import InputError
from partialfc.distributed.collectives import rank_of
from partialfc.similarity import Rows, count_pairs, dot, largest_pairs, top_k

Found = tuple[Tensor, Tensor, Tensor]


def faces(count: int, width: int, identities: int, seed: int = 0, noise: float = 1.2) -> tuple[Tensor, Tensor]:
    """Unit embeddings around the centers of identities, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(identities, (count,), generator=generator)
    centers = normalize(torch.randn(identities, width, generator=generator))
    return normalize(centers[labels] + noise * torch.randn(count, width, generator=generator) / width**0.5), labels


def all_similarities(left: Tensor, right: Tensor) -> Tensor:
    """`dot` of every pair."""
    return dot(left.repeat_interleave(len(right), dim=0), right.repeat(len(left), 1)).view(len(left), len(right))


def brute_force(left: Tensor, right: Tensor | None, labels: Tensor, others: Tensor | None, count: int) -> Found:
    matrix = all_similarities(left, left if right is None else right)
    different = labels[:, None] != (labels if others is None else others)
    if right is None:
        different = different.triu(diagonal=1)
    first, second = different.nonzero(as_tuple=True)
    order = matrix[first, second].argsort(descending=True, stable=True)[:count]
    return matrix[first, second][order], first[order], second[order]


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.fixture(params=["int8", "float32"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which product rules out pairs."""
    monkeypatch.setattr(similarity, "_int8_pays", lambda: request.param == "int8")
    return str(request.param)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_BLOCK", (64, 96))
    monkeypatch.setattr(similarity, "_SAMPLE", 40)
    monkeypatch.setattr(similarity, "_PAIRS_AT_ONCE", 256)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@given(st.integers(0, 40), st.integers(0, 70), st.integers(0, 2**31))
@settings(deadline=None)
def test_a_similarity_is_the_rounded_dot_product_in_any_call(count: int, width: int, seed: int) -> None:
    left, right = torch.randn(2, count, width, generator=torch.Generator().manual_seed(seed))
    found = dot(left, right)
    assert found.dtype == torch.float32
    exact = (left.double() * right.double()).sum(dim=1)
    torch.testing.assert_close(found.double(), exact, rtol=1e-7, atol=1e-12)
    assert torch.equal(
        found, torch.cat([torch.empty(0), *(dot(left[i : i + 1], right[i : i + 1]) for i in range(count))])
    )
    assert torch.equal(found, dot(right, left))


@given(
    width=st.integers(2, 70),
    seed=st.integers(0, 2**31),
    spike=st.sampled_from([1.0, 3.0, 50.0]),
    threshold=st.floats(-1.0, 1.0),
)
@settings(deadline=None, max_examples=60)
def test_no_pair_that_reaches_the_threshold_is_ruled_out(width: int, seed: int, spike: float, threshold: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    units = torch.randn(40, width, generator=generator)
    units[:, 0] *= spike  # large residuals
    units[3], units[4], units[5] = units[6], -units[6], 0.0
    units = normalize(units)
    matrix = all_similarities(units, units)
    # A similarity that occurs is a harder threshold than any other.
    for least in (threshold, float(matrix.flatten()[seed % matrix.numel()])):
        for codes in (similarity._Codes.of(units), None):
            rows = Rows(units, codes)
            for one in (least, torch.full((30,), least, dtype=torch.float64)):
                first, second = similarity._candidates(rows, rows, slice(10, 40), slice(0, 40), one)
                found = torch.zeros(40, 40, dtype=torch.bool)
                found[rows.order[first], rows.order[second]] = True
                assert not ((matrix >= least) & ~found)[rows.order[10:]].any()


def test_the_codes_rule_out_nearly_all_pairs() -> None:
    units, _ = faces(2000, 512, 500)
    rows = Rows(units, similarity._Codes.of(units))
    least = float((units @ units.T)[:1000, 1000:].flatten().kthvalue(999_900).values)
    first, _ = similarity._candidates(rows, rows, slice(0, 1000), slice(1000, 2000), least)
    assert 100 <= len(first) < 3_000


@pytest.mark.parametrize("width", [1, 3, 20, 37, 64])
@pytest.mark.parametrize("count", [1, 40, 3000, 10**5])
@pytest.mark.usefixtures("product", "small_blocks", "two_threads")
def test_the_largest_pairs_are_those_of_brute_force(width: int, count: int) -> None:
    units, labels = faces(200, width, 40)
    units[10:60] = units[10].clone()  # ties, within identities and across
    units[70:80], units[80] = -units[70:80], 0.0
    rows = Rows.of(units)
    assert_same(largest_pairs(rows, None, labels, None, count), brute_force(units, None, labels, None, count))
    sides = units[:120], units[70:], labels[:120], labels[70:]
    found = largest_pairs(Rows.of(units[:120]), Rows.of(units[70:]), labels[:120], labels[70:], count)
    assert_same(found, brute_force(*sides, count))


@pytest.mark.slow
@pytest.mark.usefixtures("product")
def test_five_thousand_rows_with_ties() -> None:
    units, labels = faces(5000, 64, 900)
    units[4000:4200] = units[:200]
    labels[4000:4200] = labels[:200] + 1
    expected = normalize(units) @ units.T
    found, first, second = largest_pairs(Rows.of(units), None, labels, None, 2000)
    assert torch.equal(found, dot(units[first], units[second]))
    assert (labels[first] != labels[second]).all()
    assert (first < second).all()
    expected[labels[:, None] == labels] = -2.0
    values = expected.triu(diagonal=1)
    assert len((first * 5000 + second).unique()) == 2000
    torch.testing.assert_close(found, values.flatten().topk(2000).values)
    steps = torch.diff(found)
    keys = first * 5000 + second
    assert (steps <= 0).all()
    assert (torch.diff(keys)[steps == 0] > 0).all()


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.usefixtures("product")
def test_few_rows(rows: int) -> None:
    units = normalize(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))[:rows]
    labels = torch.arange(rows)
    found = largest_pairs(Rows.of(units), None, labels, None, 5)
    assert_same(found, brute_force(units, None, labels, None, 5) if rows == 2 else tuple(part[:0] for part in found))
    assert_same(largest_pairs(Rows.of(units), None, labels * 0, None, 5), tuple(part[:0] for part in found))
    similarities, nearest = top_k(Rows.of(units), Rows.of(units), 3)
    assert similarities.shape == nearest.shape == (rows, rows)
    assert (nearest[:, :1].flatten() == labels).all()


@pytest.mark.usefixtures("product", "small_blocks")
def test_a_first_threshold_that_is_too_high_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    units, labels = faces(200, 16, 20)
    units[::5] = normalize(units[::5] + 3.0)  # the sample is of these rows, which are closer to each other
    monkeypatch.setattr(similarity, "_SAMPLE", 40)
    scans: list[float] = []
    scan = similarity._Pairs.scan

    def counted(pairs: similarity._Pairs, count: int, least: float, progress: None) -> tuple[Tensor, Tensor]:
        scans.append(least)
        return scan(pairs, count, least, progress)

    monkeypatch.setattr(similarity._Pairs, "scan", counted)
    assert_same(largest_pairs(Rows.of(units), None, labels, None, 3000), brute_force(units, None, labels, None, 3000))
    assert len(scans) == 2


@pytest.mark.usefixtures("small_blocks")
def test_progress_ends_at_the_number_of_blocks() -> None:
    units, labels = faces(1000, 8, 100)
    calls: list[tuple[int, int]] = []
    largest_pairs(Rows.of(units), None, labels, None, 10, lambda done, total: calls.append((done, total)))
    assert len(calls) > 1
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1]


@pytest.mark.parametrize("k", [1, 7, 150, 400])
@pytest.mark.usefixtures("product", "small_blocks", "two_threads")
def test_the_nearest_rows_are_those_of_brute_force(k: int) -> None:
    gallery, _ = faces(310, 20, 60)
    gallery[10:60] = gallery[200:250]  # ties
    gallery[61] = 0.0
    queries = torch.cat([gallery[::3], -gallery[:30]])
    matrix = all_similarities(queries, gallery)
    order = matrix.argsort(dim=1, descending=True, stable=True)[:, :k]
    assert_same(top_k(Rows.of(queries), Rows.of(gallery), k), (matrix.gather(1, order), order))


@pytest.mark.parametrize(("value", "word"), [(np.nan, "norm nan"), (np.inf, "norm inf"), (2.0, "norm 2.")])
def test_rows_must_be_normalised(value: float, word: str) -> None:
    units = torch.eye(3)
    units[1, 0] = value
    with pytest.raises(InputError, match=f"Embedding 1 has {word}.*normalise"):
        Rows.of(units)


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), max_size=9), st.lists(st.integers(0, 4), max_size=9))
def test_pairs_are_counted(left: list[int], right: list[int]) -> None:
    one, two = (torch.tensor(side, dtype=torch.int64) for side in (left, right))
    equal = one[:, None] == one
    above = torch.ones_like(equal).triu(diagonal=1)
    assert count_pairs(one) == (int((equal & above).sum()), int((~equal & above).sum()))
    equal = one[:, None] == two
    assert count_pairs(one, two) == (int(equal.sum()), int((~equal).sum()))


def _scan_on_a_rank(rank: int, folder: Path) -> None:
    units, labels = faces(1500, 24, 100)
    units[100:110] = units[0]
    rows = Rows.of(units)
    found = (*largest_pairs(rows, None, labels, None, 700), *top_k(Rows.of(units[labels < 50]), rows, 3))
    torch.save(found, folder / f"{rank_of()}.pt")


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_finds_the_same(world_size: int, tmp_path: Path) -> None:
    run_ranks(world_size, _scan_on_a_rank, tmp_path)
    alone = tmp_path / "alone"
    alone.mkdir()
    _scan_on_a_rank(0, alone)
    expected = torch.load(alone / "0.pt")
    for rank in range(world_size):
        assert_same(torch.load(tmp_path / f"{rank}.pt"), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_the_same() -> None:
    units, labels = faces(9000, 512, 900)
    units[4000:4200] = units[:200]
    on_gpu = Rows.of(units.cuda())
    rows = Rows.of(units)
    found = largest_pairs(on_gpu, None, labels.cuda(), None, 5000)
    assert_same(tuple(part.cpu() for part in found), largest_pairs(rows, None, labels, None, 5000))
    assert_same(tuple(part.cpu() for part in top_k(on_gpu, on_gpu, 4)), top_k(rows, rows, 4))
