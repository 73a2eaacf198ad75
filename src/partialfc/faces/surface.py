"""The head's surface: a star-shaped body, its radius in each direction an ellipsoid's times a sum of bumps.

The radius lives on a square map of places (a, b) (azimuthal equal-area, see face_model). Each bump is a product of a
function of a and one of b, so the whole map is one small matrix product for each head. Normals come from finite
differences of the map, cast shadows from a short march over it towards the light.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# The map reaches to |a|, |b| = 1.85: 135 degrees from straight ahead; what lies behind is never seen.
EXTENT = 1.85
# Factors between which every surface lies, where the search for it starts, and how often it looks.
_OUTERMOST, _INNERMOST, _FIRST_GUESS, _STEPS = 1.50, 0.80, 1.20, 6


@dataclass(frozen=True)
class Surface:
    """A batch of heads. `radii` (N, 3) of the ellipsoid; `factor` (N, 1, T, T) on them, by place, row b, column a."""

    radii: Tensor
    factor: Tensor


def map_steps(size: int, device: torch.device) -> Tensor:
    """The T places along one axis of the map: float32 (T,)."""
    return torch.linspace(-EXTENT, EXTENT, size, device=device)


def sum_of_bumps(bumps: Tensor, steps: Tensor) -> Tensor:
    """Bumps (N, K, 5: a, b, width in a, width in b, height) summed over the map: (N, T, T), mirrored in a."""
    across = (steps.abs() - bumps[:, :, 0, None]) / bumps[:, :, 2, None]
    down = (steps - bumps[:, :, 1, None]) / bumps[:, :, 3, None]
    profile_a = torch.exp(-0.5 * across * across)
    profile_b = torch.exp(-0.5 * down * down) * bumps[:, :, 4, None]
    return profile_b.transpose(1, 2) @ profile_a


def directions(steps: Tensor) -> Tensor:
    """Unit directions of the places of the map: (3, T, T). Places outside the sphere's disc are pulled onto its rim."""
    b, a = torch.meshgrid(steps, steps, indexing="ij")
    square = (a * a + b * b).clamp_max(3.6)
    shrink = torch.sqrt(square / (a * a + b * b).clamp_min(1e-12))
    lift = torch.sqrt(1 - square / 4) * shrink
    return torch.stack([a * lift, b * lift, 1 - square / 2])


def interleave(a: Tensor, b: Tensor) -> Tensor:
    """(N, H, W) twice to (N, H, W, 2). As complex numbers, since `torch.stack` is ten times slower here."""
    return torch.view_as_real(torch.complex(a, b))


def sample_map(values: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Maps (N, C, T, T) read bilinearly at places (N, H, W): (N, C, H, W)."""
    grid = interleave(a * (1 / EXTENT), b * (1 / EXTENT))
    return F.grid_sample(values, grid, mode="bilinear", padding_mode="border", align_corners=True)


def place_of(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Places (a, b) and length of vectors given in ellipsoid coordinates (head coordinates over the radii)."""
    length = torch.sqrt((x * x).addcmul_(y, y).addcmul_(z, z))
    scale = torch.rsqrt((length + z).clamp_min_(0.05).mul_(length).mul_(0.5))
    return x * scale, y * scale, length


def normals_of(surface: Surface, steps: Tensor) -> Tensor:
    """Outward unit normals (N, 3, T, T) of the surface over its map."""
    points = surface.factor * directions(steps) * surface.radii[:, :, None, None]
    along_a = torch.empty_like(points)
    along_b = torch.empty_like(points)
    torch.sub(points[:, :, :, 2:], points[:, :, :, :-2], out=along_a[:, :, :, 1:-1])
    torch.sub(points[:, :, 2:, :], points[:, :, :-2, :], out=along_b[:, :, 1:-1, :])
    along_a[:, :, :, 0], along_a[:, :, :, -1] = along_a[:, :, :, 1], along_a[:, :, :, -2]
    along_b[:, :, 0, :], along_b[:, :, -1, :] = along_b[:, :, 1, :], along_b[:, :, -2, :]
    ax, ay, az = along_a.unbind(1)
    bx, by, bz = along_b.unbind(1)
    normal = torch.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], dim=1)
    return normal * torch.rsqrt((normal * normal).sum(1, keepdim=True).clamp_min(1e-12))


def occlusion_and_shadow(surface: Surface, light: Tensor) -> Tensor:
    """How open to the sky each place is, and how much of the lamp it sees: (N, 2, T/2, T/2), both in [0, 1].

    Args:
        surface: the heads.
        light: unit direction towards the lamp in head coordinates (N, 3).
    """
    coarse = F.avg_pool2d(surface.factor, 2)
    near = F.avg_pool2d(coarse, 7, stride=1, padding=3, count_include_pad=False)
    openness = (1 + 4.5 * (coarse - near)).clamp(0.45, 1.15)
    steps = map_steps(coarse.shape[-1], coarse.device)
    x, y, z = (coarse * directions(steps)).unbind(1)
    towards = (light / surface.radii)[:, :, None, None].unbind(1)
    visible = torch.ones_like(x)
    for distance in (0.05, 0.11, 0.20, 0.34):
        a, b, length = place_of(x + distance * towards[0], y + distance * towards[1], z + distance * towards[2])
        height = sample_map(coarse, a, b)[:, 0]
        clearance = (length - height + 0.006) * (1.0 / (0.35 * distance)) + 0.5
        visible = torch.minimum(visible, clearance.clamp(0, 1))
    return torch.cat([openness, visible[:, None]], dim=1)


@dataclass(frozen=True)
class Hits:
    """Where the rays of the pixels meet the head: places, the outline's coverage, all (N, H, W)."""

    a: Tensor
    b: Tensor
    coverage: Tensor
    x: Tensor
    y: Tensor
    z: Tensor


def intersect(surface: Surface, origin: Tensor, ray: tuple[Tensor, Tensor, Tensor], pixel: Tensor) -> Hits:
    """The first point of each ray on the surface, by a fixed point kept within a bracket.

    With the radius factor s held fixed, a ray meets the ellipsoid s times as large in closed form; s is then read from
    the map at that point, and so on. Rays that miss end at their closest approach, whose distance from the outline
    gives the soft edge.

    Args:
        surface: the heads.
        origin: the camera in head coordinates (N, 3).
        ray: direction of each pixel's ray in head coordinates, x, y, z each (N, H, W).
        pixel: width of a pixel at the head, in units of the head (N, 1, 1).
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
    for _ in range(_STEPS):
        back = torch.sqrt((factor * factor).sub_(miss_square).clamp_min_(0))
        a, b, _ = place_of(x - back * dx, y - back * dy, z - back * dz)
        height = sample_map(surface.factor, a, b)[:, 0]
        # Choices are blends by 0 or 1, because `torch.where` is many times slower than arithmetic.
        is_outside = (factor - height).mul_(1e9).clamp_(0, 1)
        inside = torch.lerp(factor, inside, is_outside)
        outside = torch.lerp(outside, factor, is_outside)
        # Where the surface is steep the fixed point repels; the bracket then halves, as in bisection.
        guess = torch.lerp(factor, height, 0.8)
        leaves = ((guess - outside).mul_(guess - inside)).mul_(1e9).clamp_(0, 1)
        factor = torch.lerp(guess, (outside + inside).mul_(0.5), leaves)
    back = torch.sqrt((factor * factor - miss_square).clamp_min(0))
    x, y, z = x - back * dx, y - back * dy, z - back * dz
    a, b, _ = place_of(x, y, z)
    coverage = ((factor - torch.sqrt(miss_square)) * (0.85 / pixel) + 0.5).clamp(0, 1)
    return Hits(a, b, coverage, x / inverse[0], y / inverse[1], z / inverse[2])


def points_at(surface: Surface, places: Tensor) -> Tensor:
    """Points of the surface in head coordinates at places (N, P, 2): (N, P, 3)."""
    a, b = places[..., 0], places[..., 1]
    factor = sample_map(surface.factor, a[:, None], b[:, None])[:, 0, 0]
    square = a * a + b * b
    lift = torch.sqrt(1 - square / 4)
    direction = torch.stack([a * lift, b * lift, 1 - square / 2], dim=-1)
    return direction * factor[..., None] * surface.radii[:, None]
