"""What a person and a shot are, drawn from (seed, identity, shot): traits, moods and every nuisance of the shot."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from partialfc import keyed_random
from partialfc.data.face_model import BUMPS, MEASURES, MOODS, TRAITS
from partialfc.data.face_settings import FaceSettings
from partialfc.keyed_random import derive_key

GROUPS = 4

# Draws are named, so that adding one changes none of the others.
Draws = dict[str, Tensor]

_SHOT_NORMALS: tuple[str, ...] = (
    *MOODS, "yaw", "pitch", "roll", "distance", "light_side", "light_up", "light_warm", "light_power", "ambient",
    "balance_red", "balance_blue", "exposure", "tone_curve", "saturation", "noise", "hairline", "hair_volume", "fringe",
    "hair_part", "hair_side", "hair_tone", "beard", "lens_width", "lens_height", "frame_a", "frame_b", "frame_scale",
    "back_a", "back_b", "blush",
)  # fmt: skip
_SHOT_UNIFORMS: tuple[str, ...] = (
    "glasses", "glasses_style", "glasses_tone", "glasses_round", "mask", "mask_tone", "mask_top", "blur", "noise_start",
    "noise_power", "back_x", "back_y", "back_tone", "back_hue", "back_tone_2", "back_hue_2", "back_scale", "cloth_tone",
    "cloth_hue", "flash", "ground", "beard_grown", "hair_noise",
)  # fmt: skip


def group_of(identities: Tensor) -> Tensor:
    """The group (0 to 3) of each identity (int64): consecutive identities take turns, so that groups are balanced."""
    return identities % GROUPS


@lru_cache(maxsize=8)
def _group_means(shift: float) -> Tensor:
    """Mean of each trait in each group, float64 (GROUPS, traits): fixed, the same for every seed."""
    counters = torch.arange(GROUPS * len(TRAITS)).view(GROUPS, -1)
    means = keyed_random.normal(derive_key("face groups"), counters)
    means = (means - means.mean(0)) * shift
    # Tones differ more between groups than shapes do, and in steps, so that no two groups share theirs.
    ladder = torch.tensor([-1.3, -0.45, 0.4, 1.3], dtype=torch.float64)
    means[:, TRAITS.index("skin_tone")] = ladder * (shift * 2)
    means[:, TRAITS.index("hair_dark")] = (ladder * 0.8 + 0.1) * (shift * 2)
    means[:, TRAITS.index("age")] = 0
    return means


@lru_cache(maxsize=1)
def _linear_map() -> tuple[Tensor, Tensor]:
    """Means (M,) and weights (traits + moods, M) of all measures and of the five numbers of every bump, float64."""
    inputs = {name: row for row, name in enumerate((*TRAITS, *MOODS))}
    means = [mean for mean, _ in MEASURES.values()]
    weights = torch.zeros(len(inputs), len(MEASURES) + 5 * len(BUMPS), dtype=torch.float64)
    for column, (_, terms) in enumerate(MEASURES.values()):
        for name, weight in terms.items():
            weights[inputs[name], column] = weight
    for place, bump in enumerate(BUMPS.values()):
        means.extend(bump[:5])
        start = len(MEASURES) + 5 * place
        for name, terms_of_bump in bump.by.items():
            weights[inputs[name], start : start + 5] = torch.tensor(terms_of_bump, dtype=torch.float64)
    return torch.tensor(means, dtype=torch.float64), weights


def _keys(seed: int, purpose: str, *numbers: Tensor) -> Tensor:
    """One random int64 for each sample: a hash of the seed, the purpose and the numbers (int64 (B,))."""
    state = torch.zeros_like(numbers[0])
    for number in numbers:
        state = keyed_random.bits(derive_key(seed, purpose), keyed_random.mix(state) + number)
    return state


def shot_keys(seed: int, identities: Tensor, shots: Tensor) -> Tensor:
    """A random int64 for each shot (B,), from which further draws may count."""
    return _keys(seed, "face shot", identities, shots)


def jpeg_quality(seed: int, identities: Tensor, shots: Tensor, settings: FaceSettings) -> Tensor:
    """The JPEG quality with which a written set stores each shot: int64 (B,)."""
    lowest, highest = settings.jpeg_quality
    place = keyed_random.uniform(derive_key(seed, "face jpeg"), shot_keys(seed, identities, shots))
    return lowest + (place * (highest - lowest + 1)).long()


def _table(values: Tensor, names: tuple[str, ...]) -> Draws:
    return dict(zip(names, values.unbind(1), strict=True))


def draw_traits(seed: int, identities: Tensor, settings: FaceSettings) -> Tensor:
    """Traits of identities (int64 (B,)): float64 (B, len(TRAITS)), standard normal around the mean of the group."""
    counters = _keys(seed, "face identity", identities)[:, None] + torch.arange(len(TRAITS), device=identities.device)
    own = keyed_random.normal(derive_key(seed, "face traits"), counters).clamp(-2.4, 2.4)
    means = _group_means(settings.group_shift).to(identities.device)[group_of(identities)]
    return own * settings.identity_spread + means


def draw_spots(seed: int, identities: Tensor, count: int) -> Tensor:
    """Uniform numbers for the `count` moles of each identity: float64 (B, count, 4)."""
    steps = torch.arange(count * 4, device=identities.device)
    counters = _keys(seed, "face spots", identities)[:, None] + steps
    return keyed_random.uniform(derive_key(seed, "face spots"), counters).view(-1, count, 4)


def draw_shot(seed: int, identities: Tensor, shots: Tensor) -> tuple[Draws, Draws]:
    """The nuisances of a shot: standard normal draws and uniform draws in [0, 1), each float64 (B,) by name."""
    start = shot_keys(seed, identities, shots)[:, None]
    normals = start + torch.arange(len(_SHOT_NORMALS), device=identities.device)
    uniforms = start + torch.arange(len(_SHOT_UNIFORMS), device=identities.device)
    return (
        _table(keyed_random.normal(derive_key(seed, "face normals"), normals).clamp(-2.4, 2.4), _SHOT_NORMALS),
        _table(keyed_random.uniform(derive_key(seed, "face uniforms"), uniforms), _SHOT_UNIFORMS),
    )


def _moods(normal: Draws, traits: Draws, settings: FaceSettings) -> list[Tensor]:
    """Moods of a shot in the order of MOODS. Most faces are calm: smiles and open mouths are one-sided."""
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
    return [values[name] for name in MOODS]


def measures_of(traits: Tensor, normal: Draws, settings: FaceSettings) -> tuple[Draws, Tensor, Draws]:
    """Everything that is linear in traits and moods.

    Args:
        traits: float64 (B, len(TRAITS)).
        normal: the normal draws of the shot.

    Returns:
        The measures by name, each (B,); the bumps (B, K, 5); and traits and moods by name, age including its drift.
    """
    by_name = _table(traits, TRAITS)
    moods = torch.stack(_moods(normal, by_name, settings), dim=1)
    by_name["age"] = by_name["age"] + moods[:, MOODS.index("ageing")]
    inputs = torch.cat([torch.stack([by_name[name] for name in TRAITS], dim=1), moods], dim=1)
    means, weights = (table.to(traits.device) for table in _linear_map())
    values = means + inputs @ weights
    measures = _table(values[:, : len(MEASURES)], tuple(MEASURES))
    return measures, values[:, len(MEASURES) :].view(len(traits), -1, 5), by_name | _table(moods, MOODS)
