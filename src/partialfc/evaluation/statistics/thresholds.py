"""`thresholds.json` beside a model: thresholds measured once, and what they do elsewhere."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from partialfc.core.errors import InputError
from partialfc.core.files import write_file
from partialfc.core.schema import check_schema_version
from partialfc.evaluation.statistics.calibration import Calibration, calibrate
from partialfc.evaluation.statistics.figures import Figure
from partialfc.evaluation.statistics.intervals import fmr_at, fnmr_at, interval_facts, why_unresolvable
from partialfc.evaluation.statistics.metrics import Scores, threshold_at_far

NAME = "thresholds.json"
SCHEMA_VERSION = 1
FMRS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


@dataclass(frozen=True)
class Threshold:
    """One operating point.

    Attributes:
        target: the FMR that was asked for.
        cosine: a pair is accepted if its cosine is at or above it; None where the pairs could not resolve the target.
        fmr: the FMR there, never above the target, with the interval of the FMR on other pairs of the same kind.
        fnmr: likewise; failures count as non-matches.
    """

    target: float
    cosine: float | None
    fmr: Figure
    fnmr: Figure

    @property
    def squared_distance(self) -> float | None:
        """Between unit embeddings: a pair is accepted if its squared distance, 2 - 2 cosine, is at or below it."""
        return None if self.cosine is None else max(0.0, 2.0 - 2.0 * self.cosine)

    @property
    def distance(self) -> float | None:
        """The square root of the squared distance: the threshold of the L2 distance."""
        return None if self.squared_distance is None else math.sqrt(self.squared_distance)


@dataclass(frozen=True)
class Thresholds:
    """The thresholds of one model.

    Attributes:
        contract: of the model.
        measured_on: the name of the pairs, their counts, and how the intervals were made.
        thresholds: one a target.
        calibration: from cosine to natural log-likelihood ratio; None where only a tail of the impostors was kept.
    """

    contract: str
    measured_on: dict[str, Any]
    thresholds: tuple[Threshold, ...]
    calibration: Calibration | None


@dataclass(frozen=True)
class Realised:
    """What a threshold that was set elsewhere does here.

    Attributes:
        threshold: as it was set, with its target.
        fmr, fnmr: here, with their intervals.
        expected: the range of the realised FMR in 95 of 100 sets like this one, if people and images are as where the
            threshold was set: it holds the uncertainty of both measurements. None where one is not known.
        groups: the realised FMR and FNMR of each group.
    """

    threshold: Threshold
    fmr: Figure
    fnmr: Figure
    expected: tuple[float, float] | None
    groups: dict[str, tuple[Figure, Figure]]

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON: target, cosine, fmr, fnmr, expected, and fmr and fnmr of each group."""
        return {
            "target": self.threshold.target,
            "cosine": self.threshold.cosine,
            "fmr": self.fmr.to_dict(),
            "fnmr": self.fnmr.to_dict(),
            "expected": None if self.expected is None else list(self.expected),
            "groups": {
                name: {"fmr": fmr.to_dict(), "fnmr": fnmr.to_dict()} for name, (fmr, fnmr) in self.groups.items()
            },
        }


def measure_thresholds(scores: Scores, *, name: str, contract: str) -> Thresholds:
    """The thresholds of FMR 1e-2 to 1e-6 on cosines.

    Args:
        name: of what the scores were measured on.
        contract: of the model.
    """
    facts = {
        "name": name,
        "genuine_pairs": scores.genuine_pairs,
        "impostor_pairs": scores.impostors,
        "failures": scores.failures,
        **interval_facts(scores),
    }
    calibration = calibrate(scores.genuine, scores.impostor) if scores.complete and len(scores.genuine) else None
    return Thresholds(contract, facts, tuple(_measure(scores, target) for target in FMRS), calibration)


def _measure(scores: Scores, target: float) -> Threshold:
    if (reason := why_unresolvable(scores, target)) is not None:
        return Threshold(target, None, Figure(None, reason=reason), Figure(None, reason=reason))
    cosine = threshold_at_far(scores, target)
    return Threshold(target, cosine, fmr_at(scores, cosine), fnmr_at(scores, cosine))


def apply_thresholds(
    thresholds: Thresholds, scores: Scores, groups: Mapping[str, Scores] | None = None
) -> list[Realised]:
    """What the thresholds, set elsewhere, do on these scores, for each that could be set.

    Args:
        groups: the scores of the pairs within each group, by its name.
    """
    found = []
    for threshold in thresholds.thresholds:
        if (cosine := threshold.cosine) is None:
            continue
        by_group = {name: (fmr_at(of, cosine), fnmr_at(of, cosine)) for name, of in (groups or {}).items()}
        fmr = fmr_at(scores, cosine)
        found.append(Realised(threshold, fmr, fnmr_at(scores, cosine), _expected(threshold.fmr, fmr), by_group))
    return found


def _expected(there: Figure, here: Figure) -> tuple[float, float] | None:
    """The range of a second measurement: the square root of a rate has the same deviation whatever the rate."""
    ends = (there.value, there.low, there.high, here.low, here.high)
    if any(end is None for end in ends):
        return None
    center, low, high, low_here, high_here = (math.sqrt(end) for end in ends if end is not None)
    reach = math.hypot(high - low, high_here - low_here) / 2.0
    return max(0.0, center - reach) ** 2, min(1.0, center + reach) ** 2


def write_thresholds(thresholds: Thresholds, folder: Path) -> Path:
    """Write `thresholds.json` into the folder of the model, atomically, and return its path."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "contract": thresholds.contract,
        "measured_on": thresholds.measured_on,
        "calibration": None if thresholds.calibration is None else asdict(thresholds.calibration),
        "thresholds": [
            {
                "target": row.target,
                "cosine": row.cosine,
                "squared_distance": row.squared_distance,
                "distance": row.distance,
                "fmr": row.fmr.to_dict(),
                "fnmr": row.fnmr.to_dict(),
            }
            for row in thresholds.thresholds
        ],
    }
    write_file(folder / NAME, json.dumps(content, indent=2) + "\n")
    return folder / NAME


def read_thresholds(path: Path) -> Thresholds:
    """Read a file of thresholds, or that in the folder of a model.

    Raises:
        InputError: there is none, it is damaged, or a newer version wrote it.
    """
    path = path / NAME if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        check_schema_version(path, content, SCHEMA_VERSION)
        calibration = content["calibration"]
        return Thresholds(
            str(content["contract"]),
            dict(content["measured_on"]),
            tuple(
                Threshold(float(row["target"]), row["cosine"], Figure(**row["fmr"]), Figure(**row["fnmr"]))
                for row in content["thresholds"]
            ),
            None if calibration is None else Calibration(float(calibration["scale"]), float(calibration["offset"])),
        )
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist: measure the thresholds of the model first.") from error
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no file of thresholds, or is damaged ({error}): measure them again.") from error
