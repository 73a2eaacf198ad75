"""Accessories: glasses in front of the face, and a medical mask on it."""

from __future__ import annotations

import torch
from torch import Tensor

from partialfc.faces.camera import Camera
from partialfc.faces.paint import Canvas, ramp
from partialfc.faces.traits import Named

_MASK_RAMP = ((0.88, 0.89, 0.90), (0.62, 0.78, 0.86), (0.45, 0.66, 0.80), (0.13, 0.13, 0.15))
_FRAME_RAMP = ((0.10, 0.10, 0.11), (0.30, 0.20, 0.14), (0.55, 0.52, 0.48), (0.45, 0.16, 0.16))


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


def paint_mask(canvas: Canvas) -> None:
    """Paint the mask with its pleats, seams and ear loops where it is worn."""
    worn = canvas.nuisance["mask"]
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


def paint_temples(canvas: Canvas) -> None:
    """Paint the arms of the glasses along the temples where they are worn."""
    band = 0.020 - (canvas.b - canvas.measure["eye_b"] + 0.075).abs()
    arm = torch.minimum(band, torch.minimum(canvas.a.abs() - 0.70, 1.40 - canvas.a.abs()))
    canvas.paint(_frame_colour(canvas.nuisance), canvas.cover(arm) * (canvas.nuisance["glasses"] * 0.85))


def _frame_colour(nuisance: Named) -> Tensor:
    """Reflectance of the frame (N, 3)."""
    return ramp(_FRAME_RAMP, nuisance["glasses_tone"][:, 0, 0])


def paint_glasses(
    light: Tensor, camera: Camera, ray: tuple[Tensor, Tensor, Tensor], pixel: Tensor, landmarks: Tensor, nuisance: Named
) -> None:
    """Draw the glasses, in a plane in front of the eyes, over `light` (N, 3, H, W) in place, where they are worn."""
    worn = nuisance["glasses"]
    origin = camera.origin()[:, :, None, None]
    eye = landmarks[:, 1, :, None, None]
    reach = (eye[:, 2] + 0.11 - origin[:, 2]) / ray[2]
    x = origin[:, 0] + reach * ray[0]
    y = origin[:, 1] + reach * ray[1] - eye[:, 1]
    half_width = 0.205 + 0.012 * nuisance["lens_width"]
    half_height = (0.150 + 0.022 * nuisance["lens_height"]).clamp(0.095, 0.2)
    corner = torch.minimum(half_width, half_height) * (0.25 + 0.75 * nuisance["glasses_round"])
    out_x = (x.abs() - eye[:, 0] - 0.01).abs() - (half_width - corner)
    out_y = (y - 0.02).abs() - (half_height - corner)
    outside = torch.sqrt(out_x.clamp_min(0) ** 2 + out_y.clamp_min(0) ** 2)
    rim = corner - outside - torch.maximum(out_x, out_y).clamp_max(0)
    thick = 0.010 + 0.022 * nuisance["glasses_style"] ** 2
    bridge = torch.minimum(thick * 0.8 - (y + 0.035 - 0.25 * x * x).abs(), eye[:, 0] - half_width + 0.03 - x.abs())
    edge = 1 / pixel
    frame = ((torch.maximum(thick - rim.abs(), bridge)) * edge + 0.5).clamp(0, 1)
    glass = (rim * edge + 0.5).clamp(0, 1) * worn
    shine = (0.10 + 0.12 * (x * 1.5 - y * 2.5 + nuisance["light_side"]).sin()) * glass
    light.mul_((1 - 0.10 * glass)[:, None]).add_((shine * 0.5)[:, None])
    torch.lerp(light, _frame_colour(nuisance)[:, :, None, None], (frame * worn)[:, None], out=light)
