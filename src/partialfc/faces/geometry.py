"""The head's surface: a star-shaped body, its radius in each direction an ellipsoid's times a sum of bumps.

The radius is stored on a square map of the coordinates (a, b) of `traits`. Each bump is a product of a function of a
and one of b, so the whole map is one small matrix product for each head. Normals come from finite differences of the
map, cast shadows from a short march over it towards the light.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# The map reaches to |a|, |b| = 1.85, 135 degrees from straight ahead; the rest is never visible.
EXTENT = 1.85
# The bounds of every radius factor, and the start and iterations of the intersection.
_OUTERMOST, _INNERMOST, _FIRST_GUESS, _ITERATIONS = 1.50, 0.80, 1.20, 6


@dataclass(frozen=True)
class Surface:
    """A batch of heads: `radii` (N, 3) of the ellipsoids, and the map of `factor` on them (N, 1, T, T), b by a."""

    radii: Tensor
    factor: Tensor


def map_axis(size: int, device: torch.device) -> Tensor:
    """The coordinates along one axis of the map: float32 (size,)."""
    return torch.linspace(-EXTENT, EXTENT, size, device=device)


def sum_of_bumps(bumps: Tensor, axis: Tensor) -> Tensor:
    """Bumps (N, K, 5: a, b, width in a, width in b, height), mirrored in a and summed over the map: (N, T, T)."""
    across = (axis.abs() - bumps[:, :, 0, None]) / bumps[:, :, 2, None]
    down = (axis - bumps[:, :, 1, None]) / bumps[:, :, 3, None]
    profile_a = torch.exp(-0.5 * across * across)
    profile_b = torch.exp(-0.5 * down * down) * bumps[:, :, 4, None]
    return profile_b.transpose(1, 2) @ profile_a


def directions(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Unit directions of map coordinates, x, y, z along `dim`. Coordinates outside the disc are moved to its rim."""
    square = a * a + b * b
    inside = square.clamp_max(3.6)
    lift = torch.sqrt(1 - inside / 4) * torch.sqrt(inside / square.clamp_min(1e-12))
    return torch.stack([a * lift, b * lift, 1 - inside / 2], dim=dim)


def sample_pattern(pattern: Tensor, a: Tensor, b: Tensor, padding: str = "reflection") -> Tensor:
    """Patterns (N, C, S, S) over [-1, 1] sampled bilinearly at coordinates (N, H, W): (N, C, H, W)."""
    grid = torch.view_as_real(torch.complex(a, b))  # ten times as fast as `torch.stack`
    return F.grid_sample(pattern, grid, mode="bilinear", padding_mode=padding, align_corners=True)


def sample_map(values: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Maps (N, C, T, T) sampled bilinearly at map coordinates (N, H, W): (N, C, H, W)."""
    return sample_pattern(values, a * (1 / EXTENT), b * (1 / EXTENT), padding="border")


def map_coordinates(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Map coordinates a, b and the length of vectors in ellipsoid coordinates (head coordinates over the radii)."""
    length = torch.sqrt((x * x).addcmul_(y, y).addcmul_(z, z))
    scale = torch.rsqrt((length + z).clamp_min_(0.05).mul_(length).mul_(0.5))
    return x * scale, y * scale, length


def normals_of(surface: Surface) -> Tensor:
    """Outward unit normals (N, 3, T, T) over the map."""
    axis = map_axis(surface.factor.shape[-1], surface.factor.device)
    points = surface.factor * directions(axis, axis[:, None], 0) * surface.radii[:, :, None, None]
    along_a = F.pad(points[:, :, :, 2:] - points[:, :, :, :-2], (1, 1, 0, 0), mode="replicate")
    along_b = F.pad(points[:, :, 2:] - points[:, :, :-2], (0, 0, 1, 1), mode="replicate")
    ax, ay, az = along_a.unbind(1)
    bx, by, bz = along_b.unbind(1)
    normal = torch.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], dim=1)
    return normal * torch.rsqrt((normal * normal).sum(1, keepdim=True).clamp_min(1e-12))


def occlusion_and_shadow(surface: Surface, light: Tensor) -> Tensor:
    """Openness to the sky and visibility of the lamp over the map: (N, 2, T/2, T/2), 0.45 to 1.15 and 0 to 1.

    Args:
        surface: the heads.
        light: unit direction towards the lamp in head coordinates (N, 3).
    """
    coarse = F.avg_pool2d(surface.factor, 2)
    near = F.avg_pool2d(coarse, 7, stride=1, padding=3, count_include_pad=False)
    openness = (1 + 4.5 * (coarse - near)).clamp(0.45, 1.15)
    axis = map_axis(coarse.shape[-1], coarse.device)
    x, y, z = (coarse * directions(axis, axis[:, None], 0)).unbind(1)
    towards = (light / surface.radii)[:, :, None, None].unbind(1)
    visible = torch.ones_like(x)
    for distance in (0.05, 0.11, 0.20, 0.34):
        a, b, length = map_coordinates(x + distance * towards[0], y + distance * towards[1], z + distance * towards[2])
        height = sample_map(coarse, a, b)[:, 0]
        clearance = (length - height + 0.006) * (1.0 / (0.35 * distance)) + 0.5
        visible = torch.minimum(visible, clearance.clamp(0, 1))
    return torch.cat([openness, visible[:, None]], dim=1)


def intersect(
    surface: Surface, origin: Tensor, ray: tuple[Tensor, Tensor, Tensor], pixel: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The first point of each ray on the surface, by a fixed-point iteration kept within a bracket.

    For a fixed radius factor s, the intersection of the ray with the ellipsoid scaled by s is known in closed form; s
    is then read from the map at that point, and so on. Rays that miss end at their closest approach, whose distance
    from the outline gives the soft edge.

    Args:
        surface: the heads.
        origin: the camera in head coordinates (N, 3).
        ray: direction of each pixel's ray in head coordinates, x, y, z each (N, H, W).
        pixel: width of a pixel at the head, in units of the head (N, 1, 1).

    Returns:
        The points' map coordinates a and b, and how much of each pixel the head covers: (N, H, W) each.
    """
    start_x, start_y, start_z = (origin / surface.radii)[:, :, None, None].unbind(1)
    inverse = (1 / surface.radii)[:, :, None, None].unbind(1)
    dx, dy, dz = ray[0] * inverse[0], ray[1] * inverse[1], ray[2] * inverse[2]
    inverse_square = 1 / (dx * dx + dy * dy + dz * dz)
    nearest = (start_x * dx + start_y * dy + start_z * dz) * inverse_square  # minus the parameter of closest approach
    x, y, z = start_x - nearest * dx, start_y - nearest * dy, start_z - nearest * dz
    miss_square = x * x + y * y + z * z
    dx, dy, dz = (d * torch.sqrt(inverse_square) for d in (dx, dy, dz))
    outside, inside = torch.full_like(miss_square, _OUTERMOST), torch.full_like(miss_square, _INNERMOST)
    factor = torch.full_like(miss_square, _FIRST_GUESS)
    for _ in range(_ITERATIONS):
        back = torch.sqrt((factor * factor).sub_(miss_square).clamp_min_(0))
        a, b, _ = map_coordinates(x - back * dx, y - back * dy, z - back * dz)
        height = sample_map(surface.factor, a, b)[:, 0]
        # Blends by 0 or 1, because `torch.where` is many times slower than arithmetic.
        is_outside = (factor - height).mul_(1e9).clamp_(0, 1)
        inside = torch.lerp(factor, inside, is_outside)
        outside = torch.lerp(outside, factor, is_outside)
        # Where the surface is steep the iteration diverges; the bracket is then halved, as in bisection.
        guess = torch.lerp(factor, height, 0.8)
        leaves = ((guess - outside).mul_(guess - inside)).mul_(1e9).clamp_(0, 1)
        factor = torch.lerp(guess, (outside + inside).mul_(0.5), leaves)
    back = torch.sqrt((factor * factor - miss_square).clamp_min(0))
    a, b, _ = map_coordinates(x - back * dx, y - back * dy, z - back * dz)
    return a, b, ((factor - torch.sqrt(miss_square)) * (0.85 / pixel) + 0.5).clamp(0, 1)


def points_at(surface: Surface, a: Tensor, b: Tensor) -> Tensor:
    """Points of the surface in head coordinates (N, P, 3) at map coordinates (N, P)."""
    factor = sample_map(surface.factor, a[:, None], b[:, None])[:, 0, 0]
    return directions(a, b, -1) * factor[..., None] * surface.radii[:, None]
