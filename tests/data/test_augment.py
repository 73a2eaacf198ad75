from __future__ import annotations

import pytest
import torch

from partialfc.data.augment import augment, normalise

IMAGES = torch.randint(0, 256, (64, 6, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
POSITIONS = torch.arange(64) * 1_000_003


def test_normalise_is_the_published_formula() -> None:
    expected = ((IMAGES.double() / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)
    result = normalise(IMAGES)
    assert result.dtype == torch.float32
    assert result.shape == (64, 3, 6, 6)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert (result - expected).abs().max() < 1e-6
    assert normalise(
        torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2, 1).expand(1, 1, 2, 3)
    ).unique().tolist() == [
        -1,
        1,
    ]


def test_input_stays_as_it_was() -> None:
    before = IMAGES.clone()
    augment(IMAGES, POSITIONS, seed=1)
    assert torch.equal(IMAGES, before)


def test_each_image_is_mirrored_or_not() -> None:
    plain, result = normalise(IMAGES), augment(IMAGES, POSITIONS, seed=1)
    mirrored = torch.tensor([torch.equal(result[n], plain[n].flip(-1)) for n in range(64)])
    straight = torch.tensor([torch.equal(result[n], plain[n]) for n in range(64)])
    assert torch.equal(mirrored, ~straight)
    assert 16 < mirrored.sum() < 48


def test_it_depends_on_seed_and_position_alone() -> None:
    whole = augment(IMAGES, POSITIONS, seed=1)
    rows = torch.tensor([40, 3, 3, 17])
    assert torch.equal(augment(IMAGES[rows], POSITIONS[rows], seed=1), whole[rows])
    assert not torch.equal(augment(IMAGES, POSITIONS, seed=2), whole)
    assert not torch.equal(augment(IMAGES, POSITIONS + 1, seed=1), whole)


def test_without_flip() -> None:
    assert torch.equal(augment(IMAGES, POSITIONS, seed=1, flip=False), normalise(IMAGES))


def test_empty_batches() -> None:
    assert augment(IMAGES[:0], POSITIONS[:0], seed=1).shape == (0, 3, 6, 6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_on_a_gpu() -> None:
    expected = augment(IMAGES, POSITIONS, seed=1)
    assert torch.allclose(augment(IMAGES.cuda(), POSITIONS, seed=1).cpu(), expected, atol=1e-6)
