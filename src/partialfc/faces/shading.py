"""From the plan of a batch of shots to its pictures: surface, rays, paint, light, photograph."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from partialfc.core import keyed_random
from partialfc.core.keyed_random import derive_key
from partialfc.faces import camera as face_camera
from partialfc.faces import hair as face_hair
from partialfc.faces import light as face_light
from partialfc.faces import paint as face_paint
from partialfc.faces import scene as face_scene
from partialfc.faces import surface as face_surface
from partialfc.faces import worn as face_worn
from partialfc.faces.draws import Draws, Plan
from partialfc.faces.settings import FaceSettings

_NOISE_SIZE = 128
_MAP_PER_PIXEL = 1.25
# The throat and the middle of the back of the head, in head coordinates.
_NECK = ((0.0, 0.75, -0.15), (0.0, 0.0, -0.2))


@dataclass(frozen=True)
class Shoot:
    """A batch on its way to pictures: numbers by name as (N, 1, 1), the heads, the camera, and its framing."""

    measure: Draws
    trait: Draws
    jitter: Draws
    shot: Draws
    moles: Tensor
    surface: face_surface.Surface
    camera: face_camera.Camera
    landmarks: Tensor
    settings: FaceSettings

    def wears(self, name: str) -> Tensor:
        """1 where the shot wears `name` ("glasses" or "mask"), else 0: (N, 1, 1)."""
        return face_worn.wears(self.jitter, name, self.settings)


@lru_cache(maxsize=4)
def _pattern(device: torch.device) -> Tensor:
    """Three fixed patterns (1, 3, S, S) of unit deviation: broad clouds, fine grain, strands along the second axis."""
    size = _NOISE_SIZE
    white = keyed_random.normal(derive_key("face pattern"), torch.arange(3 * size * size)).view(1, 3, size, size)

    def smooth(plane: Tensor, down: float, across: float) -> Tensor:
        for deviation, dim in ((down, 2), (across, 3)):
            reach = max(1, round(3 * deviation))
            taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / deviation) ** 2)
            plane = sum(
                (
                    weight * plane.roll(int(shift), dim)
                    for shift, weight in zip(range(-reach, reach + 1), taps, strict=True)
                ),
                torch.zeros_like(plane),
            )
        return plane / plane.std()

    broad = smooth(white[:, :1], 7, 7) + 0.5 * smooth(white[:, 1:2], 3, 3)
    fine = smooth(white[:, 1:2], 0.8, 0.8)
    strands = smooth(white[:, 2:], 14, 0.9) + 0.5 * smooth(white[:, :1], 20, 3)
    return torch.cat([broad / broad.std(), fine, strands / strands.std()], dim=1).float().to(device)


def render_plan(plan: Plan, seed: int, size: int, aligned: bool, settings: FaceSettings) -> tuple[Tensor, Tensor]:
    """Pictures, uint8 (N, S, S, 3), and the pixels of their landmarks, float32 (N, 5, 2)."""
    measure, trait, jitter, shot = plan.measure_columns(), plan.trait_columns(), plan.shot_columns(), plan.shot()
    surface = _build_surface(plan.bumps, measure, trait, jitter, size, settings)
    camera = face_camera.make_camera(shot, settings)
    landmarks = _landmarks_of(surface, measure)
    shoot = Shoot(measure, trait, jitter, shot, plan.moles, surface, camera, landmarks, settings)
    flat = camera.project(landmarks)
    matrices = face_camera.frame(flat, plan.keys, seed, size, settings, aligned)
    light, tone = _render_light(shoot, *face_camera.plane_of_pixels(matrices, size))
    return face_camera.develop(light, tone, shot, settings), face_camera.landmark_pixels(matrices, flat)


def _build_surface(
    bumps: Tensor, measure: Draws, trait: Draws, jitter: Draws, size: int, settings: FaceSettings
) -> face_surface.Surface:
    """The heads of a batch, hair and mask included, on maps fit for pictures of `size` pixels."""
    steps = face_surface.map_steps(2 * round(size * _MAP_PER_PIXEL / 2), bumps.device)
    safe = bumps.clone()
    safe[:, :, 2:4].clamp_(min=0.02)
    factor = face_surface.sum_of_bumps(safe, steps).add_(1)
    b = steps[:, None]
    worn = face_worn.wears(jitter, "mask", settings)
    if bool(worn.any()):
        covered = (face_worn.mask_distance(steps, b, measure, jitter) * 20 + 0.5).clamp(0, 1) * worn
        factor = torch.lerp(factor, torch.maximum(factor, face_worn.mask_factor(steps, b)), covered)
    distance = face_hair.hair_distance(steps, b, measure, trait, jitter)
    factor = factor.add_(face_hair.hair_height(distance, b, measure, trait, jitter))
    radii = torch.cat([measure[name][:, 0] for name in ("radius_x", "radius_y", "radius_z")], dim=1)
    return face_surface.Surface(radii, factor[:, None])


def _landmarks_of(surface: face_surface.Surface, measure: Draws) -> Tensor:
    """The five landmarks in head coordinates (N, 5, 3): eyes, nose tip, mouth corners, image-left ones first."""
    eye_a, eye_b, nose_b, mouth_width, mouth_b, curve, skew = (
        measure[name][:, 0, 0] for name in ("eye_a", "eye_b", "nose_b", "mouth_width", "mouth_b", "mouth_curve", "skew")
    )
    corner = mouth_b + curve
    a = torch.stack([-eye_a, eye_a, torch.zeros_like(eye_a), -mouth_width, mouth_width], dim=1)
    b = torch.stack([eye_b, eye_b, nose_b, corner, corner], dim=1)
    upright = a.new_tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    b = b - upright * skew[:, None] * a
    # The canvas is painted at a minus this lean (see _paint_head).
    lean = 0.4 * skew[:, None] * (b - 0.2)
    return face_surface.points_at(surface, torch.stack([a + lean, b], dim=-1))


def _paint_head(shoot: Shoot, hits: face_surface.Hits, edge: Tensor) -> tuple[face_paint.Canvas, Tensor]:
    """The painted head and how deep in the hair each pixel lies (N, H, W)."""
    measure, trait, jitter = shoot.measure, shoot.trait, shoot.jitter
    count = len(hits.a)
    skin_grid = face_surface.interleave(hits.a * 0.9 + 1.3 * trait["freckle"], hits.b * 0.9 + 1.3 * trait["skin_warm"])
    across, along = face_hair.strand_coordinates(hits.a, hits.b, trait)
    hair_grid = face_surface.interleave(across + jitter["hair_noise"], along)
    patterns = _pattern(hits.a.device).expand(count, -1, -1, -1)
    skin_noise, hair_noise = (
        F.grid_sample(planes, grid, mode="bilinear", padding_mode="reflection", align_corners=True)
        for planes, grid in ((patterns[:, :2], skin_grid), (patterns[:, 2:], hair_grid))
    )
    flat_trait = {name: value[:, 0, 0] for name, value in trait.items()}
    canvas = face_paint.Canvas(
        a=hits.a - measure["skew"] * 0.4 * (hits.b - 0.2),
        b=hits.b,
        side=torch.sign(hits.a),
        edge=edge,
        measure=measure,
        trait=trait,
        jitter=jitter,
        skin_noise=skin_noise,
        strands=hair_noise[:, 0],
        skin=face_paint.skin_colour(flat_trait),
        hair=face_paint.hair_colour(flat_trait, jitter["hair_tone"][:, 0, 0]),
        albedo=torch.empty(count, 3, *hits.a.shape[1:], device=hits.a.device),
    )
    face_paint.paint_face(canvas, shoot.moles)
    distance = face_hair.hair_distance(hits.a, hits.b, measure, trait, jitter)
    face_hair.paint_hair(canvas, distance)
    # What nobody wears would be painted with coverage 0: left out, it changes no bit.
    for name, brush in (("glasses", face_worn.paint_temples), ("mask", face_worn.paint_mask)):
        worn = shoot.wears(name)
        if bool(worn.any()):
            brush(canvas, worn)
    return canvas, distance


def _wear_glasses(shoot: Shoot, picture: Tensor, ray: tuple[Tensor, Tensor, Tensor], pixel: Tensor) -> None:
    """Draw the glasses, in a plane before the eyes, over the picture (N, 3, H, W) in place."""
    worn = shoot.wears("glasses")
    if not bool(worn.any()):
        return
    origin = shoot.camera.origin()[:, :, None, None]
    eye = shoot.landmarks[:, 1, :, None, None]
    reach = (eye[:, 2] + 0.11 - origin[:, 2]) / ray[2]
    x = origin[:, 0] + reach * ray[0]
    y = origin[:, 1] + reach * ray[1] - eye[:, 1]
    frame, glass = face_worn.glasses_cover(x, y, eye[:, 0], 1 / pixel, shoot.jitter)
    glass = glass * worn
    shine = (0.10 + 0.12 * (x * 1.5 - y * 2.5 + shoot.jitter["light_side"]).sin()) * glass
    picture.mul_((1 - 0.10 * glass)[:, None]).add_((shine * 0.5)[:, None])
    colour = face_worn.frame_colour(shoot.jitter)
    torch.lerp(picture, colour[:, :, None, None], (frame * worn)[:, None], out=picture)


def _render_light(shoot: Shoot, plane_x: Tensor, plane_y: Tensor, pixel: Tensor) -> tuple[Tensor, Tensor]:
    """The picture in linear light (N, 3, H, W) and the mean reflectance of the skin (N,)."""
    surface, camera = shoot.surface, shoot.camera
    ray = camera.rays(plane_x, plane_y)
    hits = face_surface.intersect(surface, camera.origin(), ray, pixel)
    canvas, in_hair = _paint_head(shoot, hits, 0.72 / pixel)
    lamp = face_light.make_lamp(camera, shoot.shot, shoot.settings)
    steps = face_surface.map_steps(surface.factor.shape[-1], plane_x.device)
    normals = face_surface.sample_map(face_surface.normals_of(surface, steps), hits.a, hits.b)
    exposure = face_surface.sample_map(face_surface.occlusion_and_shadow(surface, lamp.towards), hits.a, hits.b)
    gloss = 0.10 - 0.08 * (in_hair * 20).clamp(0, 1)
    head = face_light.shade(canvas.albedo, gloss, normals, exposure, lamp)
    neck = camera.project(torch.tensor([_NECK], device=pixel.device).expand(len(pixel), -1, -1))
    typical = lamp.colour * 0.42 + lamp.ambient * 0.55
    picture = face_scene.paint_scene(
        (plane_x, plane_y),
        neck,
        _pattern(pixel.device),
        shoot.jitter,
        shoot.trait,
        canvas.skin * typical,
        canvas.hair * typical,
    )
    picture = torch.lerp(picture, head, hits.coverage[:, None])
    _wear_glasses(shoot, picture, ray, pixel)
    return picture, canvas.skin.mean(1)


def order_by_work(plan: Plan, settings: FaceSettings) -> Tensor:
    """An order of the samples (int64 (B,)) in which those that wear the same things are neighbours.

    So most small batches need neither glasses nor masks. The pictures do not depend on it.
    """
    shot = plan.shot()
    worn = 2 * face_worn.wears(shot, "mask", settings) + face_worn.wears(shot, "glasses", settings)
    return torch.argsort(worn, stable=True)
