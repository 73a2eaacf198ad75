"""Procedural faces: pure functions of their keys, exact landmarks, visible traits and settings."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from partialfc.data.align import align_faces, scaled_template
from partialfc.faces.parameters import GROUPS, draw_parameters, group_of, jpeg_quality
from partialfc.faces.render import Faces, render_faces, render_parameters
from partialfc.faces.settings import FaceSettings
from partialfc.faces.traits import BUMPS, EXPRESSIONS, MEASURES, TRAITS

STILL = FaceSettings(
    yaw=0, pitch=0, roll=0, expression=0, age=0, hairstyle=0, lighting=0, white_balance=0, exposure=0, tone_curve=0,
    detector=0, blur=0, noise=0, glasses=0, mask=0,
)  # fmt: skip


def some(count: int, **options: Any) -> Faces:
    numbers = torch.arange(count)
    return render_faces(5, numbers * 13, numbers % 3, **options)


def test_shapes_types_and_groups() -> None:
    faces = some(9, size=64)
    assert faces.images.shape == (9, 64, 64, 3)
    assert faces.images.dtype == torch.uint8
    assert faces.landmarks.shape == (9, 5, 2)
    assert faces.landmarks.dtype == torch.float32
    assert faces.groups.dtype == torch.int64
    assert torch.equal(faces.groups, group_of(torch.arange(9) * 13))
    assert faces.images.is_contiguous()


def test_an_empty_batch() -> None:
    none = torch.empty(0, dtype=torch.int64)
    faces = render_faces(0, none, none, size=32)
    assert faces.images.shape == (0, 32, 32, 3)
    assert faces.landmarks.shape == (0, 5, 2)


@pytest.mark.parametrize("size", [48, 64])
def test_a_face_does_not_depend_on_its_batch(size: int) -> None:
    identities, shots = torch.arange(37) * 7, torch.arange(37) % 5
    together = render_faces(3, identities, shots, size=size)
    order = torch.arange(36, -1, -1)
    backwards = render_faces(3, identities[order], shots[order], size=size)
    assert torch.equal(together.images[order], backwards.images)
    assert torch.equal(together.landmarks[order], backwards.landmarks)
    for row in (0, 11, 36):
        alone = render_faces(3, identities[row : row + 1], shots[row : row + 1], size=size)
        assert torch.equal(together.images[row], alone.images[0])
        assert torch.equal(together.landmarks[row], alone.landmarks[0])


def test_threads_change_nothing() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = some(16, size=64)
        torch.set_num_threads(2)
        two = some(16, size=64)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.images, two.images)


def test_seed_identity_and_shot_each_matter() -> None:
    identity, shot = torch.tensor([4]), torch.tensor([1])
    first = render_faces(0, identity, shot, size=32).images
    for other in (
        render_faces(1, identity, shot, size=32),
        render_faces(0, identity + 4, shot, size=32),
        render_faces(0, identity, shot + 1, size=32),
    ):
        assert (first.float() - other.images.float()).abs().mean() > 2


def test_large_numbers_are_identities_too() -> None:
    identities = torch.tensor([2**62, 2**62 + 1, 2**40])
    images = render_faces(0, identities, torch.tensor([2**61, 0, 7]), size=32).images
    assert images.float().std() > 10
    assert not torch.equal(images[0], images[1])


def test_aligned_landmarks_lie_near_the_template() -> None:
    faces = some(64, size=112, settings=replace(FaceSettings(), yaw=0, pitch=0, detector=0))
    error = (faces.landmarks.double() - scaled_template(112)).square().sum(-1).sqrt()
    # Faces differ from the template in shape, but not in position, size and angle.
    assert error.mean() < 4.5
    assert (faces.landmarks.double().mean(1) - scaled_template(112).mean(0)).abs().max() < 1e-3


def test_detector_noise_moves_the_frame_and_the_landmarks_with_it() -> None:
    calm = some(16, size=64, settings=replace(FaceSettings(), detector=0))
    noisy = some(16, size=64, settings=replace(FaceSettings(), detector=0.1))
    assert (calm.landmarks - noisy.landmarks).abs().mean() > 0.2


def pupils_and_cheeks(images: Tensor, landmarks: Tensor) -> tuple[Tensor, Tensor]:
    """Mean brightness of 3 x 3 pixels at both eyes, and of a ring well outside the eye but on the face."""
    grey = images.float().mean(-1)
    inner, outer = [], []
    for image, points in zip(grey, landmarks.round().long(), strict=True):
        for x, y in points[:2].tolist():
            inner.append(image[y - 1 : y + 2, x - 1 : x + 2].mean())
            outer.append(image[y + 14 : y + 18, x - 3 : x + 4].mean())
    return torch.stack(inner), torch.stack(outer)


@pytest.mark.parametrize("aligned", [True, False])
def test_landmarks_are_where_the_features_are(aligned: bool) -> None:
    settings = replace(STILL, yaw=18.0, pitch=6.0, roll=8.0, detector=0.03)
    numbers = torch.arange(20)
    size = 112 if aligned else 200
    faces = render_faces(0, numbers, numbers, size=size, aligned=aligned, settings=settings)
    eyes = faces.landmarks[:, :2]
    assert bool(((eyes > 4) & (eyes < size - 20)).all())
    pupil, cheek = pupils_and_cheeks(faces.images, faces.landmarks)
    assert (pupil < cheek).float().mean() > 0.85


def test_an_unaligned_image_aligns_to_the_aligned_one() -> None:
    settings = replace(STILL, yaw=15.0, pitch=5.0)
    numbers = torch.arange(8)
    direct = render_faces(0, numbers, numbers, size=96, settings=settings)
    loose = render_faces(0, numbers, numbers, size=288, aligned=False, settings=settings)
    assert (direct.landmarks - loose.landmarks).abs().mean() > 10
    aligned = align_faces(loose.images, loose.landmarks, size=96)
    assert (aligned.float() - direct.images.float()).abs().mean() < 6


def test_groups_are_balanced_and_shift_the_traits() -> None:
    identities = torch.arange(4000)
    assert torch.bincount(group_of(identities)).tolist() == [1000] * GROUPS
    traits = draw_parameters(0, identities, identities, FaceSettings()).traits[:, : len(TRAITS)]
    means = torch.stack([traits[group_of(identities) == group].mean(0) for group in range(GROUPS)])
    assert means.std(0).mean() > 0.3
    # Within a group there is as much variety as without groups.
    assert traits[::GROUPS].std(0).min() > 0.85
    level = draw_parameters(0, identities, identities, replace(FaceSettings(), group_shift=0)).traits[:, : len(TRAITS)]
    assert torch.stack([level[group_of(identities) == group].mean(0) for group in range(GROUPS)]).std(0).max() < 0.15


@pytest.mark.parametrize("setting", [field.name for field in fields(FaceSettings) if field.name != "jpeg_quality"])
def test_every_setting_is_felt(setting: str) -> None:
    on = {"glasses": 1.0, "mask": 1.0, "turn": 30.0, "accessory_sets": 1, "scenes": 1, "shifts": (("age", 3.0),)}
    change: dict[str, Any] = {setting: on.get(setting, 0.0)}
    usual = some(6, size=48)
    changed = some(6, size=48, settings=replace(FaceSettings(), **change))
    assert (usual.images.float() - changed.images.float()).abs().mean() > 0.1


def test_jpeg_quality_is_keyed_and_stays_in_its_range() -> None:
    numbers = torch.arange(500)
    quality = jpeg_quality(0, numbers, numbers, FaceSettings(jpeg_quality=(75, 95)))
    assert int(quality.min()) == 75
    assert int(quality.max()) == 95
    assert torch.equal(quality[7:9], jpeg_quality(0, numbers[7:9], numbers[7:9], FaceSettings()))


def test_every_trait_is_visible() -> None:
    """Each trait moves some pixels at 64 x 64, and none of them most of what all move together."""
    ends = torch.zeros(2 * len(TRAITS), len(TRAITS) + len(EXPRESSIONS), dtype=torch.float64)
    ends[:, TRAITS.index("beard")] = 1.5
    ends[: len(TRAITS), : len(TRAITS)] += 2 * torch.eye(len(TRAITS))
    ends[len(TRAITS) :, : len(TRAITS)] -= 2 * torch.eye(len(TRAITS))
    zeros = torch.zeros(len(ends), dtype=torch.int64)
    drawn = draw_parameters(0, zeros, zeros, STILL)
    neutral = drawn._replace(
        traits=ends, normals=torch.zeros_like(drawn.normals), uniforms=torch.full_like(drawn.uniforms, 0.5)
    )
    up, down = render_parameters(neutral, 0, 64, True, STILL)[0].float().chunk(2)
    change = (up - down).abs()
    largest = dict(zip(TRAITS, change.amax(dim=(1, 2, 3)).tolist(), strict=True))
    assert {name for name, value in largest.items() if value < 8} == set()
    overall = change.mean(dim=(1, 2, 3))
    assert float((overall / overall.sum()).max()) < 0.25


def test_the_model_uses_only_known_names() -> None:
    known = {*TRAITS, *EXPRESSIONS}
    for _, terms in MEASURES.values():
        assert set(terms) <= known
    for bump in BUMPS.values():
        assert set(bump.by) <= known
        assert all(len(terms) == 5 for terms in bump.by.values())


@pytest.mark.parametrize(
    ("identities", "shots", "size", "message"),
    [
        (torch.zeros(2), torch.zeros(2), 64, "int64"),
        (torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64), 64, "one dimension"),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), 64, "do not fit"),
        (torch.tensor([-1]), torch.tensor([0]), 64, "count from 0"),
        (torch.tensor([0]), torch.tensor([-1]), 64, "count from 0"),
        (torch.tensor([0]), torch.tensor([0]), 8, "at least 16"),
    ],
)
def test_invalid_arguments_are_refused(identities: Tensor, shots: Tensor, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render_faces(0, identities, shots, size=size)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_the_same_faces() -> None:
    numbers = torch.arange(64)
    on_cpu = render_faces(0, numbers, numbers, size=64)
    on_gpu = render_faces(0, numbers.cuda(), numbers.cuda(), size=64)
    difference = (on_cpu.images.float() - on_gpu.images.cpu().float()).abs()
    assert float((difference > 2).float().mean()) < 0.01
    assert torch.allclose(on_cpu.landmarks, on_gpu.landmarks.cpu(), atol=0.02)
