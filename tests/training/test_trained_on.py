"""Models say what they were trained on, from the images to the configuration."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import FIXTURES, small_config
from trained_models import PHOTOGRAPHS, write_model

from partialfc import load_model
from partialfc.config.options import TrainConfig
from partialfc.data.convert import convert
from partialfc.data.corrupt import corrupt
from partialfc.data.sources import open_source
from partialfc.data.sources.base import is_procedural
from partialfc.faces.sets import write_training_set
from partialfc.model.config import ModelConfig
from partialfc.training.build import model_config_of, open_loader

DRAWN = "procedural faces (3 identities, 6 images)"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faces") / "drawn"
    write_training_set(folder, identities=range(3), shots=2, size=16)
    return folder


def config(data: Path, init: Path | None = None) -> TrainConfig:
    base = small_config()
    return replace(
        base,
        data=replace(base.data, path=str(data)),
        backbone=replace(base.backbone, init=None if init is None else str(init)),
    )


def trained_on(data: Path, init: Path | None = None) -> tuple[str, ...]:
    options = config(data, init)
    return model_config_of(options, open_loader(options)).trained_on


def test_the_images_and_what_the_first_weights_have_seen(drawn: Path, tmp_path: Path) -> None:
    assert trained_on(drawn) == (DRAWN,)
    [photographs] = trained_on(FIXTURES / "insightface")
    assert photographs.startswith("insightface (")
    model = write_model(tmp_path / "model")
    assert trained_on(drawn, model) == (*PHOTOGRAPHS, DRAWN)
    torch.save(load_model(model).backbone.state_dict(), tmp_path / "weights.pt")
    assert trained_on(drawn, tmp_path / "weights.pt") == ("unknown data", DRAWN)


@pytest.mark.parametrize(
    ("phrases", "expected"),
    [((), False), ((DRAWN,), True), ((DRAWN, DRAWN), True), ((*PHOTOGRAPHS, DRAWN), False), (("unknown data",), False)],
)
def test_only_procedural_faces(phrases: tuple[str, ...], expected: bool) -> None:
    assert ModelConfig("mini", trained_on=phrases).saw_only_procedural == expected


def test_drawings_stay_drawings(drawn: Path, tmp_path: Path) -> None:
    """Through another format, an overlay, and mixtures."""
    convert(drawn, tmp_path / "parquet", "parquet")
    assert is_procedural(open_source(tmp_path / "parquet"))
    assert trained_on(tmp_path / "parquet") == (DRAWN,)
    corrupt(drawn, tmp_path / "flipped", "flip", fraction=0.5)
    assert is_procedural(open_source(drawn, overlay=tmp_path / "flipped" / "data.overlay"))
    corrupt(drawn, tmp_path / "duplicates", "duplicates", fraction=0.5)
    assert is_procedural(open_source(tmp_path / "duplicates"))
    both, mixed = tmp_path / "both.yaml", tmp_path / "mixed.yaml"
    both.write_text(json.dumps({"sources": [{"path": str(drawn)}, {"path": str(tmp_path / "parquet")}]}))
    mixed.write_text(json.dumps({"sources": [{"path": str(drawn)}, {"path": str(FIXTURES / "insightface")}]}))
    assert is_procedural(open_source(both))
    assert not is_procedural(open_source(mixed))
