"""Procedural faces: pure functions of their keys, landmarks where they are painted, settings that do what they say."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from partialfc.faces.draws import jpeg_quality, make_plan
from partialfc.faces.identity import BUMPS, MEASURES, MOODS, TRAITS
from torch import Tensor

from partialfc.data.align import align_faces, scaled_template
from partialfc.faces import draws, shading
from partialfc.faces.render import GROUPS, Faces, FaceSettings, group_of, render_faces

STILL = FaceSettings(
    yaw=0, pitch=0, roll=0, expression=0, age=0, hairstyle=0, lighting=0, white_balance=0, exposure=0, tone_curve=0,
    detector=0, blur=0, noise=0, glasses=0, mask=0,
)  # fmt: skip


def some(count: int, **options: object) -> Faces:
    numbers = torch.arange(count)
    return render_faces(5, numbers * 13, numbers % 3, **options)  # type: ignore[arg-type]


def test_shapes_types_and_groups() -> None:
    faces = some(9, size=64)
    assert faces.images.shape == (9, 64, 64, 3)
    assert faces.images.dtype == torch.uint8
    assert faces.landmarks.shape == (9, 5, 2)
    assert faces.landmarks.dtype == torch.float32
    assert faces.groups.dtype == torch.int64
    assert torch.equal(faces.groups, group_of(torch.arange(9) * 13))
    assert faces.images.is_contiguous()


def test_no_faces_are_fine() -> None:
    nobody = torch.empty(0, dtype=torch.int64)
    faces = render_faces(0, nobody, nobody, size=32)
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
    for place in (0, 11, 36):
        alone = render_faces(3, identities[place : place + 1], shots[place : place + 1], size=size)
        assert torch.equal(together.images[place], alone.images[0])
        assert torch.equal(together.landmarks[place], alone.landmarks[0])


def test_threads_change_nothing() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = some(20, size=64)
        torch.set_num_threads(2)
        two = some(20, size=64)
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


def test_large_numbers_are_people_too() -> None:
    identities = torch.tensor([2**62, 2**62 + 1, 2**40])
    images = render_faces(0, identities, torch.tensor([2**61, 0, 7]), size=32).images
    assert images.float().std() > 10
    assert not torch.equal(images[0], images[1])


def test_aligned_landmarks_lie_near_the_template() -> None:
    faces = some(64, size=112, settings=replace(FaceSettings(), yaw=0, pitch=0, detector=0))
    error = (faces.landmarks.double() - scaled_template(112)).square().sum(-1).sqrt()
    # Faces differ from the template in shape, but not in place, size and angle.
    assert error.mean() < 4.5
    assert (faces.landmarks.double().mean(1) - scaled_template(112).mean(0)).abs().max() < 1e-3


def test_detector_noise_moves_the_frame_and_the_landmarks_with_it() -> None:
    calm = some(16, size=64, settings=replace(FaceSettings(), detector=0))
    noisy = some(16, size=64, settings=replace(FaceSettings(), detector=0.1))
    assert (calm.landmarks - noisy.landmarks).abs().mean() > 0.2


def pupils_and_surroundings(images: Tensor, landmarks: Tensor) -> tuple[Tensor, Tensor]:
    """Mean brightness of 3 x 3 pixels at both eyes, and of a ring well outside the eye but on the face."""
    grey = images.float().mean(-1)
    inner, outer = [], []
    for picture, points in zip(grey, landmarks.round().long(), strict=True):
        for x, y in points[:2].tolist():
            inner.append(picture[y - 1 : y + 2, x - 1 : x + 2].mean())
            outer.append(picture[y + 14 : y + 18, x - 3 : x + 4].mean())
    return torch.stack(inner), torch.stack(outer)


@pytest.mark.parametrize("aligned", [True, False])
def test_landmarks_are_where_the_features_are(aligned: bool) -> None:
    settings = replace(STILL, yaw=18.0, pitch=6.0, roll=8.0, detector=0.03)
    numbers = torch.arange(40)
    size = 112 if aligned else 200
    faces = render_faces(0, numbers, numbers, size=size, aligned=aligned, settings=settings)
    eyes = faces.landmarks[:, :2]
    assert bool(((eyes > 4) & (eyes < size - 20)).all())
    pupil, cheek = pupils_and_surroundings(faces.images, faces.landmarks)
    assert (pupil < cheek).float().mean() > 0.85


def test_an_unaligned_picture_aligns_to_the_aligned_one() -> None:
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
    traits = make_plan(0, identities, identities, FaceSettings()).traits[:, : len(TRAITS)]
    means = torch.stack([traits[group_of(identities) == group].mean(0) for group in range(GROUPS)])
    assert means.std(0).mean() > 0.3
    # Within a group there is as much variety as without groups.
    assert traits[::GROUPS].std(0).min() > 0.85
    level = make_plan(0, identities, identities, replace(FaceSettings(), group_shift=0)).traits[:, : len(TRAITS)]
    assert torch.stack([level[group_of(identities) == group].mean(0) for group in range(GROUPS)]).std(0).max() < 0.15


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("identity_spread", 0.0), ("yaw", 0.0), ("pitch", 0.0), ("roll", 0.0), ("expression", 0.0), ("age", 0.0),
        ("hairstyle", 0.0), ("lighting", 0.0), ("white_balance", 0.0), ("exposure", 0.0), ("tone_curve", 0.0),
        ("detector", 0.0), ("blur", 0.0), ("noise", 0.0), ("glasses", 1.0), ("mask", 1.0), ("group_shift", 0.0),
    ],
)  # fmt: skip
def test_every_setting_is_felt(setting: str, value: float) -> None:
    usual = some(6, size=48)
    changed = some(6, size=48, settings=replace(FaceSettings(), **{setting: value}))
    assert (usual.images.float() - changed.images.float()).abs().mean() > 0.1


def test_jpeg_quality_is_keyed_and_stays_in_its_range() -> None:
    numbers = torch.arange(500)
    quality = jpeg_quality(0, numbers, numbers, FaceSettings(jpeg_quality=(75, 95)))
    assert int(quality.min()) == 75
    assert int(quality.max()) == 95
    assert torch.equal(quality[7:9], jpeg_quality(0, numbers[7:9], numbers[7:9], FaceSettings()))


def test_settings_are_documented_fields() -> None:
    assert len(fields(FaceSettings)) == len(set(fields(FaceSettings)))
    assert {field.name for field in fields(FaceSettings)} >= {"yaw", "lighting", "glasses", "jpeg_quality"}


def test_every_trait_is_visible() -> None:
    """Each trait moves some pixels at 64 x 64, and none of them most of what all move together."""
    plan = make_plan(0, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), STILL)
    bearded = torch.zeros(len(TRAITS))
    bearded[TRAITS.index("beard")] = 1.5

    def picture(traits: Tensor) -> Tensor:
        means, weights = draws._linear_map()
        moods = torch.zeros(len(traits), len(MOODS))
        inputs = torch.cat([traits, moods], dim=1).double()
        values = (means + inputs @ weights).float()
        count = len(traits)
        changed = draws.Plan(
            measures=values[:, : len(MEASURES)],
            traits=inputs.float(),
            bumps=values[:, len(MEASURES) :].view(count, len(BUMPS), 5),
            normals=torch.zeros_like(plan.normals).expand(count, -1),
            uniforms=torch.full_like(plan.uniforms, 0.5).expand(count, -1),
            moles=plan.moles.expand(count, -1, -1),
            keys=plan.keys.expand(count),
        )
        return shading.render_plan(changed, 0, 64, True, STILL)[0].float()

    ends = bearded + torch.cat([2 * torch.eye(len(TRAITS)), -2 * torch.eye(len(TRAITS))])
    up, down = picture(ends).chunk(2)
    change = (up - down).abs().amax(dim=(1, 2, 3))
    assert {name for name, value in zip(TRAITS, change.tolist(), strict=True) if value < 8} == set()
    overall = (up - down).abs().mean(dim=(1, 2, 3))
    share = overall / overall.sum()
    assert float(share.max()) < 0.25
    assert len(TRAITS) >= 40


def test_the_model_names_only_what_there_is() -> None:
    known = {*TRAITS, *MOODS}
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
def test_arguments_that_mean_nothing_are_refused(identities: Tensor, shots: Tensor, size: int, message: str) -> None:
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
