"""The pair protocol: on embeddings against its description, on images at several world sizes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed_workers import run_ranks

from partialfc.backbones import create_backbone
from partialfc.core.errors import InputError
from partialfc.data.pair_files import PairSet
from partialfc.evaluation import pairs
from partialfc.evaluation.pairs import PairResult, embed_share, evaluate_pair_set, evaluate_pairs
from partialfc.model.config import ModelConfig
from partialfc.model.embed import embed
from partialfc.model.files import Model


def noisy_pairs(pairs: int = 200, dim: int = 16, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    is_same = np.arange(pairs) % 2 == 0
    left, other = generator.normal(size=(2, pairs, dim))
    right = np.where(is_same[:, None], left + noise * generator.normal(size=(pairs, dim)), other)
    return np.stack([left, right], axis=1).reshape(2 * pairs, dim), is_same


def test_result_follows_from_the_unit_embeddings() -> None:
    embeddings, is_same = noisy_pairs()
    result = evaluate_pairs(embeddings, is_same)
    left, right = embeddings[0::2], embeddings[1::2]
    cosines = (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)
    np.testing.assert_allclose(result.scores, cosines, rtol=1e-12)
    assert 0.7 < result.accuracy < 1.0
    above = cosines[is_same][:, None] > cosines[~is_same]
    assert result.auc == pytest.approx(above.mean())
    assert result.tar_at_far[0.1] >= result.tar_at_far[0.01] >= result.tar_at_far[0.001]
    # At the mean threshold, the whole set is decided about as well as the folds were.
    assert np.mean((cosines > result.cosine_threshold) == is_same) == pytest.approx(result.accuracy, abs=0.03)


def test_length_of_embeddings_and_their_container_do_not_matter() -> None:
    embeddings, is_same = noisy_pairs()
    scaled = embeddings * np.exp(np.random.default_rng(1).normal(size=(len(embeddings), 1)))
    as_array = evaluate_pairs(embeddings, is_same)
    as_tensor = evaluate_pairs(torch.from_numpy(scaled).requires_grad_(), torch.from_numpy(is_same).tolist())
    assert as_tensor.accuracy == as_array.accuracy
    assert as_tensor.tar_at_far == as_array.tar_at_far
    np.testing.assert_allclose(as_tensor.scores, as_array.scores, rtol=1e-12, atol=1e-12)


def test_summary_is_json_without_the_scores() -> None:
    summary = json.loads(json.dumps(evaluate_pairs(*noisy_pairs()).summary()))
    assert summary["pairs"] == 200
    assert set(summary["tar_at_far"]) == {"0.001", "0.01", "0.1"}
    assert "scores" not in summary


def test_wrong_input_is_refused() -> None:
    embeddings, is_same = noisy_pairs(20)
    broken = embeddings.copy()
    broken[7, 3], broken[9] = np.nan, np.inf
    with pytest.raises(InputError, match="2 of 40 embeddings hold NaN or infinity, first that of image 7"):
        evaluate_pairs(broken, is_same)
    with pytest.raises(InputError, match="39 embeddings do not make 20 pairs"):
        evaluate_pairs(embeddings[1:], is_same)
    with pytest.raises(InputError, match="6 pairs cannot be cut into 10 folds"):
        evaluate_pairs(embeddings[:12], is_same[:6])
    with pytest.raises(InputError, match="All 20 pairs are of one kind"):
        evaluate_pairs(embeddings, np.ones(20, dtype=bool))


def small_model() -> Model:
    config = ModelConfig("mini", embedding_dim=8, image_size=16)
    return Model(create_backbone("mini", embedding_dim=8, image_size=16), config)


def small_pairs(size: int = 16) -> PairSet:
    images = np.random.default_rng(0).integers(0, 256, (46, size, size, 3), dtype=np.uint8)
    images[1::4] = images[0::4] // 2 + 30
    return PairSet(images=images, is_same=np.arange(23) % 2 == 0)


def test_images_give_what_their_embeddings_give() -> None:
    model, pairs = small_model(), small_pairs()
    result = evaluate_pair_set(model, pairs, batch_size=10)
    expected = evaluate_pairs(embed(model, pairs.images, batch_size=10), pairs.is_same)
    np.testing.assert_array_equal(result.scores, expected.scores)
    assert result.summary() == expected.summary()
    assert evaluate_pair_set(model.with_flip(False), pairs).auc != result.auc


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(InputError, match="images are 32 × 32 pixels but the model takes 16 × 16"):
        evaluate_pair_set(small_model(), small_pairs(32))


def evaluate_on_rank(rank: int, folder: Path) -> None:
    result = evaluate_pair_set(small_model(), small_pairs(), batch_size=10)
    np.save(folder / f"scores-{rank}.npy", result.scores)


@pytest.mark.multiprocess
def test_result_is_identical_at_any_world_size(tmp_path: Path) -> None:
    """46 images in 5 batches over 3 ranks, the last batch incomplete: bit for bit what one process computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone: PairResult = evaluate_pair_set(small_model(), small_pairs(), batch_size=10)
    finally:
        torch.set_num_threads(threads)
    run_ranks(3, evaluate_on_rank, tmp_path)
    for rank in range(3):
        np.testing.assert_array_equal(np.load(tmp_path / f"scores-{rank}.npy"), alone.scores)


@pytest.mark.parametrize(
    ("images", "world_size", "batches"), [(40, 1, 5), (40, 2, 3), (40, 3, 2), (8, 3, 1), (9, 2, 1)]
)
def test_all_ranks_embed_equally_many_batches(
    images: int, world_size: int, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank with fewer batches of eight images yields empty ones at the end, so that all may communicate between."""
    pixels = np.random.default_rng(0).integers(0, 256, (images, 16, 16, 3), dtype=np.uint8)
    model = small_model()
    monkeypatch.setattr(pairs, "world_size_of", lambda: world_size)
    shares = []
    for rank in range(world_size):
        monkeypatch.setattr(pairs, "rank_of", lambda rank=rank: rank)
        shares.append(list(embed_share(model, pixels, batch_size=8)))
    assert [len(share) for share in shares] == [batches] * world_size
    together = torch.cat([batch for share in shares for batch in share])
    assert torch.equal(together, embed(model, pixels, batch_size=8))
