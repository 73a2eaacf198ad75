"""The scene behind the head: a blurred background, long hair, neck and shoulders, drawn on the image plane."""

from __future__ import annotations

import torch
from torch import Tensor

from partialfc.faces.geometry import sample_pattern
from partialfc.faces.hair import long_hair
from partialfc.faces.traits import Named


def _muted_colour(tone: Tensor, hue: Tensor) -> Tensor:
    """A muted colour (N, 3) in linear light from two uniform numbers (N, 1, 1)."""
    angle = hue[:, 0] * (2 * torch.pi)
    turns = torch.cat([torch.cos(angle), torch.cos(angle - 2.094), torch.cos(angle + 2.094)], dim=1)
    bright = 0.03 + 0.75 * tone[:, 0] ** 1.6
    return bright * (1 + 0.24 * turns)


def paint_background(
    x: Tensor,
    y: Tensor,
    neck: Tensor,
    noise: Tensor,
    nuisance: Named,
    trait: Named,
    skin: Tensor,
    hair: Tensor,
) -> Tensor:
    """Everything behind the head, in linear light (N, 3, H, W).

    Args:
        x, y: coordinates of the pixels on the image plane, (N, H, W).
        neck: projections of the middle of the throat and of the back of the head on that plane (N, 2, 2).
        noise: pattern (1, C, S, S) whose first channel is broad.
        nuisance, trait: by name, (N, 1, 1).
        skin, hair: light that they reflect on average, (N, 3).
    """
    scale = 0.10 + 0.25 * nuisance["back_scale"]
    shift_x, shift_y = 2 * nuisance["back_x"] - 1, 2 * nuisance["back_y"] - 1
    broad = sample_pattern(noise[:, :1].expand(len(x), -1, -1, -1), x * scale + shift_x, y * scale + shift_y)
    slope_x, slope_y = 0.25 * nuisance["back_a"][:, None] * x[:, None], 0.2 * nuisance["back_b"][:, None] * y[:, None]
    mix = 0.5 + 0.30 * broad + slope_x + slope_y
    first = _muted_colour(nuisance["back_tone"], nuisance["back_hue"])[:, :, None, None]
    second = _muted_colour(nuisance["back_tone_2"], nuisance["back_hue_2"])[:, :, None, None]
    light = first + mix.clamp(0, 1) * (second - first)
    throat, back = (point[:, :, None, None] for point in neck.unbind(1))

    def paint(colour: Tensor, distance: Tensor, softness: float) -> None:
        cover = (distance * (1 / softness) + 0.5).clamp(0, 1)[:, None]
        torch.lerp(light, colour, cover, out=light)

    long = long_hair(trait)
    half = (0.90 + 0.08 * long) * torch.sqrt((1 - ((y - 0.35).clamp_max(0) / 1.5) ** 2).clamp_min(0)) - 0.07
    curtain = torch.minimum(half - (x - back[:, 0]).abs() - 0.06 * (y - 0.4).clamp_min(0), 1.75 - y) - (1 - long) * 2
    paint((hair * 0.45)[:, :, None, None], curtain, 0.12)
    across = (x - throat[:, 0]) / (0.46 + 0.10 * ((y - 1.0).clamp(0, 1) ** 2))
    from_below = ((y - throat[:, 1] - 0.45) * 1.4).clamp(-0.7, 1)
    shading = 0.62 + 0.38 * from_below + 0.22 * nuisance["light_side"].clamp(-1, 1) * across
    paint(skin[:, :, None, None] * shading[:, None], torch.minimum((1 - across.abs()) * 0.4, y - 0.35), 0.05)
    aside = (x - throat[:, 0]) ** 2
    collar = y - 1.24 - 0.22 * aside - 0.30 / (1 + 9 * aside)
    cloth = _muted_colour(nuisance["cloth_tone"] * 0.7, nuisance["cloth_hue"])[:, :, None, None]
    paint(cloth * (1 + 0.2 * broad), collar, 0.06)
    return light
