from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from partialfc.data import duplicates
from partialfc.data.corrupt import corrupt
from partialfc.data.duplicates import KINDS, MIRRORED_BITS, RADIUS, Hasher, candidates, fit_hasher, thumbnail
from partialfc.data.images import encode_jpeg
from partialfc.data.inspect import inspect
from partialfc.data.sources import open_source
from partialfc.data.sources.base import read_image
from partialfc.data.sources.recordio import RecordWriter
from partialfc.faces.sets import write_training_set


def distances(hashes: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    different = hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]]
    mirrored = different ^ MIRRORED_BITS
    return np.minimum(
        *(np.unpackbits(each.view(np.uint8).reshape(-1, 8), axis=1).sum(1) for each in (different, mirrored))
    )


@pytest.mark.parametrize("rows", [1 << 22, 100])
def test_all_near_hashes_are_candidates_and_no_others(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_TABLE_ROWS", rows)
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 1 << 64, 600, dtype=np.uint64)
    for copy in range(300):
        flipped = sum(1 << bit for bit in generator.permutation(64)[: copy % 4].tolist())
        hashes[300 + copy] = hashes[copy] ^ np.uint64(flipped) ^ (MIRRORED_BITS if copy % 2 else np.uint64(0))
    order = generator.permutation(600)
    pairs = candidates(hashes[order])
    every = np.array(list(combinations(range(600), 2)))
    near = distances(hashes[order], every)
    assert {*map(tuple, every[near <= 3].tolist())} <= {*map(tuple, pairs.tolist())}
    assert distances(hashes[order], pairs).max() <= RADIUS
    assert len(np.unique(pairs, axis=0)) == len(pairs)


def test_a_thousand_equal_hashes_are_no_million_pairs() -> None:
    pairs = candidates(np.full(1000, 7, np.uint64))
    assert {*pairs[:, 1].tolist()} == {*range(1, 1000)}
    assert len(pairs) < 2000
    assert len(candidates(np.zeros(0, np.uint64))) == 0


def smooth(generator: np.random.Generator, size: int) -> np.ndarray:
    coarse = Image.fromarray(generator.integers(0, 255, (8, 8, 3), np.uint8))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def write_similar(path: Path, identities: int, shots: int, size: int = 56) -> Path:
    """Smooth random images; those of an identity share most of what they show."""
    generator = np.random.default_rng(1)
    path.mkdir()
    with RecordWriter(path / "train.rec") as writer:
        for identity in range(identities):
            own = smooth(generator, size)
            for _ in range(shots):
                mixed = 0.7 * own + 0.3 * smooth(generator, size)
                writer.write(encode_jpeg(mixed.astype(np.uint8), 90), identity)
    return path


def check(found: dict[str, Any], truth: Path) -> None:
    """All exact copies are found, at least 95 % of the others, and nothing that is no copy.

    A copy that is encoded as its original was has the same pixels, and counts as exact.
    """
    with np.load(truth, allow_pickle=False) as arrays:
        exact, encoded, mirrored = np.bincount(arrays["kinds"], minlength=3).tolist()
    assert found["exact"] >= exact
    assert exact + 0.95 * encoded <= found["exact"] + found["re-encoded"] <= exact + encoded
    assert 0.95 * mirrored <= found["mirrored"] <= mirrored


def test_copies_are_found_among_similar_images(tmp_path: Path) -> None:
    write_similar(tmp_path / "set", 60, 4)
    assert sum(inspect(tmp_path / "set")["duplicates"][kind] for kind in KINDS) == 0
    corrupt(tmp_path / "set", tmp_path / "copies", "duplicates", fraction=0.5)
    found = inspect(tmp_path / "copies")["duplicates"]
    check(found, tmp_path / "copies" / "truth.npz")
    assert found["across_identities"] == pytest.approx(60, abs=3)
    group = found["groups"][0]
    assert [open_source(tmp_path / "copies").name(index) for index in group["records"]] == group["names"]


@pytest.mark.slow
def test_copies_are_found_among_procedural_faces(tmp_path: Path) -> None:
    write_training_set(tmp_path / "faces", identities=range(60), shots=6, size=64, workers=0)
    assert sum(inspect(tmp_path / "faces")["duplicates"][kind] for kind in KINDS) == 0
    corrupt(tmp_path / "faces", tmp_path / "copies", "duplicates", fraction=1.0)
    check(inspect(tmp_path / "copies")["duplicates"], tmp_path / "copies" / "truth.npz")


def test_mirroring_flips_the_odd_bits(tmp_path: Path) -> None:
    source = open_source(write_similar(tmp_path / "set", 20, 2))
    hasher = fit_hasher(source)
    images = [read_image(source, index)[1] for index in range(len(source))]
    plain, mirrored = (hasher(np.stack([thumbnail(image[:, ::step]) for image in images])) for step in (1, -1))
    different = np.unpackbits((plain ^ mirrored ^ MIRRORED_BITS).view(np.uint8).reshape(-1, 8), axis=1).sum(1)
    assert different.mean() < 0.5


def test_a_hash_takes_eight_bytes() -> None:
    hasher = Hasher(np.ones((1024, 64), np.float32), np.zeros(64, np.float32))
    assert hasher(np.zeros((3, 32, 32, 3), np.uint8)).nbytes == 24
