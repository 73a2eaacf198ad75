"""The surface colours of the face: skin, eyes, brows, nose, mouth, lines, moles, beard.

Shapes are signed distances at each pixel's map coordinates (a, b), positive inside, turned into coverage over the width
of a pixel, so that edges are smooth without supersampling. Colours are reflectances (albedo) in linear light.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partialfc.faces.traits import Named

# Skin from light to dark and hair from fair to black, as square roots of reflectances.
_SKIN_RAMP = ((0.96, 0.80, 0.70), (0.89, 0.68, 0.55), (0.71, 0.50, 0.375), (0.46, 0.30, 0.22))
_HAIR_RAMP = ((0.72, 0.58, 0.40), (0.47, 0.34, 0.23), (0.28, 0.20, 0.15), (0.12, 0.105, 0.10))
_IRIS_RAMP = ((0.42, 0.55, 0.64), (0.42, 0.50, 0.40), (0.36, 0.25, 0.16), (0.20, 0.13, 0.09))


@dataclass(frozen=True)
class Canvas:
    """The albedo of a batch of images, painted in place, and the inputs of the painting functions.

    Attributes:
        a, b: map coordinates of the pixels, (N, H, W).
        edge: 1 over the width of a pixel on the map, (N, 1, 1).
        measure, trait, nuisance: by name, (N, 1, 1).
        skin_noise: broad and fine pattern of the skin, (N, 2, H, W).
        strands: pattern of the hair, (N, H, W).
        skin, hair: reflectances, (N, 3).
        albedo: reflectances of the pixels, (N, 3, H, W).
    """

    a: Tensor
    b: Tensor
    edge: Tensor
    measure: Named
    trait: Named
    nuisance: Named
    skin_noise: Tensor
    strands: Tensor
    skin: Tensor
    hair: Tensor
    albedo: Tensor

    def cover(self, distance: Tensor, softness: float = 1.0) -> Tensor:
        """Coverage of the pixels by a shape, from their signed distance on the map (positive inside)."""
        return (distance * (self.edge / softness)).add_(0.5).clamp_(0, 1)

    def paint(self, colour: Tensor, cover: Tensor) -> None:
        """Blend a colour, (N or 1, 3) or (N, 3, H, W), over the albedo by its coverage (N, H, W)."""
        colour = colour[:, :, None, None] if colour.ndim == 2 else colour
        torch.lerp(self.albedo, colour, cover[:, None], out=self.albedo)

    def dim(self, cover: Tensor, strength: Tensor | float) -> None:
        """Darken the albedo by `strength` times the coverage (N, H, W)."""
        self.albedo.mul_((1 - cover * strength)[:, None])


def ramp(stops: tuple[tuple[float, float, float], ...], position: Tensor) -> Tensor:
    """Reflectances (N, 3) at positions (N,), clipped to [0, 1], along a ramp of square roots of reflectances."""
    table = torch.tensor(stops, dtype=position.dtype, device=position.device)
    position = position.clamp(0, 1) * (len(stops) - 1)
    lower = position.floor().clamp_max(len(stops) - 2)
    roots = torch.lerp(table[lower.long()], table[lower.long() + 1], (position - lower)[:, None])
    return roots * roots


def skin_colour(trait: Named) -> Tensor:
    """Reflectance of the bare skin (N, 3) from traits (N,)."""
    colour = ramp(_SKIN_RAMP, 0.46 + 0.20 * trait["skin_tone"])
    warm = 0.055 * trait["skin_warm"]
    return colour * torch.stack([1 + 0.6 * warm, 1 - 0.2 * warm, 1 - warm], dim=1)


def hair_colour(trait: Named, tone_shift: Tensor) -> Tensor:
    """Reflectance of the hair (N, 3): fair to black, red, and greying with age."""
    colour = ramp(_HAIR_RAMP, 0.60 + 0.26 * trait["hair_dark"] + 0.05 * tone_shift)
    red = (0.22 * (trait["hair_red"] - 0.6)).clamp(0, 0.5)
    colour = colour * torch.stack([1 + red, 1 - 0.2 * red, 1 - 0.6 * red], dim=1)
    grey = (0.45 * (trait["age"] - 0.9)).clamp(0, 0.85)[:, None]
    return torch.lerp(colour, colour.new_tensor([[0.36, 0.35, 0.34]]), grey)


def paint_face(canvas: Canvas, moles: Tensor) -> None:
    """Paint the face without hair and accessories; `moles` (N, M, 4) are uniform numbers of the identity."""
    _skin(canvas)
    _moles(canvas, moles)
    _lines(canvas)
    _nose(canvas)
    _beard(canvas)
    _mouth(canvas)
    _eyes(canvas)
    _brows(canvas)


def _bell(x: Tensor, y: Tensor, wide_x: float, wide_y: float) -> Tensor:
    """A soft spot, 1 at the origin: 1 / (1 + r^2)^2, cheaper than a Gaussian."""
    falloff = 1 + (x * (1 / wide_x)) ** 2 + (y * (1 / wide_y)) ** 2
    return 1 / (falloff * falloff)


def _skin(canvas: Canvas) -> None:
    trait, measure = canvas.trait, canvas.measure
    broad, fine = canvas.skin_noise.unbind(1)
    width = canvas.a.abs()
    canvas.albedo.copy_(canvas.skin[:, :, None, None] * (1 + 0.07 * broad + 0.02 * fine)[:, None])
    flush = (0.35 + 0.14 * trait["blush"] + 0.10 * canvas.nuisance["blush"]).clamp(0, 0.9)
    redness = _bell(width - 0.50, canvas.b - 0.27, 0.22, 0.20)
    redness = redness + 0.8 * _bell(width, canvas.b - measure["nose_b"], 0.12, 0.12)
    redness = redness * (flush * (1 + 0.3 * broad))
    canvas.albedo[:, 1:].mul_((1 - 0.32 * redness)[:, None])
    around_eye = _bell(width - measure["eye_a"] + 0.06, canvas.b - measure["eye_b"] - 0.02, 0.16, 0.10)
    canvas.dim(around_eye, 0.20 + 0.03 * trait["eye_bag"] + 0.03 * trait["age"])
    # Freckles: peaks of the fine pattern, on nose and cheeks.
    amount = (0.26 * (trait["freckle"] - 0.3)).clamp(0, 0.5)
    where = _bell(width - 0.30, canvas.b - 0.20, 0.45, 0.22)
    canvas.dim((fine - 0.5).clamp_(0, 0.8) * where, amount)


def _moles(canvas: Canvas, moles: Tensor) -> None:
    square = (canvas.a * canvas.a).addcmul_(canvas.b, canvas.b)
    dots = torch.zeros_like(square)
    for number in range(moles.shape[1]):
        a, b, size, strength = moles[:, number, :, None, None].unbind(1)
        a, b = (a - 0.5) * 1.7, b * 1.35 - 0.50
        # A spot smaller than a pixel fades instead of vanishing between pixels.
        radius = 0.012 + 0.012 * size * size
        wide = radius + 0.7 / canvas.edge
        # 1 - r^2 / wide^2, with r^2 = |p|^2 - 2 p.c + |c|^2.
        depth = (1.5 * (strength - 0.4)).clamp(0, 0.7) * (1.6 * radius / wide).clamp_max(1)
        scale = depth / (wide * wide)
        dot = torch.addcmul(square * -scale, canvas.a, 2 * a * scale).addcmul_(canvas.b, 2 * b * scale)
        dots.add_(dot.add_(depth - (a * a + b * b) * scale).clamp_min_(0))
    canvas.dim(dots.clamp_max_(0.7), 1.0)


def _lines(canvas: Canvas) -> None:
    """Wrinkles: from nose to mouth, across the forehead, beside the eyes."""
    trait, measure = canvas.trait, canvas.measure
    width, b = canvas.a.abs(), canvas.b
    start_a, start_b = measure["wing_a"] + 0.03, measure["nostril_b"] - 0.02
    end_a, end_b = measure["mouth_width"] + 0.075 + 0.012 * trait["fold"], measure["mouth_b"] + 0.03
    along = ((b - start_b) / (end_b - start_b)).clamp(-0.2, 1.2)
    line = start_a + (end_a - start_a) * along * (1.45 - 0.45 * along)
    strength = 0.10 + 0.07 * trait["age"] + 0.06 * trait["fold"] + 0.10 * trait["smile"]
    ends = (along * (1.2 - along) * 5).clamp(0, 1)
    canvas.dim(canvas.cover(0.006 - (width - line).abs(), 2.2) * ends, strength.clamp(0, 0.45))
    waves = torch.sin((b + 0.10 * canvas.a * canvas.a) * 52 + 3 * trait["brow_line"])
    strength = (0.12 * trait["brow_line"] + 0.07 * trait["age"] + 0.05 * trait["brow_raise"] - 0.03).clamp(0, 0.3)
    canvas.dim((waves - 0.3).clamp_min_(0) * _bell(canvas.a, b + 0.43, 0.60, 0.16), strength)


def _nose(canvas: Canvas) -> None:
    measure = canvas.measure
    width, b = (canvas.a - 0.012 * canvas.trait["nose_bend"]).abs(), canvas.b
    across, down = width - measure["nostril_a"], b - measure["nostril_b"] + 0.25 * (width - measure["nostril_a"])
    hole = measure["nostril"] - torch.sqrt(across * across * 0.55 + down * down * 2.2)
    canvas.dim(canvas.cover(hole, 1.1), 0.82)
    across, down = width - measure["wing_a"] + 0.045, b - measure["nose_b"] - 0.045
    ring = 0.008 - (torch.sqrt(across * across + down * down) - 0.062).abs()
    canvas.dim(canvas.cover(ring, 1.6) * canvas.cover(across + 0.4 * down - 0.02, 2.0), 0.30)


def _beard(canvas: Canvas) -> None:
    trait, nuisance, measure = canvas.trait, canvas.nuisance, canvas.measure
    width, b = canvas.a.abs(), canvas.b
    amount = (0.55 * (trait["beard"] - 0.45) + 0.25 * nuisance["beard"]).clamp(0, 1)
    amount = amount * (0.25 + 0.75 * nuisance["beard_grown"])
    line = 0.55 + 0.035 * trait["beard_low"] - 0.42 * (width - 0.36).clamp_min(0)
    jaw = (b - line) * (1 / 0.16)
    upper_lip = torch.minimum((b - measure["nostril_b"] - 0.075) * 20, (measure["mouth_width"] + 0.03 - width) * 12)
    across, down = width / (measure["mouth_width"] + 0.02), (b - measure["mouth_b"] - 0.01) / 0.13
    around_mouth = torch.sqrt(across**2 + down**2) - 1
    region = torch.maximum(jaw.clamp(0, 1) * (around_mouth * 4).clamp(0, 1), upper_lip.clamp(0, 1))
    strands = 1 + 0.15 * canvas.skin_noise[:, 1] + 0.08 * canvas.strands
    canvas.paint(canvas.hair * 0.8, region * (amount * strands).clamp(0, 0.95))


def _mouth(canvas: Canvas) -> None:
    trait, measure = canvas.trait, canvas.measure
    u = canvas.a / measure["mouth_width"]
    square = u * u
    belly = 1 - square
    y = canvas.b + measure["skew"] * canvas.a - measure["mouth_b"] - measure["mouth_curve"] * square
    gap = measure["mouth_gap"].clamp_min(0) * belly.clamp_min(0)
    bow = measure["lip_bow"] * (1 / (1 + 16 * square) - 0.40)
    top = y + 0.35 * gap + measure["lip_upper"] * belly * (1 + 0.4 * square) - bow
    bottom = gap + measure["lip_lower"] * belly - y
    lips = canvas.cover(torch.minimum(top, bottom), 1.3)
    red = (0.46 + 0.11 * trait["lip_red"]).clamp(0.12, 0.85)[:, :, 0]
    colour = canvas.skin * torch.cat([1.0 - 0.12 * red, 1.0 - 0.75 * red, 1.0 - 0.66 * red], dim=1)
    canvas.paint(colour, lips * 0.88)
    canvas.dim(lips * (0.5 - y * 14).clamp_(0, 1), 0.20)  # the upper lip faces down
    inside = canvas.cover(torch.minimum(y + 0.35 * gap, gap - y), 1.0) * (gap * 60).clamp_(0, 1)
    canvas.paint(canvas.skin.new_tensor([[0.075, 0.022, 0.020]]), inside)
    teeth = inside * canvas.cover(0.034 - (y + 0.35 * gap), 1.2)
    canvas.paint(canvas.skin.new_tensor([[0.66, 0.62, 0.54]]), teeth * (1 - 0.5 * square).clamp_(0, 1))
    line = canvas.cover(0.009 - y.abs(), 1.3) * canvas.cover(measure["mouth_width"] * 1.04 - canvas.a.abs(), 1.5)
    canvas.dim(line * (1 - inside), 0.62)


def _eyes(canvas: Canvas) -> None:
    trait, measure, nuisance = canvas.trait, canvas.measure, canvas.nuisance
    x = canvas.a.abs() - measure["eye_a"]
    flat = canvas.b + measure["skew"] * canvas.a - measure["eye_b"]
    y = flat + measure["eye_tilt"] * x
    u = (x / measure["eye_width"]).clamp_(-1.3, 1.3)  # the lids' parabolas end there
    belly = 1 - u * u
    upper = y + measure["eye_upper"].clamp_min(0.014) * belly * (1 + measure["eye_skew"].clamp(-0.7, 0.7) * u)
    lower = measure["eye_lower"].clamp_min(0.012) * belly - y
    opening = canvas.cover(torch.minimum(upper, lower))
    iris = measure["iris"]
    # Gaze turns both eyes the same way, although the eyes are mirror images.
    look = x * torch.sign(canvas.a) - 0.016 * trait["gaze_a"]
    rise = flat - 0.008 * trait["gaze_b"] + 0.010
    radius = torch.sqrt(look * look + rise * rise)
    white = canvas.skin.new_tensor([[0.60, 0.565, 0.545]])[:, :, None, None]
    ball = torch.lerp(white, _iris_colour(trait)[:, :, None, None], canvas.cover(iris - radius)[:, None])
    dark = canvas.cover(0.42 * iris - radius) * 0.9 + canvas.cover(0.010 - (radius - iris).abs(), 1.5) * 0.45
    shade = (upper * 11 + 0.40).clamp_(0.35, 1) * (1 - dark.clamp_(0, 0.92))
    canvas.paint(ball * shade[:, None], opening)
    glint = torch.sqrt((look - 0.018 * nuisance["light_side"]) ** 2 + (rise + 0.026) ** 2)
    canvas.paint(white * 1.6, canvas.cover(0.013 - glint) * opening * 0.85)
    inside = canvas.cover((1.08 - u.abs()) * 0.16, 1.2)
    lash = canvas.cover(0.013 - (upper - 0.004).abs(), 1.1) * inside
    canvas.paint(canvas.hair * 0.25, lash * 0.80)
    canvas.dim(canvas.cover(0.007 - lower.abs(), 1.2) * inside, 0.28)
    crease = (upper + measure["crease"]).abs()
    canvas.dim(canvas.cover(0.007 - crease, 1.3) * inside, (0.34 + 0.06 * trait["lid_crease"]).clamp(0.1, 0.5))
    bag = (lower + 0.055 + 0.012 * u).abs()
    strength = (0.10 + 0.05 * trait["eye_bag"] + 0.05 * trait["age"]).clamp(0, 0.3)
    canvas.dim(canvas.cover(0.008 - bag, 2.5) * inside, strength)


def _iris_colour(trait: Named) -> Tensor:
    tone = trait["iris_tone"] * 0.24 + 0.20 * trait["hair_dark"] + 0.55
    colour = ramp(_IRIS_RAMP, tone[:, 0, 0])
    hue = 0.10 * trait["iris_hue"][:, 0]
    return colour * torch.cat([1 + hue, torch.ones_like(hue), 1 - hue], dim=1)


def _brows(canvas: Canvas) -> None:
    trait, measure = canvas.trait, canvas.measure
    width = canvas.a.abs()
    along = (width - measure["brow_in"]) / (measure["brow_out"] - measure["brow_in"])
    bent = (along - 0.62) * (1 / 0.62)
    line = measure["brow_b"] - measure["brow_arch"] * (1 - bent * bent) - measure["brow_tilt"] * (along - 0.4)
    y = canvas.b + measure["skew"] * canvas.a - line
    thick = measure["brow_thick"].clamp_min(0.010) * (1.12 - 0.72 * along.clamp(0, 1))
    ends = torch.minimum(width - measure["brow_in"], measure["brow_out"] - width)
    shape = canvas.cover(torch.minimum(thick - y.abs(), ends * 0.6), 1.5)
    density = (0.74 + 0.09 * trait["brow_dense"]).clamp(0.35, 0.95)
    canvas.paint(canvas.hair * 0.55, shape * (density * (1 + 0.22 * canvas.skin_noise[:, 1])).clamp_(0, 0.97))
