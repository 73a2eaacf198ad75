"""Two pictures, one question: the same person?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from partialfc.core.errors import InputError
from partialfc.data.photographs.face import Detector, Pixels
from partialfc.data.sources.base import is_procedural_folder
from partialfc.evaluation.statistics.figures import rate_name
from partialfc.evaluation.statistics.thresholds import Threshold, Thresholds
from partialfc.model.contract import contract_of, same_source
from partialfc.model.embed import embed
from partialfc.model.files import Model
from partialfc.use.pictures import Picture, crop_of


@dataclass(frozen=True)
class Verification:
    """The answer of a model on two pictures.

    Attributes:
        score: cosine of the two embeddings.
        threshold: the operating point, with the rates that it had where it was measured.
        measured_on: the pairs on which that was.
        is_same: whether the score is at or above the threshold.
        probability: that both show one person, if that was as likely as not beforehand; None without a calibration.
        crops: the aligned faces, uint8 (2, S, S, 3).
    """

    score: float
    threshold: Threshold
    measured_on: dict[str, Any]
    is_same: bool
    probability: float | None
    crops: Pixels

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON."""
        threshold = {"target": self.threshold.target, "cosine": self.threshold.cosine}
        rates = {"fmr": self.threshold.fmr.to_dict(), "fnmr": self.threshold.fnmr.to_dict()}
        answer = {"score": self.score, "same": self.is_same, "probability": self.probability}
        return {**answer, "threshold": {**threshold, **rates}, "measured_on": self.measured_on}

    def text(self) -> str:
        """Three lines for a reader."""
        fmr, target = self.threshold.fmr, rate_name(self.threshold.target)
        interval = "" if fmr.low is None or fmr.high is None else f", 95 % from {fmr.low:.2g} to {fmr.high:.2g}"
        where = f"{self.measured_on['name']}, {self.measured_on['impostor_pairs']:,} impostor pairs"
        lines = [f"{'the same person' if self.is_same else 'not taken for the same person'}: cosine {self.score:.4f}"]
        measured = f"measured {fmr.value:.2g}{interval}, on {where}"
        lines.append(f"threshold {self.threshold.cosine:.4f} for FMR {target} ({measured})")
        if self.probability is not None:
            lines.append(f"probability {self.probability:.2%} that they are the same, if it was 50 % beforehand")
        return "\n".join(lines)


def verify(
    model: Model,
    a: Picture,
    b: Picture,
    thresholds: Thresholds,
    *,
    fmr: float = 1e-3,
    faces_in: Detector | None = None,
    force: bool = False,
) -> Verification:
    """Whether two pictures show the same person.

    Args:
        a, b: image files or pixels, see `crop_of`.
        thresholds: of the model.
        fmr: the false match rate that the threshold was set for, one of those that were measured.
        faces_in: the detector for pictures that are no aligned crops.
        force: let a model that has seen only procedural faces decide about other pictures.

    Raises:
        InputError: a picture cannot be used, the thresholds are another model's or have no such rate, or the model
            cannot decide.
    """
    if model.config.saw_only_procedural and not force and not all(_is_procedural(one) for one in (a, b)):
        raise InputError(
            "The model was trained on procedural faces alone and decides nothing about photographs: give a model that "
            "was trained on photographs, or --force (force=True) for drawings."
        )
    if not same_source(thresholds.contract, contract := contract_of(model)):
        raise InputError(
            f"The thresholds were measured with another model (contract {thresholds.contract[:12]}…, this is "
            f"{contract[:12]}…): measure them with this one, by evaluate --write-thresholds."
        )
    threshold = _threshold_for(thresholds, fmr)
    crops = np.stack([crop_of(one, model.config.image_size, faces_in) for one in (a, b)])
    left, right = embed(model, crops).double().cpu().numpy()
    score = float(left @ right / (np.linalg.norm(left) * np.linalg.norm(right)))
    if not math.isfinite(score):
        raise InputError("The model gives no finite embedding of these pictures: use a model saved before it diverged.")
    probability = None
    if thresholds.calibration is not None:
        probability = float(np.exp(-np.logaddexp(0.0, -thresholds.calibration(score))))
    is_same = threshold.cosine is not None and score >= threshold.cosine
    return Verification(score, threshold, thresholds.measured_on, is_same, probability, crops)


def _is_procedural(picture: Picture) -> bool:
    """Whether the picture stands in a folder of a set of procedural faces."""
    if isinstance(picture, np.ndarray):
        return False
    return any(is_procedural_folder(folder) for folder in list(Path(picture).absolute().parents)[:2])


def _threshold_for(thresholds: Thresholds, fmr: float) -> Threshold:
    rows = {row.target: row for row in thresholds.thresholds}
    found = next((row for target, row in rows.items() if math.isclose(target, fmr)), None)
    usable = ", ".join(rate_name(target) for target, row in rows.items() if row.cosine is not None) or "none"
    if found is None:
        raise InputError(f"There is no threshold for FMR {fmr:g}: the thresholds are for FMR {usable}.")
    if found.cosine is None:
        raise InputError(
            f"The pairs of the thresholds could not resolve FMR {rate_name(found.target)}: choose another with --fmr "
            f"({usable}), or measure the thresholds on more pairs."
        )
    return found
