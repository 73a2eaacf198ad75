"""Augmentations of float images, batched, on their device; what happens to an image depends on its own draws alone.

An augmentation takes images (n, 3, S, S), float32 in [0, 255], and `draw`, which gives a uniform number in [0, 1) to
each image for a name. `PRESETS` has the named sets of augmentations, each with the probability that an image gets it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from partialfc.data.align import TEMPLATE, TEMPLATE_SIZE

Draw = Callable[[str], Tensor]
Augmentation = Callable[[Tensor, Draw], Tensor]

_GREY = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601
_SMALLEST = 0.2  # side of a low resolution, and area of a crop


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _grid(images: Tensor) -> tuple[Tensor, Tensor]:
    """Vertical (S, 1) and horizontal (1, S) coordinates of the centers of the pixels."""
    axis = torch.arange(images.shape[-1], device=images.device, dtype=torch.float32) + 0.5
    return axis[:, None], axis[None, :]


def _box(images: Tensor, draw: Draw, least: float, most: float) -> Tensor:
    """(n, 1, S, S) bool: a box in each image of a share of its area between two bounds, of aspect ratio 3/4 to 4/3."""
    size = images.shape[-1]
    area = (least + (most - least) * draw("area")).sqrt() * size
    ratio = torch.exp((2 * draw("ratio") - 1) * math.log(4 / 3) / 2)
    y, x = _grid(images)
    inside = torch.ones(1, dtype=torch.bool, device=images.device)
    for name, axis, length in (("top", y, area / ratio), ("left", x, area * ratio)):
        length = _per_image(length.clamp(1.0, size))
        start = _per_image(draw(name)) * (size - length)
        inside = inside & (axis >= start) & (axis < start + length)
    return inside


def crop(images: Tensor, draw: Draw) -> Tensor:
    """Keep a box of 20 to 100 % of the area; the rest becomes black (Kim et al. 2022, AdaFace)."""
    return images * _box(images, draw, _SMALLEST, 1.0)


def occlude(images: Tensor, draw: Draw) -> Tensor:
    """Cover a box of 2 to 20 % of the area with one colour (Zhong et al. 2020, Random erasing data augmentation)."""
    return torch.where(_box(images, draw, 0.02, 0.2), _colour(draw), images)


def _colour(draw: Draw) -> Tensor:
    return 255 * torch.stack([draw(channel) for channel in ("red", "green", "blue")], dim=1)[:, :, None, None]


@cache
def _low_resolutions(size: int) -> Tensor:
    """(K, S, S): shrinking S pixels to 0.2 S, …, S, by the mean, and enlarging them again, linearly, as matrices."""
    identity = torch.eye(size)[None]
    return torch.stack(
        [
            interpolate(interpolate(identity, size=small, mode="area"), size=size, mode="linear")[0].T
            for small in range(max(1, round(_SMALLEST * size)), size + 1)
        ]
    )


def _separable(images: Tensor, matrices: Tensor) -> Tensor:
    """Each image multiplied by its own matrix (n, S, S) along both axes."""
    matrices = matrices[:, None]
    return matrices @ images @ matrices.mT


def low_resolution(images: Tensor, draw: Draw) -> Tensor:
    """Shrink to 20 to 100 % of the side and enlarge again (Kim et al. 2022, AdaFace)."""
    matrices = _low_resolutions(images.shape[-1]).to(images.device, non_blocking=True)
    return _separable(images, matrices[(draw("side") * len(matrices)).long()])


def blur(images: Tensor, draw: Draw) -> Tensor:
    """Gaussian blur with a deviation of 0.5 to 2.5 % of the side."""
    axis, size = torch.arange(images.shape[-1], device=images.device), images.shape[-1]
    deviation = size * (0.005 + 0.02 * draw("deviation"))
    weights = torch.exp(-0.5 * ((axis[:, None] - axis) / deviation[:, None, None]) ** 2)
    return _separable(images, weights / weights.sum(dim=2, keepdim=True))


def _grey(images: Tensor) -> Tensor:
    return (images * images.new_tensor(_GREY)[:, None, None]).sum(dim=1, keepdim=True)


def photometric(images: Tensor, draw: Draw) -> Tensor:
    """Brightness, contrast and saturation, in this order, times 0.5 to 1.5 each (Kim et al. 2022, AdaFace)."""
    brightness, contrast, saturation = (
        _per_image(0.5 + draw(name)) for name in ("brightness", "contrast", "saturation")
    )
    images = (images * brightness).clamp(0, 255)
    mean = _grey(images).mean(dim=(2, 3), keepdim=True)
    images = (mean + (images - mean) * contrast).clamp(0, 255)
    grey = _grey(images)
    return (grey + (images - grey) * saturation).clamp(0, 255)


def grey(images: Tensor, draw: Draw) -> Tensor:
    """Luminance in all three channels."""
    return _grey(images).expand_as(images)


# The quantisation tables of ITU-T T.81, annex K, and the matrix of the discrete cosine transform of 8 values.
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def compress(images: Tensor, draw: Draw) -> Tensor:
    """The loss of a JPEG of quality 10 to 90, without the subsampling of its colours."""
    size, padding = images.shape[-1], -images.shape[-1] % 8
    to_ycbcr = images.new_tensor(_YCBCR)
    frequency = torch.arange(8, device=images.device, dtype=torch.float32)
    cosines = 0.5 * torch.cos(math.pi / 8 * frequency[:, None] * (frequency + 0.5))
    cosines[0] *= 0.5**0.5
    quality = 10 + 80 * draw("quality")
    scale = torch.where(quality < 50, 50 / quality, 2 - quality / 50)
    tables = images.new_tensor([_LUMINANCE, _CHROMINANCE, _CHROMINANCE])[:, None, None]
    steps = (tables * scale.view(-1, 1, 1, 1, 1, 1)).round().clamp(1, 255)
    planes = torch.einsum("ij,njhw->nihw", to_ycbcr, images - 128)
    planes = torch.nn.functional.pad(planes, (0, padding, 0, padding), mode="replicate")
    blocks = planes.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)  # (n, 3, rows, columns, 8, 8)
    blocks = cosines.T @ ((cosines @ blocks @ cosines.T / steps).round() * steps) @ cosines
    planes = blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3)[:, :, :size, :size]
    return (torch.einsum("ij,njhw->nihw", torch.linalg.inv(to_ycbcr), planes) + 128).clamp(0, 255)


def wear_mask(images: Tensor, draw: Draw) -> Tensor:
    """Draw a medical mask of a random colour over mouth and nose, placed by the points of the alignment template."""
    unit = images.shape[-1] / TEMPLATE_SIZE
    nose, mouth = TEMPLATE[2].tolist(), TEMPLATE[3:].mean(dim=0).tolist()
    y, x = _grid(images)
    across, down = (x / unit - (nose[0] + mouth[0]) / 2), y / unit
    top = _per_image(nose[1] - 12 + 14 * draw("height"))  # on the bridge of the nose to below its tip
    upper = top + (0.004 + 0.004 * _per_image(draw("slope"))) * across**2
    lower = mouth[1] + 24 - 0.012 * across**2
    width = _per_image(36 + 8 * draw("width"))
    covered = (down > upper) & (down < lower) & (across.abs() < width)
    shade = 0.75 + 0.25 * torch.cos(across / width * 1.4) - 0.06 * (torch.sin(down * 0.9) > 0.8)  # folds
    return torch.where(covered, (60 + 0.76 * _colour(draw)) * shade, images)


PRESETS: dict[str, tuple[tuple[Augmentation, float], ...]] = {
    "flip": (),
    "strong": ((crop, 0.2), (low_resolution, 0.2), (photometric, 0.2)),
    "masks": ((wear_mask, 0.3), (occlude, 0.1), (photometric, 0.2)),
    "all": (
        (wear_mask, 0.1),
        (occlude, 0.1),
        (crop, 0.2),
        (low_resolution, 0.2),
        (blur, 0.1),
        (photometric, 0.2),
        (grey, 0.05),
        (compress, 0.2),
    ),
}
