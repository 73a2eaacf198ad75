"""Model folders for tests of what one does with a model: random weights, and thresholds that were not measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from partialfc.backbones import create_backbone
from partialfc.evaluation.statistics.calibration import Calibration
from partialfc.evaluation.statistics.figures import Figure
from partialfc.evaluation.statistics.thresholds import Threshold, Thresholds, write_thresholds
from partialfc.model.config import ModelConfig
from partialfc.model.contract import contract_of
from partialfc.model.files import load_model, save_model

PHOTOGRAPHS = ("ms1mv3 (93,431 identities, 5,179,510 images)",)
DRAWINGS = ("procedural faces (100 identities, 800 images)",)


def write_model(folder: Path, *, cosine: float = 0.9, size: int = 16, **config: Any) -> Path:
    """A model folder with thresholds: FMR 1e-3 at `cosine`, and 1e-6 that was not resolvable."""
    options = {"trained_on": PHOTOGRAPHS, **config}
    backbone = create_backbone("mini", embedding_dim=8, image_size=size, seed=1)
    save_model(folder, backbone, ModelConfig("mini", 8, size, **options))
    rows = (
        Threshold(1e-3, cosine, Figure(0.0009, 0.0005, 0.0014), Figure(0.03, 0.02, 0.04)),
        Threshold(1e-6, None, *[Figure(None, reason="3,000 impostor pairs cannot resolve 1e-6.")] * 2),
    )
    facts = {"name": "lfw", "genuine_pairs": 3000, "impostor_pairs": 3000}
    calibration = Calibration(20.0, -20.0 * cosine)
    write_thresholds(Thresholds(contract_of(load_model(folder)), facts, rows, calibration), folder)
    return folder


def noise(seed: int, size: int = 16) -> np.ndarray:
    """A coarse random picture: uint8 (size, size, 3)."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return blocks.repeat(size // 4, axis=0).repeat(size // 4, axis=1)
