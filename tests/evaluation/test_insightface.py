"""The evaluation of the insightface package on one's own folders, beside ours on the same embeddings.

Run where `pip install insightface` (2.1) was done.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from partialfc.data.images import encode_jpeg
from partialfc.evaluation.benchmarks import open_benchmark
from partialfc.evaluation.run import evaluate_features
from partialfc.evaluation.statistics.figures import Result
from partialfc.model.features import Features

PEOPLE, SHOTS, LOST = 24, 4, 5


class Engine:
    """Stands for their detector and network: each image has one face with a given embedding, a lost one none."""

    model_name, requested_providers = "given", ("none",)

    def __init__(self, embeddings: dict[str, NDArray[np.float32]]) -> None:
        self._embeddings = embeddings

    def detect_faces(self, image: Any, source_path: str) -> list[Any]:
        if source_path not in self._embeddings:
            return []
        return [SimpleNamespace(bbox=np.array([0.0, 0, 8, 8]), normed_embedding=self._embeddings[source_path])]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], Result, Result]:
    """Their metrics and our result, of all images and without one image that could not be used."""
    theirs = pytest.importorskip("insightface.gui.core.evaluation", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("people")
    picture = encode_jpeg(np.full((8, 8, 3), 128, np.uint8))
    for place in range(PEOPLE * SHOTS):
        path = folder / f"person-{place // SHOTS:02d}" / f"{place % SHOTS}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture)
    benchmark = open_benchmark(folder, 112)
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(PEOPLE, 16)).repeat(SHOTS, axis=0) + generator.normal(size=(PEOPLE * SHOTS, 16))
    units = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    found: list[Any] = []
    for lost in (None, LOST):
        failed = np.arange(len(units)) == lost
        given = {benchmark.images.name(row): units[row] for row in np.flatnonzero(~failed).tolist()}
        done = theirs.run_identity_verification_evaluation(folder, Engine(given), auto_split=False)
        usable = np.where(failed[:, None], np.float32(0), units)
        found += [done.metrics, evaluate_features("own", benchmark, Features(usable, failed))]
    return found[0], found[2], found[1], found[3]


def test_counts_and_tar_at_far_are_the_same(both: tuple[dict[str, Any], dict[str, Any], Result, Result]) -> None:
    theirs, _, ours, _ = both
    assert theirs["positive_pairs"] == ours.facts["genuine_pairs"] == PEOPLE * SHOTS * (SHOTS - 1) // 2
    assert theirs["negative_pairs"] == ours.facts["impostor_pairs"]
    assert theirs["TAR@FAR=1e-3"] == pytest.approx(ours.figures["tar@far=1e-3"].value, abs=1e-12)
    assert "TAR@FAR=1e-4" not in theirs  # neither reports a rate that the pairs cannot resolve
    assert ours.figures["tar@far=1e-4"].value is None


def test_their_accuracy_is_the_best_on_the_pairs_themselves(
    both: tuple[dict[str, Any], dict[str, Any], Result, Result],
) -> None:
    theirs, _, ours, _ = both
    scores = ours.scores[""]
    correct = [
        np.count_nonzero(scores.genuine >= threshold) + np.count_nonzero(scores.impostor < threshold)
        for threshold in np.concatenate([scores.genuine, scores.impostor])
    ]
    assert theirs["accuracy"] == pytest.approx(max(correct) / (len(scores.genuine) + len(scores.impostor)))
    assert "accuracy" not in ours.figures  # of pairs without folds


def test_an_image_without_a_face_raises_their_tar_and_lowers_ours(
    both: tuple[dict[str, Any], dict[str, Any], Result, Result],
) -> None:
    _, theirs, _, ours = both
    lost = SHOTS - 1
    assert (theirs["failed_pairs"], ours.facts["failures"]) == (PEOPLE * SHOTS - 1, 1)
    share = theirs["TAR@FAR=1e-3"]
    value, pairs = ours.figures["tar@far=1e-3"].value, ours.facts["genuine_pairs"]
    assert value == pytest.approx(share * (pairs - lost) / pairs)
