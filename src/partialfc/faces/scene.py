"""What stands behind the head: a blurred background, long hair, neck and shoulders, drawn on the picture plane."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from partialfc.faces.draws import Draws
from partialfc.faces.surface import interleave


def _any_colour(tone: Tensor, hue: Tensor) -> Tensor:
    """A muted colour (N, 3) in linear light from two uniform numbers (N, 1, 1)."""
    angle = hue[:, 0] * (2 * torch.pi)
    turns = torch.cat([torch.cos(angle), torch.cos(angle - 2.094), torch.cos(angle + 2.094)], dim=1)
    bright = 0.03 + 0.75 * tone[:, 0] ** 1.6
    return bright * (1 + 0.24 * turns)


def paint_scene(
    plane: tuple[Tensor, Tensor],
    neck: Tensor,
    noise: Tensor,
    jitter: Draws,
    trait: Draws,
    skin: Tensor,
    hair: Tensor,
) -> Tensor:
    """Everything behind the head, in linear light (N, 3, H, W).

    Args:
        plane: x and y of the pixels on the picture plane, each (N, H, W).
        neck: where the middle of the throat and of the back of the head lie on that plane (N, 2, 2).
        noise: pattern (1, C, S, S) whose first channel is broad.
        jitter: the shot's draws as (N, 1, 1).
        trait: traits as (N, 1, 1).
        skin: (N, 3), light that skin reflects on average.
        hair: (N, 3), likewise of hair.
    """
    x, y = plane
    count = len(x)
    scale = 0.10 + 0.25 * jitter["back_scale"]
    grid = interleave(x * scale + (2 * jitter["back_x"] - 1), y * scale + (2 * jitter["back_y"] - 1))
    broad = F.grid_sample(
        noise[:, :1].expand(count, -1, -1, -1), grid, mode="bilinear", padding_mode="reflection", align_corners=True
    )
    mix = (
        0.5
        + 0.30 * broad
        + 0.25 * jitter["back_a"][:, None] * x[:, None]
        + 0.2 * jitter["back_b"][:, None] * y[:, None]
    )
    first = _any_colour(jitter["back_tone"], jitter["back_hue"])[:, :, None, None]
    second = _any_colour(jitter["back_tone_2"], jitter["back_hue_2"])[:, :, None, None]
    picture = first + mix.clamp(0, 1) * (second - first)
    throat, back = (point[:, :, None, None] for point in neck.unbind(1))

    def lay(colour: Tensor, distance: Tensor, softness: float) -> None:
        cover = (distance * (1 / softness) + 0.5).clamp(0, 1)[:, None]
        torch.lerp(picture, colour, cover, out=picture)

    long = ((trait["hair_length"] - 0.1) * 1.6).clamp(0, 1)
    half = (0.90 + 0.08 * long) * torch.sqrt((1 - ((y - 0.35).clamp_max(0) / 1.5) ** 2).clamp_min(0)) - 0.07
    curtain = torch.minimum(half - (x - back[:, 0]).abs() - 0.06 * (y - 0.4).clamp_min(0), 1.75 - y) - (1 - long) * 2
    lay((hair * 0.45)[:, :, None, None], curtain, 0.12)
    across = (x - throat[:, 0]) / (0.46 + 0.10 * ((y - 1.0).clamp(0, 1) ** 2))
    light = (
        0.62
        + 0.38 * ((y - throat[:, 1] - 0.45) * 1.4).clamp(-0.7, 1)
        + 0.22 * jitter["light_side"].clamp(-1, 1) * across
    )
    lay(skin[:, :, None, None] * light[:, None], torch.minimum((1 - across.abs()) * 0.4, y - 0.35), 0.05)
    aside = (x - throat[:, 0]) ** 2
    collar = y - 1.24 - 0.22 * aside - 0.30 / (1 + 9 * aside)
    cloth = _any_colour(jitter["cloth_tone"] * 0.7, jitter["cloth_hue"])[:, :, None, None]
    lay(cloth * (1 + 0.2 * broad), collar, 0.06)
    return picture
