"""The demo, small: everything it says it does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from partialfc.config.options import TrainConfig
from partialfc.config.recipes import RECIPES
from partialfc.core.errors import InputError
from partialfc.data.sources import open_source
from partialfc.demo import demo
from partialfc.faces.sets import FaceWorld

WORLD = FaceWorld(identities=12, shots=3, pairs=20, pair_identities=8, image_size=32)


def small_recipe() -> TrainConfig:
    recipe = RECIPES["demo"]
    data = replace(recipe.data, global_batch_size=12, micro_batch_size=12, workers=0)
    return replace(recipe, data=data, head=replace(recipe.head, sample_rate=0.5))


def test_demo_renders_trains_tests_and_tells(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    summary = demo(out, seed=3, world=WORLD, recipe=small_recipe(), quiet=True)
    assert len(open_source(out / "data" / "train")) == 36
    assert 0 <= summary.accuracy <= 1
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


def test_an_interrupted_demo_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
