from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from partialfc.core.errors import InputError
from partialfc.data.corrupt import COPIES, FRACTIONS, Kind, corrupt, cut_identities, cut_tail, flip_labels
from partialfc.data.sources import open_source
from partialfc.data.sources.base import read_image

IMAGES = 1_000_000


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    """A million images of 50,000 identities, of which some have only one or two, and unreadable records."""
    generator = np.random.default_rng(0)
    drawn = np.sort((50_000 * generator.random(IMAGES) ** 3).astype(np.int64))
    drawn[generator.integers(0, IMAGES, 100)] = -1
    return drawn


def test_the_published_conflict_set_has_its_number_of_classes() -> None:
    labels = np.repeat(np.arange(617_970), 3)
    records, new, truth = cut_identities(labels, 617_970, FRACTIONS["conflict"], 3, seed=0)
    assert truth["classes"].shape == (200_000, 3)
    changed = labels.copy()
    changed[records] = new
    assert len(np.unique(changed)) == 1_017_970


def test_cut_identities_have_equal_parts(labels: np.ndarray) -> None:
    records, new, truth = cut_identities(labels, 50_003, 0.2, 3, seed=1)
    changed = labels.copy()
    changed[records] = new
    counts = np.bincount(labels[labels >= 0], minlength=50_003)
    after = np.bincount(changed[changed >= 0])
    parts = after[truth["classes"]]
    assert len(truth["identities"]) == round(0.2 * np.count_nonzero(counts))
    assert np.array_equal(parts.sum(1), counts[truth["identities"]])
    assert (np.ptp(parts, axis=1) <= 1).all()
    assert parts.min() >= 1
    assert truth["classes"].min() >= 0
    assert truth["classes"][:, 1:].min() == 50_003
    whole = np.setdiff1d(np.arange(50_003), truth["identities"])
    assert np.array_equal(after[whole], counts[whole])
    with pytest.raises(InputError, match="identities cannot be cut: only"):
        cut_identities(labels, 50_003, 1.0, 3, seed=1)


def test_flipped_labels_are_uniform_over_the_other_classes(labels: np.ndarray) -> None:
    records, new, truth = flip_labels(labels, 0.4, seed=1)
    readable = np.count_nonzero(labels >= 0)
    assert len(records) == len(np.unique(records)) == round(0.4 * readable)
    assert (new != labels[records]).all()
    assert np.array_equal(truth["true_labels"], labels[records])
    assert np.isin(new, labels[labels >= 0]).all()
    few = np.repeat([3, 5, 9], 100_000)
    records, new, _ = flip_labels(few, 0.5, seed=2)
    for label in (3, 5, 9):
        into = np.bincount(new[few[records] == label], minlength=10)[[3, 5, 9]]
        share = into / into.sum()
        assert share[[3, 5, 9].index(label)] == 0
        assert np.abs(np.delete(share, [3, 5, 9].index(label)) - 0.5).max() < 0.01
    assert np.bincount(few[records])[[3, 5, 9]] / 50_000 == pytest.approx(1, abs=0.02)


def test_a_long_tail_keeps_two_to_four_images(labels: np.ndarray) -> None:
    dropped, new, truth = cut_tail(labels, 0.1, seed=1)
    counts = np.bincount(labels[labels >= 0])
    after = counts - np.bincount(labels[dropped], minlength=len(counts))
    assert (new == -1).all()
    assert len(truth["identities"]) == round(0.1 * np.count_nonzero(counts))
    assert np.array_equal(after[truth["identities"]], counts[truth["identities"]])
    tail = np.setdiff1d(np.flatnonzero(counts), truth["identities"])
    assert (after[tail] >= np.minimum(counts[tail], 2)).all()
    shares = np.bincount(after[tail][counts[tail] > 4], minlength=5)
    assert shares[:2].tolist() == [0, 0]
    assert len(shares) == 5
    assert np.abs(shares[2:] / shares.sum() - 1 / 3).max() < 0.02


def test_draws_depend_on_the_seed_and_a_smaller_fraction_draws_a_part(labels: np.ndarray) -> None:
    for damage in (flip_labels, cut_tail):
        first, again, other = (damage(labels, 0.1, seed)[0] for seed in (0, 0, 1))
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)
    small, large = (
        dict(zip(*(each.tolist() for each in flip_labels(labels, f, 0)[:2]), strict=True)) for f in (0.1, 0.2)
    )
    assert small.items() <= large.items()


@pytest.mark.parametrize("kind", ["conflict", "flip", "long-tail"])
def test_overlays_with_their_truth(im2rec: Path, tmp_path: Path, kind: Kind) -> None:
    summary = corrupt(im2rec, tmp_path / "out", kind, fraction=0.5, seed=3)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    before, after = open_source(im2rec), open_source(im2rec, overlay=tmp_path / "out" / "data.overlay")
    assert (summary["images"], summary["classes"]) == (len(after), after.num_classes)
    with np.load(tmp_path / "out" / "truth.npz", allow_pickle=False) as truth:
        assert truth["schema_version"] == 1
        if kind == "conflict":
            for identity, classes in zip(truth["identities"], truth["classes"], strict=True):
                assert sorted(after.labels()[before.labels() == identity]) == sorted([*classes, *classes])
        elif kind == "flip":
            assert np.array_equal(before.labels()[truth["records"]], truth["true_labels"])
            assert np.array_equal(after.labels()[truth["records"]], truth["classes"])
            assert np.array_equal(np.flatnonzero(before.labels() != after.labels()), truth["records"])
        else:
            assert len(after) == 48 - len(truth["records"])
    with pytest.raises(InputError, match="exists already"):
        corrupt(im2rec, tmp_path / "out", kind)


def test_duplicates_are_what_the_truth_says(im2rec: Path, tmp_path: Path) -> None:
    corrupt(im2rec, tmp_path / "out", "duplicates", fraction=0.5, seed=3)
    before, after = open_source(im2rec), open_source(tmp_path / "out")
    assert (len(after), after.num_classes) == (48 + 24, 8)
    assert [after.read(index).encoded for index in range(48)] == [before.read(index).encoded for index in range(48)]
    with np.load(tmp_path / "out" / "truth.npz", allow_pickle=False) as truth:
        assert np.bincount(truth["kinds"]).tolist() == [8, 8, 8]
        moved = 0
        for record, original, kind in zip(truth["records"], truth["originals"], truth["kinds"], strict=True):
            (one, first), (other, second) = read_image(after, original), read_image(after, record)
            moved += one.label != other.label
            second = second[:, ::-1] if COPIES[kind] == "mirrored" else second
            assert (one.encoded == other.encoded) == (COPIES[kind] == "exact")
            assert np.abs(first.astype(int) - second).mean() < 12
        assert moved == 12


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"fraction": 0.0}, "fraction is 0: give"), ({"fraction": 1.5}, "fraction is 1.5"), ({"parts": 1}, "parts is 1")],
)
def test_impossible_damage(im2rec: Path, tmp_path: Path, options: dict[str, float], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        corrupt(im2rec, tmp_path / "out", "conflict", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_one_identity_cannot_be_flipped() -> None:
    with pytest.raises(InputError, match="only one identity"):
        flip_labels(np.zeros(10, np.int64), 0.5, seed=0)
