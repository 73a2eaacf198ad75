"""Each augmentation against what it says of itself, and the presets on batches."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from partialfc.config.options import DataConfig
from partialfc.data import augmentations
from partialfc.data.augment import augment, augmented_sheet, normalise
from partialfc.data.augmentations import PRESETS

POSITIONS = torch.arange(40) * 7919
OPERATIONS = sorted({operation for preset in PRESETS.values() for operation, _ in preset}, key=lambda one: one.__name__)


def smooth_images(count: int = 40, size: int = 32) -> Tensor:
    """uint8 (count, size, size, 3)."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    fine = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear", align_corners=True)
    return (255 * fine).to(torch.uint8).permute(0, 2, 3, 1)


def planes(count: int = 40, size: int = 32) -> Tensor:
    return smooth_images(count, size).permute(0, 3, 1, 2).float()


def constant(value: float, count: int) -> Callable[[str], Tensor]:
    return lambda _: torch.full((count,), value)


def random_draw(count: int, seed: int = 0) -> Callable[[str], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda _: torch.rand(count, generator=generator)


def test_the_configuration_names_the_presets() -> None:
    assert set(get_args(get_type_hints(DataConfig)["augment"])) == PRESETS.keys()


@pytest.mark.parametrize("size", [6, 30, 32])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: one.__name__)
def test_an_augmentation_keeps_shape_and_range(operation: augmentations.Augmentation, size: int) -> None:
    images = planes(50, size)
    for draw in (constant(0.0, 50), constant(1 - 2**-24, 50), random_draw(50)):
        result = operation(images, draw)
        assert result.shape == images.shape
        assert result.dtype == torch.float32
        assert result.min() >= -1e-3
        assert result.max() <= 255 + 1e-3
    assert not torch.equal(operation(images, random_draw(50)), images)


@pytest.mark.parametrize("preset", PRESETS)
def test_it_depends_on_seed_and_position_alone(preset: str) -> None:
    images = smooth_images()
    whole = augment(images, POSITIONS, seed=1, preset=preset)
    rows = torch.tensor([31, 3, 3, 17])
    torch.testing.assert_close(augment(images[rows], POSITIONS[rows], seed=1, preset=preset), whole[rows])
    assert not torch.equal(augment(images, POSITIONS, seed=2, preset=preset), whole)
    assert whole.is_contiguous(memory_format=torch.channels_last)


def test_about_a_fifth_is_cropped() -> None:
    images = torch.full((4000, 8, 8, 3), 200, dtype=torch.uint8)
    result = augment(images, torch.arange(4000), seed=1, flip=False, preset="strong")
    black = (result == -1).flatten(1).any(dim=1)
    assert 0.15 < black.float().mean() < 0.22  # crops of the whole image leave nothing black
    assert 0.3 < (result == normalise(images)).flatten(1).all(dim=1).float().mean() < 0.8


def test_a_crop_is_a_box_of_the_area_drawn() -> None:
    inside = augmentations.crop(torch.ones(500, 3, 64, 64), random_draw(500))[:, 0]
    rows, columns = inside.amax(dim=2).sum(dim=1), inside.amax(dim=1).sum(dim=1)
    assert torch.equal(inside.sum(dim=(1, 2)), rows * columns)
    share = rows * columns / 64**2
    assert share.min() > 0.17
    assert share.max() > 0.9
    assert 0.5 < (rows / columns).min() < 0.85
    assert 1.15 < (rows / columns).max() < 1.5  # a box is cut off at the size of the image


def test_low_resolution_loses_detail_and_keeps_the_mean() -> None:
    noise = 255 * torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    result = augmentations.low_resolution(noise, constant(0.0, 20))
    assert (result.mean(dim=(1, 2, 3)) - noise.mean(dim=(1, 2, 3))).abs().max() < 5
    assert (result.std(dim=(2, 3)) < 0.4 * noise.std(dim=(2, 3))).all()
    torch.testing.assert_close(augmentations.low_resolution(noise, constant(1 - 2**-24, 20)), noise)


def test_blur_of_a_point_is_a_gaussian() -> None:
    point = torch.zeros(1, 3, 65, 65)
    point[..., 32, 32] = 255
    spread = augmentations.blur(point, constant(1.0, 1))[0, 0]
    deviation = 65 * 0.025
    expected = torch.exp(-0.5 * ((torch.arange(65) - 32) / deviation) ** 2)
    torch.testing.assert_close(spread[32] / spread[32, 32], expected, atol=1e-4, rtol=1e-3)
    assert spread.sum() == pytest.approx(255, rel=1e-4)


def test_compression_is_that_of_pillow() -> None:
    images = planes(1, 64)
    noisy = (images + 20 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255).round()
    ours = augmentations.compress(noisy, constant(0.5, 1))[0].permute(1, 2, 0).numpy()  # quality 50
    stream = io.BytesIO()
    pixels = noisy[0].permute(1, 2, 0).numpy().astype(np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG", quality=50, subsampling=0)
    theirs = np.asarray(Image.open(stream), dtype=np.float32)
    # libjpeg rounds to integers in between, which moves some coefficients by a step.
    assert np.abs(ours - theirs).mean() < 0.2 * np.abs(theirs - pixels).mean()


def test_grey_has_equal_channels_and_photometric_neutral_factors_change_nothing() -> None:
    images = planes()
    grey = augmentations.grey(images, constant(0.5, 40))
    assert torch.equal(grey[:, 0], grey[:, 2])
    torch.testing.assert_close(augmentations.photometric(images, constant(0.5, 40)), images)


def test_a_mask_covers_the_mouth_and_leaves_the_eyes() -> None:
    images = torch.zeros(100, 3, 112, 112)
    covered = augmentations.wear_mask(images, random_draw(100)).sum(dim=1) > 0
    for x, y in ((38, 52), (74, 51)):
        assert not covered[:, y, x].any()
    for x, y in ((42, 92), (56, 92), (71, 92), (56, 80)):
        assert covered[:, y, x].all()
    assert 0.15 < covered.float().mean() < 0.45


def test_a_sheet_shows_the_images_and_what_each_preset_makes_of_them() -> None:
    images = smooth_images(5)
    sheet = augmented_sheet(images, 0, flip=False, rows=2)
    assert sheet.shape == (32 * (1 + 2 * (len(PRESETS) - 1)), 32 * 5, 3)
    assert torch.equal(sheet[:32, 32:64], images[1])
    shown = augment(images, torch.arange(5) + 5, 0, flip=False, preset="strong")[2]
    assert (shown.add(1).mul(127.5).permute(1, 2, 0) - sheet[64:96, 64:96]).abs().max() <= 0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("preset", PRESETS)
def test_the_same_on_a_gpu(preset: str) -> None:
    images = smooth_images()
    expected = augment(images, POSITIONS, seed=1, preset=preset)
    torch.testing.assert_close(
        augment(images.cuda(), POSITIONS, seed=1, preset=preset).cpu(), expected, atol=0.02, rtol=0
    )
