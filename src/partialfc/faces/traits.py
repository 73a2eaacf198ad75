"""The generative model of a procedural face: traits and expressions, and the linear map from them to the drawing.

An identity is a vector of independent standard normal traits. An image adds expressions (and a drift of age). Every
measure of the drawing (where the eyes are, how full a lip is) and every bump of the head's surface is a mean plus a
weighted sum of traits and expressions: the tables MEASURES and BUMPS are the whole model.

Points on the head are (a, b), the azimuthal equal-area map of directions from the centre of the head: (0, 0) looks
straight ahead at eye level, a grows to the image's right, b grows downwards, and |(a, b)| = 1.41 is 90 degrees away.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# One number a sample for each name, (N, 1, 1) or (N,).
Named = dict[str, Tensor]

TRAITS: tuple[str, ...] = (
    "head_width", "head_height", "head_depth", "forehead", "temple", "cheekbone", "cheekbone_place", "cheek",
    "jaw_width", "jaw_place", "chin_width", "chin_length", "chin_forward", "chin_cleft", "face_flat",
    "eye_distance", "eye_height", "eye_size", "eye_open", "eye_tilt", "eye_depth", "eye_skew", "lid_crease", "lid_low",
    "eye_bag", "iris_size", "iris_tone", "iris_hue",
    "brow_height", "brow_thick", "brow_arch", "brow_tilt", "brow_length", "brow_gap", "brow_ridge", "brow_dense",
    "nose_length", "nose_wing", "nose_bridge", "nose_bridge_width", "nose_tip", "nose_tip_up", "nose_hump", "nostril",
    "nose_bend", "philtrum",
    "mouth_height", "mouth_width", "upper_lip", "lower_lip", "lip_bow", "mouth_curve", "lip_out", "lip_red",
    "ear_size", "ear_out", "ear_height",
    "skin_tone", "skin_warm", "freckle", "blush", "fold", "brow_line", "age",
    "hairline", "hair_peak", "hair_side", "hair_volume", "hair_dark", "hair_red", "hair_length", "hair_part", "fringe",
    "beard", "beard_low", "skew",
)  # fmt: skip

EXPRESSIONS: tuple[str, ...] = (
    "smile", "mouth_open", "brow_raise", "frown", "squint", "pucker", "gaze_a", "gaze_b", "ageing",
)  # fmt: skip

# Mean, and the weights of traits and expressions.
MEASURES: dict[str, tuple[float, dict[str, float]]] = {
    # The ellipsoid behind the head: half width, height, depth (1 is 11 cm).
    "radius_x": (0.715, {"head_width": 0.026}),
    "radius_y": (1.05, {"head_height": 0.028}),
    "radius_z": (0.90, {"head_depth": 0.025}),
    # Eyes: position, half width, height of the upper and depth of the lower lid, tilt (rise of the outer corner).
    "eye_a": (0.405, {"eye_distance": 0.030}),
    "eye_b": (-0.02, {"eye_height": 0.022}),
    "eye_width": (0.162, {"eye_size": 0.019}),
    "eye_upper": (0.074, {"eye_open": 0.015, "squint": -0.020, "smile": -0.007, "brow_raise": 0.008, "age": -0.004}),
    "eye_lower": (0.044, {"lid_low": 0.009, "squint": -0.008, "smile": -0.008}),
    "eye_tilt": (0.07, {"eye_tilt": 0.085}),
    "eye_skew": (0.0, {"eye_skew": 0.28}),
    "crease": (0.050, {"lid_crease": 0.020, "age": -0.005}),
    "iris": (0.066, {"iris_size": 0.006}),
    # Brows: lower edge of the middle, half thickness, inner and outer end, arch, rise towards the outer end.
    "brow_b": (-0.215, {"brow_height": 0.030, "eye_height": 0.018, "brow_raise": -0.032, "frown": 0.020}),
    "brow_thick": (0.033, {"brow_thick": 0.0105}),
    "brow_in": (0.155, {"brow_gap": 0.032, "eye_distance": 0.012, "frown": -0.018}),
    "brow_out": (0.655, {"brow_length": 0.042, "eye_distance": 0.022}),
    "brow_arch": (0.060, {"brow_arch": 0.028}),
    "brow_tilt": (-0.015, {"brow_tilt": 0.050, "frown": 0.05, "brow_raise": -0.02}),
    # Nose: height of the tip, position of the wings and nostrils.
    "nose_b": (0.245, {"nose_length": 0.032}),
    "nostril_a": (0.078, {"nose_wing": 0.013}),
    "nostril_b": (0.325, {"nose_length": 0.032, "nose_tip_up": -0.012}),
    "nostril": (0.026, {"nostril": 0.006, "nose_tip_up": 0.004}),
    "wing_a": (0.150, {"nose_wing": 0.023}),
    # Mouth: height of its line, half width, thickness of the lips, cupid's bow, drop of the corners, opening.
    "mouth_b": (0.578, {"mouth_height": 0.022, "nose_length": 0.016, "philtrum": 0.014, "mouth_open": 0.004}),
    "mouth_width": (0.278, {"mouth_width": 0.032, "smile": 0.034, "pucker": -0.035, "mouth_open": -0.008}),
    "lip_upper": (0.050, {"upper_lip": 0.0155, "smile": -0.007, "pucker": 0.008, "age": -0.004}),
    "lip_lower": (0.066, {"lower_lip": 0.017, "smile": -0.005, "pucker": 0.010, "age": -0.004}),
    "lip_bow": (0.020, {"lip_bow": 0.020}),
    "mouth_curve": (0.006, {"mouth_curve": 0.016, "smile": -0.050, "pucker": 0.010, "frown": 0.014}),
    "mouth_gap": (-0.005, {"mouth_open": 0.055, "smile": 0.010}),
    # Hair: where the forehead ends, how far the sides come in, how it grows.
    "hairline": (-0.66, {"hairline": 0.060, "forehead": -0.03, "age": -0.030}),
    "hair_peak": (0.02, {"hair_peak": 0.050}),
    "hair_side": (1.10, {"hair_side": 0.055, "head_width": -0.02}),
    "hair_volume": (0.075, {"hair_volume": 0.035, "age": -0.010}),
    "skew": (0.0, {"skew": 0.022}),
}


class Bump(NamedTuple):
    """One Gaussian hill (or hollow) of the head's radius: mean centre, widths and height, and each trait's weights."""

    a: float
    b: float
    wide_a: float
    wide_b: float
    height: float
    by: dict[str, tuple[float, float, float, float, float]]


BUMPS: dict[str, Bump] = {
    # The large forms: the face stands out from the skull, the throat recedes under the chin.
    "lower face": Bump(0.0, 0.80, 0.62, 0.30, 0.115, {
        "chin_width": (0, 0, 0.030, 0, 0), "chin_forward": (0, 0, 0, 0, 0.014), "head_depth": (0, 0, 0, 0, 0.004)}),
    "throat": Bump(0.0, 1.42, 0.60, 0.22, -0.20, {"chin_length": (0, 0.02, 0, 0, 0)}),
    "jaw corner": Bump(0.93, 0.80, 0.22, 0.24, 0.010, {
        "jaw_width": (0, 0, 0, 0, 0.034), "jaw_place": (0, 0.07, 0, 0, 0), "age": (0, 0.01, 0, 0, 0.008)}),
    "jaw side": Bump(0.66, 1.02, 0.20, 0.20, 0.0, {
        "jaw_width": (0, 0, 0, 0, 0.014), "chin_width": (0, 0, 0, 0, 0.016)}),
    "cheekbone": Bump(0.74, 0.16, 0.24, 0.15, 0.035, {
        "cheekbone": (0, 0, 0, 0, 0.022), "cheekbone_place": (0.03, 0.04, 0, 0, 0), "smile": (0, -0.01, 0, 0, 0.014)}),
    "apple": Bump(0.44, 0.27, 0.15, 0.12, 0.020, {
        "cheek": (0, 0, 0, 0, 0.017), "smile": (0, -0.02, 0, 0, 0.028), "age": (0, 0.02, 0, 0, -0.006)}),
    "hollow": Bump(0.68, 0.52, 0.17, 0.17, -0.026, {"cheek": (0, 0, 0, 0, 0.026), "age": (0, 0, 0, 0, -0.008)}),
    "temple": Bump(0.95, -0.36, 0.20, 0.26, -0.035, {"temple": (0, 0, 0, 0, 0.024), "age": (0, 0, 0, 0, -0.006)}),
    "forehead": Bump(0.0, -0.52, 0.55, 0.22, 0.020, {"forehead": (0, 0, 0, 0, 0.020)}),
    "front": Bump(0.0, 0.10, 0.55, 0.45, -0.010, {"face_flat": (0, 0, 0, 0, -0.020)}),
    # The eye sockets and the eyeballs in them.
    "socket": Bump(0.385, -0.05, 0.15, 0.085, -0.062, {
        "eye_depth": (0, 0, 0, 0, -0.020), "eye_distance": (0.03, 0, 0, 0, 0), "eye_height": (0, 0.022, 0, 0, 0)}),
    "inner corner": Bump(0.20, -0.01, 0.065, 0.075, -0.030, {
        "eye_distance": (0.02, 0, 0, 0, 0), "nose_bridge": (0, 0, 0, 0, -0.008)}),
    "eyeball": Bump(0.41, -0.015, 0.10, 0.062, 0.034, {
        "eye_size": (0, 0, 0.008, 0, 0.002), "eye_distance": (0.03, 0, 0, 0, 0), "eye_height": (0, 0.022, 0, 0, 0)}),
    "eye bag": Bump(0.41, 0.095, 0.10, 0.030, 0.004, {
        "eye_bag": (0, 0, 0, 0, 0.006), "age": (0, 0, 0, 0, 0.004), "eye_distance": (0.03, 0, 0, 0, 0)}),
    "brow ridge": Bump(0.36, -0.175, 0.24, 0.070, 0.030, {
        "brow_ridge": (0, 0, 0, 0, 0.016), "brow_height": (0, 0.02, 0, 0, 0), "frown": (0, 0.01, 0, 0, 0.006)}),
    "glabella": Bump(0.0, -0.19, 0.10, 0.085, 0.018, {"brow_ridge": (0, 0, 0, 0, 0.010)}),
    # The nose: root, bridge, hump, tip, wings; the hollow beneath it.
    "nose root": Bump(0.0, -0.05, 0.085, 0.10, 0.020, {
        "nose_bridge": (0, 0, 0, 0, 0.020), "nose_bridge_width": (0, 0, 0.010, 0, 0)}),
    "nose bridge": Bump(0.0, 0.09, 0.078, 0.095, 0.085, {
        "nose_bridge": (0, 0, 0, 0, 0.018), "nose_bridge_width": (0, 0, 0.014, 0, 0),
        "nose_length": (0, 0.01, 0, 0.01, 0)}),
    "nose hump": Bump(0.0, 0.08, 0.05, 0.06, 0.010, {"nose_hump": (0, 0, 0, 0, 0.016)}),
    "nose tip": Bump(0.0, 0.235, 0.092, 0.068, 0.140, {
        "nose_tip": (0, 0, 0.014, 0.007, 0.012), "nose_length": (0, 0.032, 0, 0.004, 0.008),
        "nose_tip_up": (0, -0.016, 0, 0, 0.006)}),
    "nose wing": Bump(0.135, 0.275, 0.052, 0.048, 0.050, {
        "nose_wing": (0.023, 0, 0.004, 0, 0.006), "nose_length": (0, 0.032, 0, 0, 0)}),
    "under nose": Bump(0.0, 0.40, 0.12, 0.050, -0.012, {
        "nose_length": (0, 0.028, 0, 0, 0), "philtrum": (0, 0, 0, 0, -0.006)}),
    "philtrum": Bump(0.0, 0.455, 0.028, 0.055, -0.008, {"philtrum": (0, 0.012, 0, 0.004, -0.006)}),
    # The mouth and the chin.
    "muzzle": Bump(0.0, 0.54, 0.24, 0.14, 0.022, {"lip_out": (0, 0, 0, 0, 0.016), "mouth_height": (0, 0.02, 0, 0, 0)}),
    "upper lip": Bump(0.0, 0.545, 0.17, 0.030, 0.016, {
        "upper_lip": (0, -0.004, 0, 0.004, 0.006), "mouth_height": (0, 0.022, 0, 0, 0), "philtrum": (0, 0.014, 0, 0, 0),
        "mouth_width": (0, 0, 0.018, 0, 0), "nose_length": (0, 0.016, 0, 0, 0)}),
    "lower lip": Bump(0.0, 0.622, 0.14, 0.036, 0.026, {
        "lower_lip": (0, 0.005, 0, 0.005, 0.007), "mouth_height": (0, 0.022, 0, 0, 0), "mouth_open": (0, 0.05, 0, 0, 0),
        "mouth_width": (0, 0, 0.016, 0, 0), "nose_length": (0, 0.016, 0, 0, 0), "philtrum": (0, 0.014, 0, 0, 0)}),
    "mouth corner": Bump(0.30, 0.585, 0.050, 0.050, -0.018, {
        "mouth_width": (0.032, 0, 0, 0, 0), "smile": (0.034, -0.03, 0, 0, -0.010),
        "mouth_height": (0, 0.022, 0, 0, 0)}),
    "under lip": Bump(0.0, 0.725, 0.16, 0.045, -0.030, {
        "chin_forward": (0, 0, 0, 0, -0.006), "mouth_height": (0, 0.02, 0, 0, 0), "mouth_open": (0, 0.05, 0, 0, 0.01)}),
    "chin": Bump(0.0, 0.88, 0.185, 0.115, 0.055, {
        "chin_length": (0, 0.030, 0, 0, 0.016), "chin_width": (0, 0, 0.032, 0, 0), "chin_forward": (0, 0, 0, 0, 0.014),
        "mouth_open": (0, 0.045, 0, 0, 0.01)}),
    "chin cleft": Bump(0.0, 0.90, 0.030, 0.060, 0.0, {"chin_cleft": (0, 0, 0, 0, -0.010)}),
    "fold": Bump(0.33, 0.43, 0.045, 0.11, -0.010, {
        "fold": (0.012, 0, 0, 0, -0.007), "age": (0, 0, 0, 0, -0.007), "smile": (0.02, 0, 0, 0, -0.016)}),
    # The ears.
    "ear": Bump(1.47, 0.13, 0.075, 0.17, 0.15, {
        "ear_size": (0, 0, 0.006, 0.022, 0.012), "ear_out": (0, 0, 0, 0, 0.030), "ear_height": (0, 0.035, 0, 0, 0)}),
    "ear lobe": Bump(1.45, 0.30, 0.06, 0.06, 0.05, {
        "ear_size": (0, 0.03, 0, 0, 0.012), "ear_height": (0, 0.035, 0, 0, 0)}),
}  # fmt: skip


def by_name(values: Tensor, names: tuple[str, ...]) -> Named:
    """The columns of `values` (N, K), each as (N, 1, 1) to broadcast over pixels."""
    return dict(zip(names, values[:, :, None, None].unbind(1), strict=True))


def flat(named: Named) -> Named:
    """The same numbers as (N,)."""
    return {name: values[:, 0, 0] for name, values in named.items()}


def shape_of(traits: Tensor) -> tuple[Named, Tensor]:
    """Measures by name, (N, 1, 1), and bumps (N, K, 5) of traits and expressions, float64 (N, traits + expressions)."""
    # In double precision, so that the order of a sum, which may depend on the batch, does not show in float32.
    means, weights = (table.to(traits.device) for table in _linear_map())
    values = (means + traits @ weights).float()
    return by_name(values[:, : len(MEASURES)], tuple(MEASURES)), values[:, len(MEASURES) :].view(len(values), -1, 5)


@lru_cache(maxsize=1)
def _linear_map() -> tuple[Tensor, Tensor]:
    """Means (M,) and weights (traits + expressions, M) of all measures and the five numbers of every bump, float64."""
    rows = {name: row for row, name in enumerate((*TRAITS, *EXPRESSIONS))}
    means = [mean for mean, _ in MEASURES.values()]
    weights = torch.zeros(len(rows), len(MEASURES) + 5 * len(BUMPS), dtype=torch.float64)
    for column, (_, terms) in enumerate(MEASURES.values()):
        for name, weight in terms.items():
            weights[rows[name], column] = weight
    for number, bump in enumerate(BUMPS.values()):
        means.extend(bump[:5])
        start = len(MEASURES) + 5 * number
        for name, bump_terms in bump.by.items():
            weights[rows[name], start : start + 5] = torch.tensor(bump_terms, dtype=torch.float64)
    return torch.tensor(means, dtype=torch.float64), weights
