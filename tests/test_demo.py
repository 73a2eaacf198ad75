"""The demo, small: what it writes, reports and resumes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from partialfc.config.options import TrainConfig
from partialfc.config.recipes import RECIPES
from partialfc.core.errors import InputError
from partialfc.data.pair_files import read_pairs
from partialfc.data.sources import open_source
from partialfc.demo import demo
from partialfc.evaluation.pairs import evaluate_pair_set
from partialfc.faces.sets import FaceWorld
from partialfc.model.files import load_model

WORLD = FaceWorld(identities=12, shots=3, pairs=20, pair_identities=8, image_size=32)


def small_recipe() -> TrainConfig:
    recipe = RECIPES["demo"]
    data = replace(recipe.data, global_batch_size=12, micro_batch_size=12, workers=0)
    return replace(recipe, data=data, head=replace(recipe.head, sample_rate=0.5))


def test_the_demo_renders_trains_tests_and_reports(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    summary = demo(out, seed=3, world=WORLD, recipe=small_recipe(), quiet=True)
    assert len(open_source(out / "data" / "train")) == 36
    pairs = read_pairs(out / "data" / "pairs.bin")
    assert summary.accuracy == evaluate_pair_set(load_model(out / "run"), pairs).accuracy
    assert (summary.pixel_accuracy, summary.color_accuracy) == pytest.approx((0.45, 0.4))
    assert summary.training.steps == 9
    assert (out / "report.html").is_file()
    assert (out / "faces.png").is_file()
    assert set(summary.seconds) == {"faces", "baselines", "training", "report"}
    json.dumps(summary.to_dict())
    text = summary.text()
    assert len(text.splitlines()) <= 30  # one screen
    for word in ("trained model", "raw pixels", "colours", "report.html", "partialfc train"):
        assert word in text
    again = demo(out, seed=3, world=WORLD, recipe=small_recipe(), quiet=True)  # nothing is done twice
    assert again.accuracy == summary.accuracy
    assert again.training.images_per_second is None


@pytest.mark.slow
def test_its_model_knows_more_than_pixels_and_colours_of_identities_never_seen(tmp_path: Path) -> None:
    world = replace(WORLD, identities=60, shots=8, pairs=200, pair_identities=60)
    recipe = small_recipe()
    recipe = replace(
        recipe,
        data=replace(recipe.data, global_batch_size=24, micro_batch_size=24),
        schedule=replace(recipe.schedule, epochs=12),
    )
    summary = demo(tmp_path / "demo", seed=3, world=world, recipe=recipe, quiet=True)
    assert summary.accuracy >= 0.68  # 0.74 when this was written, and 0.59 and 0.57 of pixels and colours
    assert max(summary.pixel_accuracy, summary.color_accuracy) <= 0.6


@pytest.mark.slow
def test_an_interrupted_demo_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "demo"
    with monkeypatch.context() as patch:
        patch.setattr("partialfc.faces.sets.write_pair_set", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            demo(out, world=WORLD, recipe=small_recipe(), quiet=True)
    before = (out / "data" / "train" / "train.rec").stat().st_mtime_ns
    demo(out, world=WORLD, recipe=small_recipe(), quiet=True)
    assert (out / "data" / "train" / "train.rec").stat().st_mtime_ns == before


def _interrupt(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt


def test_demo_refuses_what_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no demo"):
        demo(tmp_path, world=WORLD, quiet=True)
    with pytest.raises(InputError, match="is a file"):
        demo(tmp_path / "thesis.txt", world=WORLD, quiet=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"identities": 0}, "identities is 0"),
        ({"shots": 0}, "shots is 0"),
        ({"pairs": 30}, "30 pairs .* multiple of 20"),
        ({"pair_identities": 7}, "7 identities .* at least 8"),
        ({"image_size": 8}, "at least 16 pixels a side, not 8"),
    ],
)
def test_impossible_numbers_are_refused_before_anything_is_rendered(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(WORLD, **change)
