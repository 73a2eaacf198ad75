"""What a person and a shot are, drawn from (seed, identity, shot): traits, moods and every nuisance of the shot."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from partialfc.core import keyed_random
from partialfc.core.keyed_random import derive_key
from partialfc.faces.identity import BUMPS, MEASURES, MOODS, TRAITS
from partialfc.faces.settings import FaceSettings

GROUPS = 4
MOLES = 5

# Draws are cut off there: no monsters.
_LONGEST = 2.4

# Numbers of samples by name.
Draws = dict[str, Tensor]

_SHOT_NORMALS: tuple[str, ...] = (
    *MOODS, "yaw", "pitch", "roll", "distance", "light_side", "light_up", "light_warm", "light_power", "ambient",
    "balance_red", "balance_blue", "exposure", "tone_curve", "saturation", "noise", "hairline", "hair_volume", "fringe",
    "hair_part", "hair_side", "hair_tone", "beard", "lens_width", "lens_height", "frame_a", "frame_b", "frame_scale",
    "back_a", "back_b", "blush",
)  # fmt: skip
_HAIRSTYLE = ("hairline", "hair_volume", "fringe", "hair_part", "hair_side", "hair_tone", "beard")
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


def _by_name(values: Tensor, names: tuple[str, ...]) -> Draws:
    return dict(zip(names, values.unbind(1), strict=True))


def _moods(normal: Draws, settings: FaceSettings) -> list[Tensor]:
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


@dataclass(frozen=True)
class Plan:
    """All numbers of a batch of shots, float32: what to draw, before any pixel is.

    `measures` (B, M), `traits` (B, traits + moods; age includes its drift), `bumps` (B, K, 5), `normals` and `uniforms`
    of the shot (B, ...), `moles` (B, MOLES, 4) of the identity; `keys` int64 (B,) to draw more from.
    """

    measures: Tensor
    traits: Tensor
    bumps: Tensor
    normals: Tensor
    uniforms: Tensor
    moles: Tensor
    keys: Tensor

    def part(self, chosen: slice | Tensor) -> Plan:
        """The plan of some of the samples."""
        return Plan(*(getattr(self, field)[chosen] for field in self.__dataclass_fields__))

    def measure_columns(self) -> Draws:
        """Measures by name as (B, 1, 1), ready to meet pictures."""
        return _by_name(self.measures[:, :, None, None], tuple(MEASURES))

    def trait_columns(self) -> Draws:
        """Traits and moods by name as (B, 1, 1)."""
        return _by_name(self.traits[:, :, None, None], (*TRAITS, *MOODS))

    def shot(self) -> Draws:
        """Standard normal and uniform draws of the shot by name, (B,)."""
        return _by_name(self.normals, _SHOT_NORMALS) | _by_name(self.uniforms, _SHOT_UNIFORMS)

    def shot_columns(self) -> Draws:
        """The same as (B, 1, 1)."""
        return _by_name(self.normals[:, :, None, None], _SHOT_NORMALS) | _by_name(
            self.uniforms[:, :, None, None], _SHOT_UNIFORMS
        )


def make_plan(seed: int, identities: Tensor, shots: Tensor, settings: FaceSettings) -> Plan:
    """Draw everything about shots (int64 (B,)) of identities (int64 (B,))."""
    device = identities.device
    person = _keys(seed, "face identity", identities)[:, None]
    traits = keyed_random.normal(derive_key(seed, "face traits"), person + torch.arange(len(TRAITS), device=device))
    means = _group_means(settings.group_shift).to(device)[group_of(identities)]
    traits = traits.clamp(-_LONGEST, _LONGEST) * settings.identity_spread + means
    spots = keyed_random.uniform(derive_key(seed, "face moles"), person + torch.arange(4 * MOLES, device=device))
    keys = shot_keys(seed, identities, shots)
    counters = keys[:, None] + torch.arange(max(len(_SHOT_NORMALS), len(_SHOT_UNIFORMS)), device=device)
    normals = keyed_random.normal(derive_key(seed, "face normals"), counters[:, : len(_SHOT_NORMALS)])
    normals = normals.clamp(-_LONGEST, _LONGEST)
    normals[:, [_SHOT_NORMALS.index(name) for name in _HAIRSTYLE]] *= settings.hairstyle
    uniforms = keyed_random.uniform(derive_key(seed, "face uniforms"), counters[:, : len(_SHOT_UNIFORMS)])
    moods = torch.stack(_moods(_by_name(normals, _SHOT_NORMALS), settings), dim=1)
    traits[:, TRAITS.index("age")] += moods[:, MOODS.index("ageing")]
    traits = torch.cat([traits, moods], dim=1)
    # In double precision, so that the order of a sum, which may depend on the batch, does not show in float32.
    start, weights = (table.to(device) for table in _linear_map())
    values = (start + traits @ weights).float()
    return Plan(
        measures=values[:, : len(MEASURES)],
        traits=traits.float(),
        bumps=values[:, len(MEASURES) :].view(len(values), -1, 5),
        normals=normals.float(),
        uniforms=uniforms.float(),
        moles=spots.float().view(-1, MOLES, 4),
        keys=keys,
    )
