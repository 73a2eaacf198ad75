"""Hair: where it grows on the head, its volume, its strands and its colour."""

from __future__ import annotations

import torch
from torch import Tensor

from partialfc.faces.paint import Canvas
from partialfc.faces.traits import Named


def hair_distance(a: Tensor, b: Tensor, measure: Named, trait: Named, nuisance: Named) -> Tensor:
    """How far inside the hair map coordinates (a, b) lie, negative outside: (N, H, W).

    Args:
        a, b: map coordinates, broadcastable to (N, H, W).
        measure: hairline, hair_peak, hair_side as (N, 1, 1).
        trait: hair_length, hair_part, fringe as (N, 1, 1).
        nuisance: hairline, hair_part, hair_side, fringe as (N, 1, 1).
    """
    width = a.abs()
    square = a * a
    part = 0.10 * trait["hair_part"] + 0.05 * nuisance["hair_part"]
    fringe = (0.16 * (trait["fringe"] + 0.7 * nuisance["fringe"] - 1.1)).clamp(0, 0.34)
    line = measure["hairline"] + 0.014 * nuisance["hairline"] + fringe * (1 - 0.5 * square)
    line = line + measure["hair_peak"] / (1 + 28 * square) + part * a * 0.8 + 0.20 * square * square
    on_top = line - b
    inner = measure["hair_side"] + 0.03 * nuisance["hair_side"] + 0.19 * b
    long = long_hair(trait)
    lowest = 0.14 + 1.6 * long - (1 - long) * 1.2 * (width - 1.24).clamp(0, 0.2)
    beside = torch.minimum(width - inner, lowest - b)
    behind = torch.minimum(width - 1.64, 0.75 + 1.5 * long - b)
    return torch.maximum(torch.maximum(on_top, beside), behind)


def hair_height(distance: Tensor, b: Tensor, measure: Named, trait: Named, nuisance: Named) -> Tensor:
    """What hair adds to the radius factor, (N, T, T), from `hair_distance`."""
    rise = (distance * (1 / 0.16)).clamp(0, 1)
    rise = rise * rise * (3 - 2 * rise)
    volume = (measure["hair_volume"] + 0.016 * nuisance["hair_volume"] + 0.05 * long_hair(trait)).clamp_min(0.012)
    crown = (0.75 - 0.55 * b).clamp(0.6, 1.5)
    return rise * volume * crown


def long_hair(trait: Named) -> Tensor:
    """0 for short to 1 for long hair, (N, 1, 1)."""
    return ((trait["hair_length"] - 0.1) * 1.6).clamp(0, 1)


def paint_hair(canvas: Canvas, distance: Tensor) -> None:
    """Paint the hair over the face: ragged edge, darker roots, strands, a soft sheen across the top."""
    strands = canvas.strands
    ragged = distance + 0.035 * strands
    depth = 0.62 + 0.38 * (ragged * 6).clamp(0, 1)
    sheen = 1 / (1 + ((canvas.b + 0.98) * 6) ** 2)
    bright = depth * (1 + 0.34 * strands) + sheen * (0.40 + 0.30 * strands)
    colour = canvas.hair[:, :, None, None] * bright.clamp_min(0.15)[:, None]
    canvas.paint(colour, canvas.cover(ragged, 1.5))
