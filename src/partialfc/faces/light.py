"""Light on the painted head: one lamp, the sky and the ground, shadow, and the sheen of skin."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.faces.camera import Camera
from partialfc.faces.draws import Draws
from partialfc.faces.settings import FaceSettings


@dataclass(frozen=True)
class Lamp:
    """Light of a batch of shots: a lamp from one side and the surroundings, in head coordinates.

    `towards` (N, 3) points to the lamp, `up` upwards and `eye` to the camera, all of length 1; `colour` and `ambient`
    (N, 3) are the light of the lamp and of the sky, `ground` (N, 1, 1) the share of the sky's that comes from below.
    """

    towards: Tensor
    up: Tensor
    eye: Tensor
    colour: Tensor
    ambient: Tensor
    ground: Tensor


def make_lamp(camera: Camera, shot: Draws, settings: FaceSettings) -> Lamp:
    """The light of each shot from its draws (N,)."""
    strength = settings.lighting
    side = shot["light_side"] * 0.75 * strength
    rise = (0.45 + 0.35 * shot["light_up"] * strength).clamp(-0.4, 1.2)
    direction = torch.stack([torch.sin(side), -torch.tan(rise), torch.cos(side)], dim=1)
    direction = direction / direction.square().sum(1, keepdim=True).sqrt()
    share = (0.40 + 0.15 * shot["ambient"] * strength).clamp(0.12, 0.85)
    power = torch.exp(0.2 * shot["light_power"] * strength)
    warm = 0.11 * shot["light_warm"] * strength
    tint = torch.stack([1 + warm, torch.ones_like(warm), 1 - warm], dim=1)
    return Lamp(
        towards=(camera.rotation * direction[:, :, None]).sum(1),
        up=-camera.rotation[:, 1],
        eye=camera.rotation[:, 2],
        colour=((1 - share) * power)[:, None] * tint * 1.25,
        ambient=share[:, None] * (2 - tint) * 0.95,
        ground=(0.35 + 0.4 * shot["ground"])[:, None, None],
    )


def _dot(normals: Tensor, direction: Tensor) -> Tensor:
    x, y, z = direction[:, :, None, None].unbind(1)
    return torch.addcmul(torch.addcmul(normals[:, 0] * x, normals[:, 1], y), normals[:, 2], z)


def shade(albedo: Tensor, gloss: Tensor, normals: Tensor, exposure: Tensor, lamp: Lamp) -> Tensor:
    """Linear light (N, 3, H, W) that the painted head sends to the camera.

    Args:
        albedo: reflectances (N, 3, H, W).
        gloss: strength of the sheen (N, H, W).
        normals: unit normals (N, 3, H, W).
        exposure: openness to the sky and visibility of the lamp (N, 2, H, W).
        lamp: the light.
    """
    openness, visible = exposure.unbind(1)
    facing = (_dot(normals, lamp.towards) + 0.18).clamp_min_(0) * (1 / 1.18)
    lit = facing * (0.12 + 0.88 * visible)
    sky = _dot(normals, lamp.up) * 0.5 + 0.5
    around = (lamp.ground + (1 - lamp.ground) * sky) * openness
    light = lit[:, None] * lamp.colour[:, :, None, None]
    light = torch.addcmul(light, around[:, None].expand_as(light), lamp.ambient[:, :, None, None])
    # Light that scatters under the skin reddens the border of the shadow.
    light[:, 0].add_(0.10 * lit * (1 - lit).clamp_min_(0))
    half = lamp.towards + lamp.eye
    half = half / half.square().sum(1, keepdim=True).sqrt()
    sheen = _dot(normals, half).clamp_min_(0)
    for _ in range(4):
        sheen = sheen * sheen
    sheen = sheen * gloss * visible
    return torch.addcmul(albedo * light, sheen[:, None].expand_as(light), lamp.colour[:, :, None, None])
