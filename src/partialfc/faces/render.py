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

from partialfc.faces.draws import GROUPS, group_of, jpeg_quality, make_plan
from partialfc.faces.settings import FaceSettings
from partialfc.faces.shading import order_by_work, render_plan

__all__ = ["GROUPS", "FaceSettings", "Faces", "group_of", "jpeg_quality", "render_faces"]

# Pixels rendered at once: the dozens of intermediate planes then stay within a processor's cache.
_PIXELS_AT_ONCE = 1 << 16
_PIXELS_AT_ONCE_CUDA = 1 << 22
# Samples whose numbers are drawn at once.
_PLANNED_AT_ONCE = 4096
_ALLOCATOR_LESSON = 30 << 20  # bytes; glibc learns from blocks below 32 MiB


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
    # Freeing one large block teaches glibc's allocator to keep blocks up to that size instead of returning them to the
    # system; else every intermediate plane is paged in afresh, which takes longer than the arithmetic on it.
    torch.empty(_ALLOCATOR_LESSON, dtype=torch.uint8)
    with torch.no_grad():
        for start in range(0, len(identities), _PLANNED_AT_ONCE):
            planned = slice(start, start + _PLANNED_AT_ONCE)
            plan = make_plan(seed, identities[planned], shots[planned], settings)
            for chosen in order_by_work(plan, settings).split(step):
                pictures, points = render_plan(plan.part(chosen), seed, size, aligned, settings)
                images[start + chosen], landmarks[start + chosen] = pictures, points
    return Faces(images, landmarks, group_of(identities))
