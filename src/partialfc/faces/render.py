"""Rendering: from (seed, identity, shot) to images, in closed form and plain PyTorch.

The parameters of an image give a head whose radius is a sum of bumps. Rays intersect it, the visible surface is painted
and lit, and the camera develops the light into pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from partialfc.core import keyed_random
from partialfc.core.keyed_random import derive_key
from partialfc.data.align import transform_points
from partialfc.faces import accessories, geometry, hair, paint
from partialfc.faces.background import paint_background
from partialfc.faces.camera import develop, framing, make_camera, pixels_on_plane
from partialfc.faces.lighting import make_lighting, shade
from partialfc.faces.parameters import FaceParameters, draw_parameters, group_of
from partialfc.faces.settings import FaceSettings
from partialfc.faces.traits import EXPRESSIONS, TRAITS, Named, by_name, flat, shape_of

# Pixels rendered at once: the dozens of intermediate planes then stay within a processor's cache.
_PIXELS_AT_ONCE = 1 << 16
_PIXELS_AT_ONCE_CUDA = 1 << 22
_IMAGES_DRAWN_AT_ONCE = 4096
_ALLOCATOR_THRESHOLD = 30 << 20  # bytes; glibc adapts to blocks below 32 MiB
_PATTERN_SIZE = 128
_MAP_POINTS_PER_PIXEL = 1.25
# The throat and the middle of the back of the head, in head coordinates.
_NECK = ((0.0, 0.75, -0.15), (0.0, 0.0, -0.2))


@dataclass(frozen=True)
class Faces:
    """A batch of rendered faces.

    Attributes:
        images: uint8 (B, S, S, 3), RGB.
        landmarks: float32 (B, 5, 2), exact pixels (x, y) in the order of the alignment template: image-left eye,
            image-right eye, nose tip, image-left and image-right corner of the mouth.
        groups: int64 (B,).
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
    """Images of procedural identities: a pure function of (seed, identity, shot), whatever else is in the batch.

    Args:
        seed: another seed gives other identities and other images of them.
        identities: int64 (B,), at least 0, on the device that renders.
        shots: int64 (B,), at least 0: the number of each image among those of its identity.
        size: side of the images in pixels, at least 16.
        aligned: True aligns the faces to the template of `align` by the landmarks of a simulated detector. False
            frames the whole head loosely; the returned landmarks allow alignment.
        settings: strengths of the nuisances and spread of the identities, by default those of the documentation.

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
    images = torch.empty(len(identities), size, size, 3, dtype=torch.uint8, device=identities.device)
    landmarks = torch.empty(len(identities), 5, 2, device=identities.device)
    # Freeing one large block makes glibc keep later blocks up to that size instead of returning them to the system;
    # otherwise every intermediate plane is paged in anew, which takes longer than the arithmetic on it.
    torch.empty(_ALLOCATOR_THRESHOLD, dtype=torch.uint8)
    step = max(1, (_PIXELS_AT_ONCE_CUDA if identities.is_cuda else _PIXELS_AT_ONCE) // size**2)
    with torch.no_grad():
        for start in range(0, len(identities), _IMAGES_DRAWN_AT_ONCE):
            drawn = slice(start, start + _IMAGES_DRAWN_AT_ONCE)
            parameters = draw_parameters(seed, identities[drawn], shots[drawn], settings)
            # Images with the same accessories are rendered together, so that most batches need neither.
            nuisance = flat(parameters.nuisances(settings))
            for rows in torch.argsort(2 * nuisance["mask"] + nuisance["glasses"], stable=True).split(step):
                images[start + rows], landmarks[start + rows] = render_parameters(
                    FaceParameters(*(values[rows] for values in parameters)), seed, size, aligned, settings
                )
    return Faces(images, landmarks, group_of(identities))


def render_parameters(
    parameters: FaceParameters, seed: int, size: int, aligned: bool, settings: FaceSettings
) -> tuple[Tensor, Tensor]:
    """Images, uint8 (N, S, S, 3), and their landmarks in pixels, float32 (N, 5, 2), all at once.

    Args:
        parameters: N images' parameters.
        seed, size, aligned, settings: as for `render_faces`.
    """
    nuisance = parameters.nuisances(settings)
    trait = by_name(parameters.traits.float(), (*TRAITS, *EXPRESSIONS))
    measure, bumps = shape_of(parameters.traits)
    surface = _build_surface(bumps, size, measure, trait, nuisance)
    camera = make_camera(flat(nuisance), settings)
    landmarks = _landmarks_of(surface, measure)
    projected = camera.project(landmarks)
    matrices = framing(projected, parameters.keys, seed, size, settings, aligned)
    x, y, pixel = pixels_on_plane(matrices, size)
    ray = camera.rays(x, y)
    a, b, coverage = geometry.intersect(surface, camera.origin(), ray, pixel)
    canvas, in_hair = _paint_head(a, b, 0.72 / pixel, measure, trait, nuisance, parameters.moles)
    lighting = make_lighting(camera, flat(nuisance), settings)
    normals = geometry.sample_map(geometry.normals_of(surface), a, b)
    exposure = geometry.sample_map(geometry.occlusion_and_shadow(surface, lighting.towards), a, b)
    gloss = 0.10 - 0.08 * (in_hair * 20).clamp(0, 1)
    head = shade(canvas.albedo, gloss, normals, exposure, camera, lighting)
    neck = camera.project(torch.tensor([_NECK], device=pixel.device).expand(len(pixel), -1, -1))
    typical = lighting.colour * 0.42 + lighting.ambient * 0.55
    pattern = _pattern(pixel.device)
    light = paint_background(x, y, neck, pattern, nuisance, trait, canvas.skin * typical, canvas.hair * typical)
    light = torch.lerp(light, head, coverage[:, None])
    if bool(nuisance["glasses"].any()):
        accessories.paint_glasses(light, camera, ray, pixel, landmarks, nuisance)
    image = develop(light, canvas.skin.mean(1), flat(nuisance), settings)
    return image, transform_points(matrices, projected).float()


@lru_cache(maxsize=4)
def _pattern(device: torch.device) -> Tensor:
    """Three fixed patterns (1, 3, S, S) of unit deviation: broad clouds, fine grain, strands along the second axis."""
    size = _PATTERN_SIZE
    white = keyed_random.normal(derive_key("face pattern"), torch.arange(3 * size * size)).view(1, 3, size, size)

    def smooth(plane: Tensor, down: float, across: float) -> Tensor:
        for deviation, dim in ((down, 2), (across, 3)):
            reach = max(1, round(3 * deviation))
            taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / deviation) ** 2)
            smoothed = torch.zeros_like(plane)
            for shift, weight in zip(range(-reach, reach + 1), taps, strict=True):
                smoothed = smoothed + weight * plane.roll(shift, dim)
            plane = smoothed
        return plane / plane.std()

    broad = smooth(white[:, :1], 7, 7) + 0.5 * smooth(white[:, 1:2], 3, 3)
    fine = smooth(white[:, 1:2], 0.8, 0.8)
    strands = smooth(white[:, 2:], 14, 0.9) + 0.5 * smooth(white[:, :1], 20, 3)
    return torch.cat([broad / broad.std(), fine, strands / strands.std()], dim=1).float().to(device)


def _build_surface(bumps: Tensor, size: int, measure: Named, trait: Named, nuisance: Named) -> geometry.Surface:
    """The heads with hair and mask, on maps for images of `size` pixels."""
    a = geometry.map_axis(2 * round(size * _MAP_POINTS_PER_PIXEL / 2), bumps.device)
    b = a[:, None]
    bumps = bumps.clone()
    bumps[:, :, 2:4].clamp_(min=0.02)
    factor = geometry.sum_of_bumps(bumps, a).add_(1)
    if bool(nuisance["mask"].any()):
        covered = (accessories.mask_distance(a, b, measure, nuisance) * 20 + 0.5).clamp(0, 1) * nuisance["mask"]
        factor = torch.lerp(factor, torch.maximum(factor, accessories.mask_factor(a, b)), covered)
    distance = hair.hair_distance(a, b, measure, trait, nuisance)
    factor = factor.add_(hair.hair_height(distance, b, measure, trait, nuisance))
    radii = torch.cat([measure[name][:, 0] for name in ("radius_x", "radius_y", "radius_z")], dim=1)
    return geometry.Surface(radii, factor[:, None])


def _landmarks_of(surface: geometry.Surface, measure: Named) -> Tensor:
    """The five landmarks in head coordinates (N, 5, 3): eyes, nose tip, mouth corners, image-left ones first."""
    m = flat(measure)
    corner = m["mouth_b"] + m["mouth_curve"]
    a = torch.stack([-m["eye_a"], m["eye_a"], torch.zeros_like(corner), -m["mouth_width"], m["mouth_width"]], dim=1)
    b = torch.stack([m["eye_b"], m["eye_b"], m["nose_b"], corner, corner], dim=1)
    skew = m["skew"][:, None]
    b = b - a.new_tensor([1.0, 1.0, 0.0, 1.0, 1.0]) * skew * a
    # The face is painted at a minus this lean (see _paint_head).
    lean = 0.4 * skew * (b - 0.2)
    return geometry.points_at(surface, a + lean, b)


def _paint_head(
    a: Tensor, b: Tensor, edge: Tensor, measure: Named, trait: Named, nuisance: Named, moles: Tensor
) -> tuple[paint.Canvas, Tensor]:
    """The painted head, and how deep in the hair each pixel lies (N, H, W)."""
    pattern = _pattern(a.device).expand(len(a), -1, -1, -1)
    skin_a, skin_b = a * 0.9 + 1.3 * trait["freckle"], b * 0.9 + 1.3 * trait["skin_warm"]
    # Strands fan out from the parting at the top of the head.
    across_strands = (a - 0.25 * trait["hair_part"]) / (b + 2.2) * 2.6 + nuisance["hair_noise"]
    canvas = paint.Canvas(
        a=a - measure["skew"] * 0.4 * (b - 0.2),
        b=b,
        edge=edge,
        measure=measure,
        trait=trait,
        nuisance=nuisance,
        skin_noise=geometry.sample_pattern(pattern[:, :2], skin_a, skin_b),
        strands=geometry.sample_pattern(pattern[:, 2:], across_strands, b * 0.5)[:, 0],
        skin=paint.skin_colour(flat(trait)),
        hair=paint.hair_colour(flat(trait), nuisance["hair_tone"][:, 0, 0]),
        albedo=torch.empty(len(a), 3, *a.shape[1:], device=a.device),
    )
    paint.paint_face(canvas, moles)
    distance = hair.hair_distance(a, b, measure, trait, nuisance)
    hair.paint_hair(canvas, distance)
    # Coverage 0 changes no bit, so that accessories are painted only in batches with some.
    for name, paint_on in (("glasses", accessories.paint_temples), ("mask", accessories.paint_mask)):
        if bool(nuisance[name].any()):
            paint_on(canvas)
    return canvas, distance
