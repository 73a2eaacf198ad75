"""Accessories: glasses in front of the face, and a medical mask on it."""

from __future__ import annotations

import torch
from torch import Tensor

from partialfc.faces.paint import Canvas, ramp
from partialfc.faces.settings import FaceSettings
from partialfc.faces.traits import Named

_MASK_RAMP = ((0.88, 0.89, 0.90), (0.62, 0.78, 0.86), (0.45, 0.66, 0.80), (0.13, 0.13, 0.15))
_FRAME_RAMP = ((0.10, 0.10, 0.11), (0.30, 0.20, 0.14), (0.55, 0.52, 0.48), (0.45, 0.16, 0.16))


def wears(name: str, nuisance: Named, settings: FaceSettings) -> Tensor:
    """1 for images with `name` ("glasses" or "mask"), else 0: (N, 1, 1)."""
    share = settings.glasses if name == "glasses" else settings.mask
    return (nuisance[name] < share).to(torch.float32)


def mask_distance(a: Tensor, b: Tensor, measure: Named, nuisance: Named) -> Tensor:
    """How far inside a medical mask map coordinates (a, b) lie, negative outside: (N, H, W)."""
    width = a.abs()
    top = measure["nose_b"] - 0.17 + 0.10 * nuisance["mask_top"] + 0.30 * width * width
    below = 1.06 - 0.18 * width * width - b
    return torch.minimum(torch.minimum(b - top, below), 0.98 - width)


def mask_factor(a: Tensor, b: Tensor) -> Tensor:
    """The radius factor of a mask stretched over nose and chin, (T, T) or (N, T, T)."""
    nose = torch.exp(-3.2 * a * a - 6.0 * (b - 0.42) ** 2)
    chin = torch.exp(-2 * a * a - 7 * (b - 0.9) ** 2)
    return 1.06 + 0.17 * nose + 0.10 * chin


def paint_mask(canvas: Canvas, worn: Tensor) -> None:
    """Paint the mask with its pleats, seams and ear loops on the images where `worn` (N, 1, 1) is 1."""
    distance = mask_distance(canvas.a, canvas.b, canvas.measure, canvas.nuisance)
    width = canvas.a.abs()
    upper_loop = 0.013 - (canvas.b - 0.20 + 0.10 * (width - 0.98)).abs()
    lower_loop = 0.013 - (canvas.b - 0.72 + 0.45 * (width - 0.98)).abs()
    loops = torch.minimum(torch.minimum(torch.maximum(upper_loop, lower_loop), width - 0.95), 1.42 - width)
    colour = ramp(_MASK_RAMP, canvas.nuisance["mask_tone"][:, 0, 0])
    canvas.paint(colour, torch.maximum(canvas.cover(distance), canvas.cover(loops)) * worn)
    pleats = (torch.sin(canvas.b * 40 + 0.6) - 0.55).clamp_min_(0)
    pleats = pleats * canvas.cover(distance - 0.07) * canvas.cover(0.80 - width)
    seam = canvas.cover(0.008 - (distance - 0.035).abs(), 1.2)
    canvas.dim((pleats + seam) * worn, 0.22)


def paint_temples(canvas: Canvas, worn: Tensor) -> None:
    """Paint the arms of the glasses along the temples on the images where `worn` (N, 1, 1) is 1."""
    band = 0.020 - (canvas.b - canvas.measure["eye_b"] + 0.075).abs()
    arm = torch.minimum(band, torch.minimum(canvas.a.abs() - 0.70, 1.40 - canvas.a.abs()))
    canvas.paint(frame_colour(canvas.nuisance), canvas.cover(arm) * (worn * 0.85))


def frame_colour(nuisance: Named) -> Tensor:
    """Reflectance of the frame (N, 3)."""
    return ramp(_FRAME_RAMP, nuisance["glasses_tone"][:, 0, 0])


def glasses_cover(x: Tensor, y: Tensor, eye_x: Tensor, edge: Tensor, nuisance: Named) -> tuple[Tensor, Tensor]:
    """Coverage by the frame and by the glass, (N, H, W) each, in the plane of the glasses.

    Args:
        x, y: points in head units, from the middle between the eyes (N, H, W).
        eye_x: half the distance between the eyes (N, 1, 1).
        edge: 1 over the width of a pixel there (N, 1, 1).
        nuisance: style of the glasses.
    """
    half_width = 0.205 + 0.012 * nuisance["lens_width"]
    half_height = (0.150 + 0.022 * nuisance["lens_height"]).clamp(0.095, 0.2)
    corner = torch.minimum(half_width, half_height) * (0.25 + 0.75 * nuisance["glasses_round"])
    out_x = (x.abs() - eye_x - 0.01).abs() - (half_width - corner)
    out_y = (y - 0.02).abs() - (half_height - corner)
    outside = torch.sqrt(out_x.clamp_min(0) ** 2 + out_y.clamp_min(0) ** 2)
    rim = corner - outside - torch.maximum(out_x, out_y).clamp_max(0)
    thick = 0.010 + 0.022 * nuisance["glasses_style"] ** 2
    bridge = torch.minimum(thick * 0.8 - (y + 0.035 - 0.25 * x * x).abs(), eye_x - half_width + 0.03 - x.abs())
    frame = ((torch.maximum(thick - rim.abs(), bridge)) * edge + 0.5).clamp(0, 1)
    return frame, (rim * edge + 0.5).clamp(0, 1)
