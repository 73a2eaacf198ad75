"""Procedural faces: pictures of people who do not exist, as a pure function of (seed, identity, shot).

A person is a point in a space of about 75 traits (face_model.py); a shot adds pose, expression, light, age, hairstyle,
glasses or a mask, and a camera. Every pixel is computed in closed form in plain PyTorch: a head whose radius is a sum
of bumps is met by rays (face_surface.py), painted (face_paint.py, face_hair.py, face_worn.py), lit (face_render.py)
and photographed (face_camera.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.data import face_camera, face_draws, face_paint, face_render
from partialfc.data.face_draws import GROUPS, group_of, jpeg_quality
from partialfc.data.face_settings import FaceSettings

__all__ = ["GROUPS", "FaceSettings", "Faces", "group_of", "jpeg_quality", "render_faces"]

# Pixels rendered at once: the dozens of intermediate planes then stay within a processor's cache.
_PIXELS_AT_ONCE = 1 << 16
_PIXELS_AT_ONCE_CUDA = 1 << 22


@dataclass(frozen=True)
class Faces:
    """A batch of pictures: `images` uint8 (B, S, S, 3) RGB, `landmarks` float32 (B, 5, 2), `groups` int64 (B,).

    Landmarks are pixels (x, y) in the order of the alignment template: image-left eye, image-right eye, nose tip,
    image-left and image-right corner of the mouth. They are exact, whatever the simulated detector saw.
    """

    images: Tensor
    landmarks: Tensor
    groups: Tensor


def render_faces(
    seed: int,
    identities: Tensor,
    shots: Tensor,
    *,
    size: int = 112,
    aligned: bool = True,
    settings: FaceSettings | None = None,
) -> Faces:
    """Pictures of people: a pure function of (seed, identity, shot), whatever else is in the batch.

    Args:
        seed: chooses the world: other people, other shots.
        identities: int64 (B,), at least 0; on the device that shall render.
        shots: int64 (B,), at least 0.
        size: side of the pictures in pixels, at least 16.
        aligned: landmarks as a detector would see them lie on the template of `align`; otherwise the whole head is in
            the picture and the returned landmarks allow alignment.
        settings: strengths of nuisances and identity (the defaults are those of the documentation).

    Raises:
        ValueError: shapes, dtypes or values do not fit.
    """
    if identities.dtype != torch.int64 or shots.dtype != torch.int64 or identities.ndim != 1:
        raise ValueError("identities and shots must be int64 tensors of one dimension")
    if identities.shape != shots.shape:
        raise ValueError(f"{len(identities)} identities do not fit {len(shots)} shots")
    if size < 16:
        raise ValueError(f"a face needs at least 16 pixels a side, not {size}")
    if len(identities) and int(torch.minimum(identities.min(), shots.min())) < 0:
        raise ValueError("identities and shots count from 0")
    settings = settings or FaceSettings()
    together = _PIXELS_AT_ONCE_CUDA if identities.is_cuda else _PIXELS_AT_ONCE
    step = max(1, together // size**2)
    images = torch.empty(len(identities), size, size, 3, dtype=torch.uint8, device=identities.device)
    landmarks = torch.empty(len(identities), 5, 2, device=identities.device)
    with torch.no_grad():
        for start in range(0, len(identities), step):
            part = slice(start, start + step)
            images[part], landmarks[part] = _render(seed, identities[part], shots[part], size, aligned, settings)
    return Faces(images, landmarks, group_of(identities))


def _render(
    seed: int, identities: Tensor, shots: Tensor, size: int, aligned: bool, settings: FaceSettings
) -> tuple[Tensor, Tensor]:
    traits = face_draws.draw_traits(seed, identities, settings)
    normal, uniform = face_draws.draw_shot(seed, identities, shots)
    moles = face_draws.draw_spots(seed, identities, face_paint.MOLES)
    measures, bumps, named = face_draws.measures_of(traits, normal, settings)
    measure, trait = face_render.column(measures), face_render.column(named)
    dice = face_render.column(normal) | face_render.column(uniform)
    surface = face_render.build_surface(measure, bumps, trait, dice, size, settings)
    camera = face_camera.make_camera(normal, settings)
    points = face_render.landmarks_of(surface, measure)
    flat = camera.project(points)
    keys = face_draws.shot_keys(seed, identities, shots)
    matrices = face_camera.frame(flat, keys, seed, size, settings, aligned)
    plane = face_camera.plane_of_pixels(matrices, size)
    light, tone = face_render.render_light(
        surface, camera, plane, measure, trait, normal, uniform, moles, points[:, 1], settings
    )
    images = face_camera.develop(light, tone, normal, uniform, settings)
    return images, face_camera.landmark_pixels(matrices, flat)
