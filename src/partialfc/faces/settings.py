"""The difficulty of the procedural faces: how strong each nuisance is, and how far identities differ."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FaceSettings:
    """Strengths of the differences between images of one identity, and of those between identities.

    The defaults are those of every figure in the documentation. 0 switches a nuisance off.
    """

    identity_spread: float = 1.0
    """Factor on every identity trait: smaller makes all identities more alike."""
    group_shift: float = 0.55
    """Standard deviation of the trait means of the four groups, in units of the trait."""
    yaw: float = 20.0
    """Standard deviation of the turn of the head in degrees, cut off at twice that."""
    turn: float = 0.0
    """Degrees by which every head is turned further to its side, for profiles."""
    pitch: float = 9.0
    """Standard deviation of the nod of the head in degrees, cut off at twice that."""
    roll: float = 8.0
    """Standard deviation of the tilt of the head in degrees; alignment takes most of it back."""
    expression: float = 1.0
    """Factor on smile, open mouth, brows and lids."""
    age: float = 1.0
    """Factor on the drift of age between images of an identity: wrinkles, sagging, grey hair."""
    hairstyle: float = 1.0
    """Factor on how hairline, fringe and volume vary between images of an identity."""
    lighting: float = 1.0
    """Factor on how directional, coloured and dim the light gets."""
    white_balance: float = 0.14
    """Standard deviation of the logarithm of the gain of the red and of the blue channel."""
    exposure: float = 0.30
    """Standard deviation of the logarithm of the exposure."""
    tone_curve: float = 0.35
    """Standard deviation of the bend of the tone curve (contrast of dark and bright parts)."""
    detector: float = 0.028
    """Standard deviation of the detector's error at each landmark, in distances between the eyes."""
    blur: float = 1.0
    """Factor on the blur of the lens."""
    noise: float = 0.016
    """Typical standard deviation of the sensor noise; 1 is the range from black to white."""
    glasses: float = 0.16
    """Share of images with glasses."""
    mask: float = 0.04
    """Share of images with a medical mask."""
    accessory_sets: int = 0
    """Sets of hairstyle, beard, glasses, mask and clothes that an identity has, worn in turn by its shots, as those of
    DigiFace-1M (Bae et al. 2023); 0 draws them anew for each image."""
    scenes: int = 0
    """Scenes in which an identity is seen, in turn by its shots: the images of one differ in pose and expression only,
    as the frames of a video; 0 gives each image its own."""
    shifts: tuple[tuple[str, float], ...] = ()
    """Traits whose mean is moved in all images, with the number of standard deviations: ages, for example."""
    jpeg_quality: tuple[int, int] = (75, 95)
    """Lowest and highest JPEG quality with which a set is written."""
