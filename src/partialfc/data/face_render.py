"""From draws to light: surface, rays, paint and shading of one batch of faces."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from partialfc import keyed_random
from partialfc.data import face_hair, face_paint, face_scene, face_surface, face_worn
from partialfc.data.face_camera import Camera
from partialfc.data.face_draws import Draws
from partialfc.data.face_settings import FaceSettings
from partialfc.keyed_random import derive_key

_NOISE_SIZE = 128
_MAP_PER_PIXEL = 1.5


def column(draws: Draws) -> Draws:
    """Numbers (N,) as float32 (N, 1, 1), ready to meet pictures."""
    return {name: value.float()[:, None, None] for name, value in draws.items()}


@lru_cache(maxsize=4)
def pattern(device: torch.device) -> Tensor:
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


def build_surface(
    measure: Draws, bumps: Tensor, trait: Draws, dice: Draws, size: int, settings: FaceSettings
) -> face_surface.Surface:
    """The heads of a batch, hair and mask included, on maps fit for pictures of `size` pixels."""
    steps = face_surface.map_steps(2 * round(size * _MAP_PER_PIXEL / 2), bumps.device)
    safe = bumps.float()
    safe[:, :, 2:4].clamp_(min=0.02)
    factor = 1 + face_surface.sum_of_bumps(safe, steps)
    b = steps[:, None]
    covered = (face_worn.mask_distance(steps, b, measure, dice) * 20 + 0.5).clamp(0, 1) * face_worn.wears(
        dice, "mask", settings
    )
    factor = torch.lerp(factor, torch.maximum(factor, face_worn.mask_factor(steps, b)), covered)
    distance = face_hair.hair_distance(steps, b, measure, trait, dice)
    factor = factor + face_hair.hair_height(distance, b, measure, trait, dice)
    radii = torch.cat([measure[name][:, 0] for name in ("radius_x", "radius_y", "radius_z")], dim=1)
    return face_surface.Surface(radii, factor[:, None])


def landmarks_of(surface: face_surface.Surface, measure: Draws) -> Tensor:
    """The five landmarks in head coordinates (N, 5, 3): eyes, nose tip, mouth corners, image-left ones first."""
    one = {
        name: measure[name][:, 0, 0] for name in ("eye_a", "eye_b", "nose_b", "mouth_width", "mouth_b", "mouth_curve")
    }
    skew = measure["skew"][:, 0, 0]
    corner = one["mouth_b"] + one["mouth_curve"]
    places = [
        (-one["eye_a"], one["eye_b"] + skew * one["eye_a"]),
        (one["eye_a"], one["eye_b"] - skew * one["eye_a"]),
        (torch.zeros_like(skew), one["nose_b"]),
        (-one["mouth_width"], corner + skew * one["mouth_width"]),
        (one["mouth_width"], corner - skew * one["mouth_width"]),
    ]
    return face_surface.points_at(surface, torch.stack([torch.stack(place, dim=1) for place in places], dim=1))


def _paint_head(
    hits: face_surface.Hits,
    measure: Draws,
    trait: Draws,
    dice: Draws,
    moles: Tensor,
    edge: Tensor,
    settings: FaceSettings,
) -> tuple[face_paint.Canvas, Tensor]:
    """The painted head and how deep in the hair each pixel lies (N, H, W)."""
    count = len(hits.a)
    own = 1.3 * trait["freckle"], 1.3 * trait["skin_warm"]
    skin_grid = torch.stack([hits.a * 0.9 + own[0], hits.b * 0.9 + own[1]], dim=-1)
    across, along = face_hair.strand_coordinates(hits.a, hits.b, trait)
    hair_grid = torch.stack([across + dice["hair_noise"], along], dim=-1)
    patterns = pattern(hits.a.device).expand(count, -1, -1, -1)
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
        dice=dice,
        noise=torch.cat([skin_noise, hair_noise], dim=1),
        skin=face_paint.skin_colour(flat_trait),
        hair=face_paint.hair_colour(flat_trait, dice["hair_tone"][:, 0, 0]),
        albedo=torch.empty(count, 3, *hits.a.shape[1:], device=hits.a.device),
    )
    face_paint.paint_face(canvas, moles)
    distance = face_hair.hair_distance(hits.a, hits.b, measure, trait, dice)
    face_hair.paint_hair(canvas, distance)
    face_worn.paint_temples(canvas, face_worn.wears(dice, "glasses", settings))
    face_worn.paint_mask(canvas, face_worn.wears(dice, "mask", settings))
    return canvas, distance


class Lamp:
    """Light of a batch of shots: a lamp from one side and the sky around, in head coordinates.

    Attributes:
        towards: unit direction towards the lamp (N, 3).
        colour, ambient: light of the lamp and of the surroundings (N, 3).
        up, eye: unit directions upwards and towards the camera (N, 3).
        ground: how much of the ambient light comes from below (N, 1, 1).
    """

    def __init__(self, camera: Camera, normal: Draws, uniform: Draws, settings: FaceSettings) -> None:
        strength = settings.lighting
        side, rise = normal["light_side"] * 0.75 * strength, 0.45 + 0.35 * normal["light_up"] * strength
        direction = torch.stack([torch.sin(side), -torch.tan(rise.clamp(-0.4, 1.2)), torch.cos(side)], dim=1)
        direction = (direction / direction.square().sum(1, keepdim=True).sqrt()).float()
        self.towards = (camera.rotation * direction[:, :, None]).sum(1)
        share = (0.40 + 0.15 * normal["ambient"] * strength).clamp(0.12, 0.85)
        power = torch.exp(0.2 * normal["light_power"] * strength)
        warm = 0.16 * normal["light_warm"] * strength
        tint = torch.stack([1 + warm, torch.ones_like(warm), 1 - warm], dim=1)
        self.colour = ((1 - share) * power)[:, None] * tint * 1.25
        self.ambient = share[:, None] * (2 - tint) * 0.95
        self.colour, self.ambient = self.colour.float(), self.ambient.float()
        self.up, self.eye = -camera.rotation[:, 1], camera.rotation[:, 2]
        self.ground = (0.35 + 0.4 * uniform["ground"]).float()[:, None, None]


def _dot(normals: Tensor, direction: Tensor) -> Tensor:
    x, y, z = direction[:, :, None, None].unbind(1)
    return torch.addcmul(torch.addcmul(normals[:, 0] * x, normals[:, 1], y), normals[:, 2], z)


def _shade(albedo: Tensor, gloss: Tensor, shape: Tensor, lamp: Lamp) -> Tensor:
    """Linear light (N, 3, H, W) that the painted head sends to the camera.

    Args:
        albedo: reflectances (N, 3, H, W).
        gloss: strength of the sheen (N, H, W).
        shape: normals, openness and visibility of the lamp (N, 5, H, W).
        lamp: the light.
    """
    openness, visible = shape[:, 3], shape[:, 4]
    facing = (_dot(shape, lamp.towards) + 0.18).clamp_min_(0) * (1 / 1.18)
    lit = facing * (0.12 + 0.88 * visible)
    sky = _dot(shape, lamp.up) * 0.5 + 0.5
    around = (lamp.ground + (1 - lamp.ground) * sky) * openness
    light = lit[:, None] * lamp.colour[:, :, None, None]
    light = torch.addcmul(light, around[:, None].expand_as(light), lamp.ambient[:, :, None, None])
    # Light that scatters under the skin reddens the border of the shadow.
    light[:, 0].add_(0.10 * lit * (1 - lit).clamp_min_(0))
    half = lamp.towards + lamp.eye
    half = half / half.square().sum(1, keepdim=True).sqrt()
    sheen = _dot(shape, half).clamp_min_(0)
    for _ in range(4):
        sheen = sheen * sheen
    sheen = sheen * gloss * visible
    return torch.addcmul(albedo * light, sheen[:, None].expand_as(light), lamp.colour[:, :, None, None])


def _wear_glasses(
    picture: Tensor,
    ray: tuple[Tensor, Tensor, Tensor],
    camera: Camera,
    eye: Tensor,
    edge: Tensor,
    dice: Draws,
    worn: Tensor,
) -> None:
    """Draw the glasses, in a plane before the eyes, over the picture (N, 3, H, W) in place."""
    origin = camera.origin()[:, :, None, None]
    depth = eye[:, 2, None, None] + 0.11
    reach = (depth - origin[:, 2]) / ray[2]
    x = origin[:, 0] + reach * ray[0]
    y = origin[:, 1] + reach * ray[1] - eye[:, 1, None, None]
    frame, glass = face_worn.glasses_cover(x, y, eye[:, 0, None, None], edge, dice)
    shine = (0.10 + 0.12 * (x * 1.5 - y * 2.5 + dice["light_side"]).sin()) * glass * worn
    picture.mul_((1 - 0.10 * glass * worn)[:, None]).add_((shine * 0.5)[:, None])
    colour = face_worn.frame_colour(dice)
    torch.lerp(picture, colour[:, :, None, None], (frame * worn)[:, None], out=picture)


def render_light(
    surface: face_surface.Surface, camera: Camera, plane: tuple[Tensor, Tensor, Tensor], measure: Draws, trait: Draws,
    normal: Draws, uniform: Draws, moles: Tensor, eye: Tensor, settings: FaceSettings,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The picture in linear light (N, 3, H, W) and the mean reflectance of the skin (N,).

    Args:
        surface: the heads.
        camera: their poses.
        plane: points of the picture plane behind the pixels and the width of a pixel (see plane_of_pixels).
        measure, trait: of the identities, as (N, 1, 1).
        normal, uniform: draws of the shots (N,).
        moles: uniform numbers of the moles (N, MOLES, 4).
        eye: the image-right eye in head coordinates (N, 3).
        settings: strengths.
    """
    plane_x, plane_y, pixel = plane
    dice = column(normal) | column(uniform)
    ray = camera.rays(plane_x, plane_y)
    hits = face_surface.intersect(surface, camera.origin(), ray, pixel)
    canvas, in_hair = _paint_head(hits, measure, trait, dice, moles, 0.72 / pixel, settings)
    lamp = Lamp(camera, normal, uniform, settings)
    steps = face_surface.map_steps(surface.factor.shape[-1], plane_x.device)
    shape = torch.cat(
        [
            face_surface.sample_map(face_surface.normals_of(surface, steps), hits.a, hits.b),
            face_surface.sample_map(face_surface.occlusion_and_shadow(surface, lamp.towards), hits.a, hits.b),
        ],
        dim=1,
    )
    gloss = 0.10 - 0.08 * (in_hair * 20).clamp(0, 1)
    head = _shade(canvas.albedo, gloss, shape, lamp)
    neck = camera.project(
        torch.tensor([[[0.0, 0.75, -0.15], [0.0, 0.0, -0.2]]], device=pixel.device).expand(len(pixel), -1, -1)
    )
    typical = lamp.colour * 0.42 + lamp.ambient * 0.55
    picture = face_scene.paint_scene(
        (plane_x, plane_y), neck, pattern(pixel.device), dice, trait, canvas.skin * typical, canvas.hair * typical
    )
    picture = torch.lerp(picture, head, hits.coverage[:, None])
    _wear_glasses(picture, ray, camera, eye, 1 / pixel, dice, face_worn.wears(dice, "glasses", settings))
    return picture, canvas.skin.mean(1)
