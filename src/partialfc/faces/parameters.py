"""The parameters of a batch of images, drawn from (seed, identity, shot): traits, expressions and nuisances."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from partialfc.core import keyed_random
from partialfc.core.keyed_random import derive_key
from partialfc.faces.settings import FaceSettings
from partialfc.faces.traits import EXPRESSIONS, TRAITS, Named, by_name

GROUPS = 4
MOLES = 5
_CUTOFF = 2.4  # normal draws are clipped there, so that no face is grotesque

_NORMALS: tuple[str, ...] = (
    *EXPRESSIONS, "yaw", "pitch", "roll", "distance", "light_side", "light_up", "light_warm", "light_power", "ambient",
    "balance_red", "balance_blue", "exposure", "tone_curve", "saturation", "noise", "hairline", "hair_volume", "fringe",
    "hair_part", "hair_side", "hair_tone", "beard", "lens_width", "lens_height", "frame_a", "frame_b", "frame_scale",
    "back_a", "back_b", "blush",
)  # fmt: skip
_HAIRSTYLE = ("hairline", "hair_volume", "fringe", "hair_part", "hair_side", "hair_tone", "beard")
_UNIFORMS: tuple[str, ...] = (
    "glasses", "glasses_style", "glasses_tone", "glasses_round", "mask", "mask_tone", "mask_top", "blur", "noise_start",
    "noise_power", "back_x", "back_y", "back_tone", "back_hue", "back_tone_2", "back_hue_2", "back_scale", "cloth_tone",
    "cloth_hue", "flash", "ground", "beard_grown", "hair_noise",
)  # fmt: skip
_ACCESSORIES = (
    *_HAIRSTYLE, "beard_grown", "lens_width", "lens_height", "glasses", "glasses_style", "glasses_tone",
    "glasses_round", "mask", "mask_tone", "mask_top", "cloth_tone", "cloth_hue",
)  # fmt: skip
# What changes from one frame of a video to the next; all else belongs to its scene.
_MOVING = (set(EXPRESSIONS) - {"ageing"}) | {"yaw", "pitch", "roll", "frame_a", "frame_b", "frame_scale", "noise_start"}
_SCENE = tuple({*_NORMALS, *_UNIFORMS} - _MOVING)


class FaceParameters(NamedTuple):
    """All random numbers of a batch of images.

    Attributes:
        traits: traits, then expressions, float64 (B, traits + expressions); age includes its drift.
        normals, uniforms: nuisances of the image, float32 (B, ...).
        moles: uniform numbers of the identity, float32 (B, MOLES, 4).
        keys: int64 (B,), a key of each image for further draws.
    """

    traits: Tensor
    normals: Tensor
    uniforms: Tensor
    moles: Tensor
    keys: Tensor

    def nuisances(self, settings: FaceSettings) -> Named:
        """The nuisances by name, each (B, 1, 1); glasses and mask are 1 where they are worn and 0 elsewhere."""
        named = by_name(self.normals, _NORMALS) | by_name(self.uniforms, _UNIFORMS)
        worn = {"glasses": named["glasses"] < settings.glasses, "mask": named["mask"] < settings.mask}
        return named | {name: is_worn.float() for name, is_worn in worn.items()}


def draw_parameters(seed: int, identities: Tensor, shots: Tensor, settings: FaceSettings) -> FaceParameters:
    """Draw the parameters of images from their identities and shots, both int64 (B,)."""
    device = identities.device
    identity_keys = _keys(seed, "face identity", identities)[:, None]
    counters = identity_keys + torch.arange(len(TRAITS), device=device)
    traits = keyed_random.normal(derive_key(seed, "face traits"), counters)
    means = _group_means(settings.group_shift).to(device)[group_of(identities)]
    traits = traits.clamp(-_CUTOFF, _CUTOFF) * settings.identity_spread + means
    counters = identity_keys + torch.arange(4 * MOLES, device=device)
    moles = keyed_random.uniform(derive_key(seed, "face moles"), counters)
    for name, shift in settings.shifts:
        traits[:, TRAITS.index(name)] += shift
    keys = _keys(seed, "face shot", identities, shots)
    normals, uniforms = (_counters(seed, identities, shots, names, settings) for names in (_NORMALS, _UNIFORMS))
    normals = keyed_random.normal(derive_key(seed, "face normals"), normals)
    normals = normals.clamp(-_CUTOFF, _CUTOFF)
    normals[:, [_NORMALS.index(name) for name in _HAIRSTYLE]] *= settings.hairstyle
    uniforms = keyed_random.uniform(derive_key(seed, "face uniforms"), uniforms)
    expressions = _expressions(normals, settings)
    traits[:, TRAITS.index("age")] += expressions[:, EXPRESSIONS.index("ageing")]
    return FaceParameters(
        traits=torch.cat([traits, expressions], dim=1),
        normals=normals.float(),
        uniforms=uniforms.float(),
        moles=moles.float().view(-1, MOLES, 4),
        keys=keys,
    )


def group_of(identities: Tensor) -> Tensor:
    """The group (0 to 3) of each identity (int64). Consecutive identities alternate, so that groups are balanced."""
    return identities % GROUPS


def jpeg_quality(seed: int, identities: Tensor, shots: Tensor, settings: FaceSettings) -> Tensor:
    """The JPEG quality with which a written set stores each image: int64 (B,)."""
    lowest, highest = settings.jpeg_quality
    fraction = keyed_random.uniform(derive_key(seed, "face jpeg"), _keys(seed, "face shot", identities, shots))
    return lowest + (fraction * (highest - lowest + 1)).long()


def _keys(seed: int, purpose: str, *numbers: Tensor) -> Tensor:
    """One random int64 for each sample: a hash of the seed, the purpose and the numbers (int64 (B,))."""
    state = torch.zeros_like(numbers[0])
    for number in numbers:
        state = keyed_random.bits(derive_key(seed, purpose), keyed_random.mix(state) + number)
    return state


def _counters(seed: int, identities: Tensor, shots: Tensor, names: tuple[str, ...], settings: FaceSettings) -> Tensor:
    """The counter of each nuisance of each image, int64 (B, len(names)): images that share a nuisance share it."""
    keys = _keys(seed, "face shot", identities, shots)[:, None]
    for sets, shared in ((settings.accessory_sets, _ACCESSORIES), (settings.scenes, _SCENE)):
        if sets:
            is_shared = torch.tensor([name in shared for name in names], device=keys.device)
            keys = torch.where(is_shared, _keys(seed, "face set", identities, shots % sets)[:, None], keys)
    return keys + torch.arange(len(names), device=keys.device)


@lru_cache(maxsize=8)
def _group_means(shift: float) -> Tensor:
    """Mean of each trait in each group, float64 (GROUPS, traits); every seed has the same."""
    counters = torch.arange(GROUPS * len(TRAITS)).view(GROUPS, -1)
    means = keyed_random.normal(derive_key("face groups"), counters)
    means = (means - means.mean(0)) * shift
    # Tones differ more between groups than shapes do, and in steps, so that no two groups have the same.
    ladder = torch.tensor([-1.3, -0.45, 0.4, 1.3], dtype=torch.float64)
    means[:, TRAITS.index("skin_tone")] = ladder * (shift * 2)
    means[:, TRAITS.index("hair_dark")] = (ladder * 0.8 + 0.1) * (shift * 2)
    means[:, TRAITS.index("age")] = 0
    return means


def _expressions(normals: Tensor, settings: FaceSettings) -> Tensor:
    """Expressions (B, E) from standard normals. Most faces are calm: smiles and open mouths are one-sided."""
    normal = dict(zip(EXPRESSIONS, normals.unbind(1), strict=False))
    strength = settings.expression
    values = {
        "smile": (normal["smile"] + 0.2).clamp_min(-0.3) * strength,
        "mouth_open": (normal["mouth_open"] - 0.5).clamp_min(0) * strength,
        "brow_raise": normal["brow_raise"] * strength,
        "frown": normal["frown"].clamp_min(-0.5) * strength,
        "squint": normal["squint"] * strength,
        "pucker": (normal["pucker"] - 1.0).clamp_min(0) * strength,
        "gaze_a": normal["gaze_a"],
        "gaze_b": normal["gaze_b"],
        "ageing": normal["ageing"] * 0.7 * settings.age,
    }
    return torch.stack([values[name] for name in EXPRESSIONS], dim=1)
