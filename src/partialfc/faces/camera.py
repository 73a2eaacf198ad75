"""The camera: pose, perspective projection, framing by the landmarks, lens, sensor and raw development."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from partialfc.core import keyed_random
from partialfc.core.keyed_random import derive_key
from partialfc.data.align import invert_similarity, scaled_template, similarity_transform
from partialfc.faces.settings import FaceSettings
from partialfc.faces.traits import Named

_NOISE_TABLE = 1 << 18  # numbers, before the first window repeats
_BLUR_TAPS = 3  # on either side of the middle


@dataclass(frozen=True)
class Camera:
    """Pose and distance of a batch of images. The image plane passes through the centre of the head.

    Attributes:
        rotation: from head to camera coordinates (x right, y down, z towards the camera), (N, 3, 3).
        distance: of the camera from the centre of the head, in units of the head, (N,).
    """

    rotation: Tensor
    distance: Tensor

    def project(self, points: Tensor) -> Tensor:
        """The projections (N, P, 2) on the image plane of points in head coordinates (N, P, 3)."""
        turned = (self.rotation[:, None] * points[:, :, None, :]).sum(-1)
        return turned[..., :2] * (self.distance[:, None] / (self.distance[:, None] - turned[..., 2]))[..., None]

    def origin(self) -> Tensor:
        """The position of the camera in head coordinates (N, 3)."""
        return self.rotation[:, 2] * self.distance[:, None]

    def rays(self, plane_x: Tensor, plane_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Directions x, y, z, in head coordinates, of the rays through points (N, H, W) of the image plane."""
        inverse = 1 / self.distance[:, None, None]
        x, y = plane_x * inverse, plane_y * inverse
        turn = self.rotation[:, :, :, None, None]
        ray_x, ray_y, ray_z = (x * turn[:, 0, i] + y * turn[:, 1, i] - turn[:, 2, i] for i in range(3))
        return ray_x, ray_y, ray_z


def make_camera(nuisance: Named, settings: FaceSettings) -> Camera:
    """Pose and distance of each image from its nuisances (N,)."""
    degrees = torch.pi / 180

    def angle(name: str, deviation: float) -> Tensor:
        return (nuisance[name] * deviation).clamp(-2 * deviation, 2 * deviation) * degrees

    yaw, pitch, roll = angle("yaw", settings.yaw), angle("pitch", settings.pitch), angle("roll", settings.roll)
    yaw = yaw + torch.sign(yaw) * (settings.turn * degrees)
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
    cos, sin = torch.cos, torch.sin
    turn = [cos(yaw), zero, sin(yaw), zero, one, zero, -sin(yaw), zero, cos(yaw)]
    nod = [one, zero, zero, zero, cos(pitch), -sin(pitch), zero, sin(pitch), cos(pitch)]
    tilt = [cos(roll), -sin(roll), zero, sin(roll), cos(roll), zero, zero, zero, one]
    first, second, third = (torch.stack(rows, dim=1).view(-1, 3, 3) for rows in (turn, nod, tilt))
    rotation = (third[:, :, :, None] * second[:, None]).sum(2)
    rotation = (rotation[:, :, :, None] * first[:, None]).sum(2)
    distance = torch.exp(nuisance["distance"] * 0.28) * 7.0
    return Camera(rotation.float(), distance.float())


def framing(landmarks: Tensor, keys: Tensor, seed: int, size: int, settings: FaceSettings, aligned: bool) -> Tensor:
    """The similarity (N, 2, 3) from the image plane to pixels.

    Args:
        landmarks: the true landmarks on the image plane (N, 5, 2).
        keys: one random int64 an image (N,).
        seed: the seed of the set.
        size: side of the image in pixels.
        settings: the detector's error.
        aligned: True puts detected landmarks, the true ones with an error, on the template. False frames the whole
            head loosely.
    """
    if aligned:
        eyes = (landmarks[:, 1] - landmarks[:, 0]).square().sum(1).sqrt()
        error = detector_error(seed, keys, settings) * eyes[:, None, None].clamp_min(0.35)
        return similarity_transform(landmarks + error, scaled_template(size))
    draws = _detector_draws(seed, keys)
    scale = torch.exp(0.10 * draws[:, 10]) * size / 3.4
    angle = draws[:, 11] * 0.03
    cosine, sine = scale * torch.cos(angle), scale * torch.sin(angle)
    middle = (size - 1) / 2
    shift_x, shift_y = middle + 0.03 * size * draws[:, 12], middle + (0.03 * draws[:, 13] - 0.04) * size
    return torch.stack([cosine, -sine, shift_x, sine, cosine, shift_y], dim=1).view(-1, 2, 3)


def detector_error(seed: int, keys: Tensor, settings: FaceSettings) -> Tensor:
    """What a simulated detector is wrong by at each landmark, in distances between the eyes: float32 (N, 5, 2)."""
    return _detector_draws(seed, keys)[:, :10].view(-1, 5, 2) * (settings.detector * 0.55)


def _detector_draws(seed: int, keys: Tensor) -> Tensor:
    counters = keys[:, None] + torch.arange(14, device=keys.device)
    return keyed_random.normal(derive_key(seed, "face detector"), counters).clamp(-2.4, 2.4).float()


def pixels_on_plane(matrices: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates x, y (N, H, W) of the pixels on the image plane, and the width of a pixel there (N, 1, 1)."""
    back = invert_similarity(matrices)[:, :, :, None, None]
    across = torch.arange(size, dtype=matrices.dtype, device=matrices.device)
    down = across[:, None]
    plane_x = back[:, 0, 0] * across + back[:, 0, 1] * down + back[:, 0, 2]
    plane_y = back[:, 1, 0] * across + back[:, 1, 1] * down + back[:, 1, 2]
    return plane_x, plane_y, torch.sqrt(back[:, 0, 0] ** 2 + back[:, 1, 0] ** 2)


@lru_cache(maxsize=4)
def _noise_table(length: int, device: torch.device) -> Tensor:
    """Standard normal numbers, float32; each row of the view is a window of `length` of them."""
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


def develop(light: Tensor, tone: Tensor, nuisance: Named, settings: FaceSettings) -> Tensor:
    """From linear light (N, 3, H, W) to the image, uint8 (N, H, W, 3): blur, exposure, balance, tone curve, noise.

    Args:
        light: linear light, about 0 to 1.
        tone: mean reflectance of the skin (N,), for which the automatic exposure compensates in part.
        nuisance: by name, (N,).
        settings: strengths.
    """
    count, _, height, width = light.shape
    sharpness = settings.blur * height / 112
    light = _blurred(light, (0.45 + 1.5 * nuisance["blur"] ** 2) * sharpness)
    gain = torch.exp(nuisance["exposure"] * settings.exposure) * 0.47 / (0.06 + tone) ** 0.55
    balance = torch.stack([nuisance["balance_red"], torch.zeros_like(gain), nuisance["balance_blue"]], dim=1)
    gains = gain[:, None] * torch.exp(balance * settings.white_balance)
    light = light * gains.float()[:, :, None, None]
    grey = light.mean(1, keepdim=True)
    light = torch.lerp(grey, light, torch.exp(0.2 * nuisance["saturation"]).float()[:, None, None, None]).clamp_min(0)
    light = light / (1 + 0.22 * light)  # highlights are compressed instead of clipped
    bend = (nuisance["tone_curve"] * settings.tone_curve).float()[:, None, None, None]
    image = torch.sqrt(light)
    image = image + bend * image * (1 - image) * (image - 0.35)
    table = _noise_table(3 * height * width, light.device)
    start = (nuisance["noise_start"] * _NOISE_TABLE).long()
    power = (settings.noise * (0.3 + 1.4 * nuisance["noise_power"] ** 2)).float()[:, None, None, None]
    image = torch.addcmul(image, table.index_select(0, start).view(count, 3, height, width), power)
    return image.mul(255).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
