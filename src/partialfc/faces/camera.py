"""The camera: pose, perspective, framing by the landmarks, and what lens, sensor and converter do to the picture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from partialfc.core import keyed_random
from partialfc.core.keyed_random import derive_key
from partialfc.data.align import invert_similarity, scaled_template, similarity_transform, transform_points
from partialfc.faces.draws import Draws
from partialfc.faces.settings import FaceSettings

_DETECTOR_LANDMARKS = 10
_NOISE_TABLE = 1 << 18
_BLUR_TAPS = 3


@dataclass(frozen=True)
class Camera:
    """Pose and distance of a batch of shots.

    `rotation` (N, 3, 3) from head to camera coordinates (x right, y down, z towards the camera), `distance` (N,) of
    the camera from the centre of the head, in units of the head. The picture plane passes through that centre.
    """

    rotation: Tensor
    distance: Tensor

    def project(self, points: Tensor) -> Tensor:
        """Points in head coordinates (N, P, 3) on the picture plane (N, P, 2)."""
        turned = (self.rotation[:, None] * points[:, :, None, :]).sum(-1)
        return turned[..., :2] * (self.distance[:, None] / (self.distance[:, None] - turned[..., 2]))[..., None]

    def origin(self) -> Tensor:
        """The camera in head coordinates (N, 3)."""
        return self.rotation[:, 2] * self.distance[:, None]

    def rays(self, plane_x: Tensor, plane_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Directions, in head coordinates, of the rays through points (N, H, W) of the picture plane."""
        inverse = 1 / self.distance[:, None, None]
        x, y = plane_x * inverse, plane_y * inverse
        turn = self.rotation[:, :, :, None, None]
        first, second, third = (x * turn[:, 0, i] + y * turn[:, 1, i] - turn[:, 2, i] for i in range(3))
        return first, second, third


def make_camera(shot: Draws, settings: FaceSettings) -> Camera:
    """Pose and distance from the draws of the shots."""
    degrees = torch.pi / 180

    def angle(name: str, deviation: float) -> Tensor:
        return (shot[name] * deviation).clamp(-2 * deviation, 2 * deviation) * degrees

    yaw, pitch, roll = angle("yaw", settings.yaw), angle("pitch", settings.pitch), angle("roll", settings.roll)
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
    cos, sin = torch.cos, torch.sin
    turn = [cos(yaw), zero, sin(yaw), zero, one, zero, -sin(yaw), zero, cos(yaw)]
    nod = [one, zero, zero, zero, cos(pitch), -sin(pitch), zero, sin(pitch), cos(pitch)]
    tilt = [cos(roll), -sin(roll), zero, sin(roll), cos(roll), zero, zero, zero, one]
    first, second, third = (torch.stack(rows, dim=1).view(-1, 3, 3) for rows in (turn, nod, tilt))
    rotation = (third[:, :, :, None] * second[:, None]).sum(2)
    rotation = (rotation[:, :, :, None] * first[:, None]).sum(2)
    distance = torch.exp(shot["distance"] * 0.28) * 7.0
    return Camera(rotation.float(), distance.float())


def frame(flat: Tensor, keys: Tensor, seed: int, size: int, settings: FaceSettings, aligned: bool) -> Tensor:
    """The similarity (N, 2, 3) from the picture plane to pixels.

    Args:
        flat: the true landmarks on the picture plane (N, 5, 2).
        keys: one random int64 a sample (N,).
        seed: the seed of the set.
        size: side of the picture in pixels.
        settings: the detector's error.
        aligned: whether detected landmarks (the true ones and an error) are put on the template; otherwise the whole
            head is framed loosely, by the same draws.
    """
    counters = keys[:, None] + torch.arange(_DETECTOR_LANDMARKS + 4, device=keys.device)
    draws = keyed_random.normal(derive_key(seed, "face detector"), counters).clamp(-2.4, 2.4).float()
    if aligned:
        eyes = (flat[:, 1] - flat[:, 0]).square().sum(1).sqrt()
        error = draws[:, :_DETECTOR_LANDMARKS].view(-1, 5, 2) * (settings.detector * 0.55)
        return similarity_transform(flat + error * eyes[:, None, None].clamp_min(0.35), scaled_template(size))
    scale = torch.exp(0.10 * draws[:, 10]) * size / 3.4
    angle = draws[:, 11] * 0.03
    cosine, sine = scale * torch.cos(angle), scale * torch.sin(angle)
    middle = (size - 1) / 2
    shift_x, shift_y = middle + 0.03 * size * draws[:, 12], middle + (0.03 * draws[:, 13] - 0.04) * size
    return torch.stack([cosine, -sine, shift_x, sine, cosine, shift_y], dim=1).view(-1, 2, 3)


def plane_of_pixels(matrices: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points of the picture plane behind the pixels, x and y (N, H, W), and the width of a pixel there (N, 1, 1)."""
    back = invert_similarity(matrices)[:, :, :, None, None]
    across = torch.arange(size, dtype=matrices.dtype, device=matrices.device)
    down = across[:, None]
    plane_x = back[:, 0, 0] * across + back[:, 0, 1] * down + back[:, 0, 2]
    plane_y = back[:, 1, 0] * across + back[:, 1, 1] * down + back[:, 1, 2]
    return plane_x, plane_y, torch.sqrt(back[:, 0, 0] ** 2 + back[:, 1, 0] ** 2)


@lru_cache(maxsize=4)
def _noise_table(length: int, device: torch.device) -> Tensor:
    """Standard normal numbers, every window of `length` of them as one row of a view: float32."""
    values = keyed_random.normal(derive_key("sensor noise"), torch.arange(_NOISE_TABLE + length))
    return values.float().to(device).unfold(0, length, 1)


def _blurred(light: Tensor, sigma: Tensor) -> Tensor:
    """Images (N, 3, H, W) under a Gaussian blur of sigma (N,) pixels, edges repeated."""
    taps = torch.arange(_BLUR_TAPS + 1, device=light.device)
    weights = torch.exp(-0.5 * (taps / sigma.clamp_min(0.05)[:, None]) ** 2)
    weights = weights / (weights[:, :1] + 2 * weights[:, 1:].sum(1, keepdim=True))
    kernel = weights.float()[:, :, None, None, None].unbind(1)
    height, width = light.shape[2:]
    for dim, extent in ((3, width), (2, height)):
        edges = (_BLUR_TAPS, _BLUR_TAPS, 0, 0) if dim == 3 else (0, 0, _BLUR_TAPS, _BLUR_TAPS)
        padded = F.pad(light, edges, mode="replicate")
        light = padded.narrow(dim, _BLUR_TAPS, extent) * kernel[0]
        for tap in range(1, _BLUR_TAPS + 1):
            pair = padded.narrow(dim, _BLUR_TAPS - tap, extent) + padded.narrow(dim, _BLUR_TAPS + tap, extent)
            light = torch.addcmul(light, pair, kernel[tap])
    return light


def develop(light: Tensor, tone: Tensor, shot: Draws, settings: FaceSettings) -> Tensor:
    """From linear light (N, 3, H, W) to the picture, uint8 (N, H, W, 3): lens, exposure, balance, curve, noise.

    Args:
        light: linear light, about 0 to 1.
        tone: mean linear brightness of the skin (N,): cameras expose for it in part, as people's cameras do.
        shot: the draws of the shots, (N,).
        settings: strengths.
    """
    count, _, height, width = light.shape
    sharpness = settings.blur * height / 112
    light = _blurred(light, (0.45 + 1.5 * shot["blur"] ** 2) * sharpness)
    gain = torch.exp(shot["exposure"] * settings.exposure) * 0.47 / (0.06 + tone) ** 0.55
    balance = torch.stack([shot["balance_red"], torch.zeros_like(gain), shot["balance_blue"]], dim=1)
    gains = gain[:, None] * torch.exp(balance * settings.white_balance)
    light = light * gains.float()[:, :, None, None]
    grey = light.mean(1, keepdim=True)
    light = torch.lerp(grey, light, torch.exp(0.2 * shot["saturation"]).float()[:, None, None, None]).clamp_min(0)
    light = light / (1 + 0.22 * light)  # the shoulder of the film: highlights bend instead of clipping
    bend = (shot["tone_curve"] * settings.tone_curve).float()[:, None, None, None]
    picture = torch.sqrt(light)
    picture = picture + bend * picture * (1 - picture) * (picture - 0.35)
    table = _noise_table(3 * height * width, light.device)
    start = (shot["noise_start"] * _NOISE_TABLE).long()
    power = (settings.noise * (0.3 + 1.4 * shot["noise_power"] ** 2)).float()[:, None, None, None]
    picture = torch.addcmul(picture, table.index_select(0, start).view(count, 3, height, width), power)
    return picture.mul(255).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def landmark_pixels(matrices: Tensor, flat: Tensor) -> Tensor:
    """Landmarks on the picture plane (N, 5, 2) in pixels: float32 (N, 5, 2)."""
    return transform_points(matrices, flat).float()
