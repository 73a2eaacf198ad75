"""Hair: where it grows on the head's map, its volume, its colour and strands."""

from __future__ import annotations

import torch
from torch import Tensor

from partialfc.faces.draws import Draws
from partialfc.faces.paint import Canvas


def hair_distance(a: Tensor, b: Tensor, measure: Draws, trait: Draws, jitter: Draws) -> Tensor:
    """How far inside the hair places (a, b) lie (negative outside), (N, H, W), in units of the map.

    Args:
        a, b: places, broadcastable to (N, H, W).
        measure: hairline, hair_peak, hair_side as (N, 1, 1).
        trait: hair_length, hair_part, fringe as (N, 1, 1).
        jitter: the shot's hairline, hair_part, hair_side, fringe as (N, 1, 1).
    """
    width = a.abs()
    square = a * a
    part = 0.10 * trait["hair_part"] + 0.05 * jitter["hair_part"]
    fringe = (0.16 * (trait["fringe"] + 0.7 * jitter["fringe"] - 1.1)).clamp(0, 0.34)
    line = measure["hairline"] + 0.014 * jitter["hairline"] + fringe * (1 - 0.5 * square)
    line = line + measure["hair_peak"] / (1 + 28 * square) + part * a * 0.8 + 0.20 * square * square
    on_top = line - b
    inner = measure["hair_side"] + 0.03 * jitter["hair_side"] + 0.19 * b
    long = ((trait["hair_length"] - 0.1) * 1.6).clamp(0, 1)
    lowest = 0.14 + 1.6 * long - (1 - long) * 1.2 * (width - 1.24).clamp(0, 0.2)
    beside = torch.minimum(width - inner, lowest - b)
    behind = torch.minimum(width - 1.64, 0.75 + 1.5 * long - b)
    return torch.maximum(torch.maximum(on_top, beside), behind)


def hair_height(distance: Tensor, b: Tensor, measure: Draws, trait: Draws, jitter: Draws) -> Tensor:
    """What hair adds to the radius of the head, (N, T, T), from `distance` of `hair_distance`."""
    rise = (distance * (1 / 0.16)).clamp(0, 1)
    rise = rise * rise * (3 - 2 * rise)
    long = ((trait["hair_length"] - 0.1) * 1.6).clamp(0, 1)
    volume = (measure["hair_volume"] + 0.016 * jitter["hair_volume"] + 0.05 * long).clamp_min(0.012)
    crown = (0.75 - 0.55 * b).clamp(0.6, 1.5)
    return rise * volume * crown


def strand_coordinates(a: Tensor, b: Tensor, trait: Draws) -> tuple[Tensor, Tensor]:
    """Coordinates across and along the strands, which fan out from the parting at the top of the head."""
    across = (a - 0.25 * trait["hair_part"]) / (b + 2.2)
    return across * 2.6, b * 0.5


def paint_hair(canvas: Canvas, distance: Tensor) -> None:
    """Lay the hair over the face: ragged edge, darker roots, strands, a soft sheen across the top."""
    strands = canvas.strands
    ragged = distance + 0.035 * strands
    cover = canvas.cover(ragged, 1.5)
    depth = 0.62 + 0.38 * (ragged * 6).clamp(0, 1)
    sheen = 1 / (1 + ((canvas.b + 0.98) * 6) ** 2)
    bright = depth * (1 + 0.34 * strands) + sheen * (0.40 + 0.30 * strands)
    canvas.paint(canvas.hair[:, :, None, None] * bright.clamp_min(0.15)[:, None], cover)
