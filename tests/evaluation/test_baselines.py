"""The baselines are what their names say: blind to what they should not see, sharp where they should be."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from partialfc.evaluation.baselines import color_embeddings, pixel_embeddings
from partialfc.evaluation.pairs import evaluate_pairs


def noise(count: int, size: int = 48, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, size // 8, size // 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)


def test_pixels_ignore_brightness_and_contrast() -> None:
    images = noise(4)
    darker = (images // 2 + 20).astype(np.uint8)
    cosines = F.cosine_similarity(pixel_embeddings(images), pixel_embeddings(darker))
    assert float(cosines.min()) > 0.99


def test_pixels_tell_images_apart_and_find_them_again() -> None:
    images = noise(20)
    again = np.clip(images.astype(int) + np.random.default_rng(1).integers(-20, 20, images.shape), 0, 255)
    cosines = F.normalize(pixel_embeddings(images)) @ F.normalize(pixel_embeddings(again.astype(np.uint8))).T
    assert torch.equal(cosines.argmax(1), torch.arange(20))


def test_a_flat_image_has_a_finite_embedding() -> None:
    flat = np.full((2, 48, 48, 3), 77, dtype=np.uint8)
    assert bool((pixel_embeddings(flat) == 0).all())
    assert bool((color_embeddings(flat) == 0).all())


def test_colors_ignore_where_a_pixel_is() -> None:
    images = noise(3)
    shuffled = images.reshape(3, -1, 3)[:, np.random.default_rng(2).permutation(48 * 48)].reshape(images.shape)
    assert torch.allclose(color_embeddings(images), color_embeddings(shuffled), atol=1e-6)


def test_colors_tell_red_from_blue_and_near_shades_from_far_ones() -> None:
    tints = np.zeros((4, 16, 16, 3), dtype=np.uint8)
    tints[0, ..., 0], tints[1, ..., 0], tints[2, ..., 2], tints[3, ..., 2] = 200, 201, 200, 201
    unit = F.normalize(color_embeddings(tints))
    cosines = unit @ unit.T
    assert cosines[0, 1] > 0.9 > cosines[0, 2]
    assert cosines[2, 3] > 0.9 > cosines[1, 3]


def test_many_images_give_what_each_gives_alone() -> None:
    images = noise(600, size=16)
    together = pixel_embeddings(images)
    assert torch.allclose(together[590:], pixel_embeddings(images[590:]), atol=1e-5)
    colors, alone = color_embeddings(images), color_embeddings(images[590:])
    assert colors.shape == (600, 512)
    assert torch.allclose(colors[590:] - colors[590], alone - alone[0], atol=1e-5)  # but for the mean that each lacks


def test_both_pass_through_the_protocol() -> None:
    people = noise(40)
    images = np.repeat(people, 2, axis=0)
    images[1::4] = people[np.roll(np.arange(40), 7)][::2]
    is_same = np.arange(40) % 2 == 1
    for embeddings in (pixel_embeddings(images), color_embeddings(images)):
        assert evaluate_pairs(embeddings, is_same).accuracy == pytest.approx(1.0)
