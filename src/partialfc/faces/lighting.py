"""Illumination of the painted head: one lamp with its shadow, the sky and the ground, and the sheen of skin."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.faces.camera import Camera
from partialfc.faces.settings import FaceSettings
from partialfc.faces.traits import Named


@dataclass(frozen=True)
class Lighting:
    """The illumination of a batch of images, in head coordinates.

    Attributes:
        towards: unit vector to the lamp, (N, 3).
        colour, ambient: light of the lamp and of the sky, (N, 3).
        ground: the ground's light as a share of the sky's, (N, 1, 1).
    """

    towards: Tensor
    colour: Tensor
    ambient: Tensor
    ground: Tensor


def make_lighting(camera: Camera, nuisance: Named, settings: FaceSettings) -> Lighting:
    """The illumination of each image from its nuisances (N,)."""
    strength = settings.lighting
    side = nuisance["light_side"] * 0.75 * strength
    rise = (0.45 + 0.35 * nuisance["light_up"] * strength).clamp(-0.4, 1.2)
    direction = torch.stack([torch.sin(side), -torch.tan(rise), torch.cos(side)], dim=1)
    direction = direction / direction.square().sum(1, keepdim=True).sqrt()
    share = (0.40 + 0.15 * nuisance["ambient"] * strength).clamp(0.12, 0.85)
    power = torch.exp(0.2 * nuisance["light_power"] * strength)
    warm = 0.11 * nuisance["light_warm"] * strength
    tint = torch.stack([1 + warm, torch.ones_like(warm), 1 - warm], dim=1)
    return Lighting(
        towards=(camera.rotation * direction[:, :, None]).sum(1),
        colour=((1 - share) * power)[:, None] * tint * 1.25,
        ambient=share[:, None] * (2 - tint) * 0.95,
        ground=(0.35 + 0.4 * nuisance["ground"])[:, None, None],
    )


def _dot(normals: Tensor, direction: Tensor) -> Tensor:
    x, y, z = direction[:, :, None, None].unbind(1)
    return torch.addcmul(torch.addcmul(normals[:, 0] * x, normals[:, 1], y), normals[:, 2], z)


def shade(
    albedo: Tensor, gloss: Tensor, normals: Tensor, exposure: Tensor, camera: Camera, lighting: Lighting
) -> Tensor:
    """Linear light (N, 3, H, W) from the painted head to the camera.

    Args:
        albedo: reflectances (N, 3, H, W).
        gloss: strength of the sheen (N, H, W).
        normals: unit normals (N, 3, H, W).
        exposure: openness to the sky and visibility of the lamp (N, 2, H, W).
        camera, lighting: the view and the illumination.
    """
    openness, visible = exposure.unbind(1)
    facing = (_dot(normals, lighting.towards) + 0.18).clamp_min_(0) * (1 / 1.18)
    lit = facing * (0.12 + 0.88 * visible)
    sky = _dot(normals, -camera.rotation[:, 1]) * 0.5 + 0.5
    around = (lighting.ground + (1 - lighting.ground) * sky) * openness
    light = lit[:, None] * lighting.colour[:, :, None, None]
    light = torch.addcmul(light, around[:, None].expand_as(light), lighting.ambient[:, :, None, None])
    # Subsurface scattering reddens the border of the shadow.
    light[:, 0].add_(0.10 * lit * (1 - lit).clamp_min_(0))
    half = lighting.towards + camera.rotation[:, 2]
    half = half / half.square().sum(1, keepdim=True).sqrt()
    sheen = _dot(normals, half).clamp_min_(0)
    for _ in range(4):
        sheen = sheen * sheen
    sheen = sheen * gloss * visible
    return torch.addcmul(albedo * light, sheen[:, None].expand_as(light), lighting.colour[:, :, None, None])
