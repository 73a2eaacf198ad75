"""Fine-tuning: who is held out, what is trained on, and what is said at the end."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import complaint, run
from small_runs import tiny_config, write_images
from trained_models import write_model

from partialfc.backbones import create_backbone
from partialfc.core.errors import InputError
from partialfc.data.sources import open_source
from partialfc.evaluation.statistics.figures import Figure
from partialfc.finetune import Change, FineTuning, finetune, first_layers
from partialfc.model.files import load_model
from partialfc.training.loop import train
from partialfc.training.timing import TrainResult

QUICK = {"schedule.epochs": 1, "data.global_batch_size": 32, "data.micro_batch_size": 32, "data.workers": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on old people, and the images of these and of new ones."""
    folder = tmp_path_factory.mktemp("finetune")
    write_images(folder / "old", [f"old-{number}" for number in range(40)])
    write_images(folder / "new", [f"new-{number}" for number in range(60)])
    write_images(folder / "new", ["alone"], shots=1)
    train(tiny_config(folder / "old", device="cpu"), folder / "run", quiet=True)
    return folder


def test_people_are_held_out_and_the_others_train_with_a_part_of_the_old(folder: Path, tmp_path: Path) -> None:
    result = finetune(folder / "run", folder / "new", tmp_path, old=folder / "old", values=QUICK, quiet=True)
    assert result.people == (49, 12)  # "alone" trains, but nothing can be tested with one image
    mixture = open_source(tmp_path / "data" / "train.yaml")
    names = mixture.identities
    assert names is not None
    tested = open_source(folder / "new", overlay=tmp_path / "data" / "new-people-test.overlay").identities
    assert tested is not None
    trained = {name.rpartition("/")[2] for name in names}
    assert not trained & set(tested)
    assert len(trained & {f"new-{number}" for number in range(60)}) == 48
    is_old = np.array(["old-" in name for name in names])[mixture.labels()]
    assert is_old.sum() == 80  # the 20 that are not held out: fewer images than the new ones have
    assert set(result.changes) == {"new people", "old people"}
    saved = json.loads((tmp_path / "finetune.json").read_text())
    assert saved["changes"]["new people"]["before"]["value"] == result.changes["new people"].before.value
    again = finetune(folder / "run", folder / "new", tmp_path, old=folder / "old", values=QUICK, quiet=True)
    assert again.changes == result.changes
    assert again.training.images_per_second is None  # nothing was trained twice
    frozen = load_model(folder / "run").backbone.state_dict()["stem.weight"]
    after = load_model(tmp_path / "run" / "model" / "last").backbone.state_dict()
    assert after["stem.weight"].equal(frozen)
    assert not after["fc.weight"].equal(load_model(folder / "run").backbone.state_dict()["fc.weight"])


def test_the_margin_is_that_of_the_run(folder: Path, tmp_path: Path) -> None:
    finetune(folder / "run", folder / "new", tmp_path, values=QUICK, quiet=True)
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert "scale: 16.0" in text
    assert "sample_rate: 1.0" in text


def test_a_share_of_old_images_is_taken(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"old": folder / "old", "old_share": 0.2, "values": QUICK, "quiet": True}
    finetune(folder / "run", folder / "new", tmp_path, **options)
    sets = {folder / name: tmp_path / "data" / f"{name}-people-train.overlay" for name in ("new", "old")}
    counts = [len(open_source(path, overlay=overlay)) for path, overlay in sets.items()]
    assert counts == [193, 52]  # a fifth of the images, rounded up to whole people
    assert "in common" not in capsys.readouterr().err
    both = write_images(tmp_path / "both", [*(f"old-{number}" for number in range(22)), "new-7"])
    finetune(folder / "run", folder / "new", tmp_path / "out", **{**options, "old": both})
    said = capsys.readouterr().err
    assert "have 1 name in common" in said
    assert "such as new-7" in said


@pytest.mark.parametrize(
    ("change", "verdict", "advice"),
    [
        ((0.1, 0.05, 0.15), "better", "It pays"),
        ((-0.1, -0.15, -0.05), "worse", "It harms"),
        ((0.1, -0.05, 0.15), "alike", "does not show"),
        ((None, None, None), "unknown", "Too few people"),
    ],
)
def test_the_verdict(change: tuple[float | None, float | None, float | None], verdict: str, advice: str) -> None:
    one = Change(Figure(0.5, 0.4, 0.6), Figure(0.6, 0.5, 0.7), Figure(*change))
    training = TrainResult(Path("run"), 1, 128, 60.0, 2.0, {}, None, None)
    result = FineTuning(training, (400, 100), {"new people": one})
    assert one.verdict == verdict
    assert advice in result.text()
    assert "What it has forgotten of others is unknown" in result.text()
    assert max(map(len, result.text().splitlines())) <= 80
    harmed = replace(one, change=Figure(-0.1, -0.2, -0.05))
    assert "It is worse on lfw:" in replace(result, changes={"new people": one, "lfw": harmed}).text()


def test_the_first_third_of_the_layers() -> None:
    assert first_layers(create_backbone("mini", image_size=32)) == ["stem", "bn"]
    r18 = first_layers(create_backbone("r18", image_size=32))
    assert (r18[0], r18[-1], len(r18)) == ("conv1", "layer1.0", 4)
    vit = first_layers(create_backbone("vit_t", image_size=27))
    assert vit[-1] == "blocks.4"


def test_the_command_shows_before_and_after(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--epochs", "0.2", "--lr", "0", "--freeze", "--device", "cpu", "--out", tmp_path / "out"]
    assert run("finetune", folder / "run", folder / "new", *options, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["people"] == [49, 12]
    assert set(result["changes"]) == {"new people"}


def test_wrong_input_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = write_images(tmp_path / "few", map(str, range(11)))
    model, out = folder / "run", ["--out", tmp_path / "out"]
    large = write_model(tmp_path / "model", size=32)
    blue_first = write_model(tmp_path / "bgr", color_order="bgr")
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "config.yaml").write_text("head: 3")
    for arguments, sentence in (
        ((model, few), "has 11 people with two images or more"),
        ((model, tmp_path / "none"), "does not exist"),
        ((tmp_path / "none", folder / "new"), "none"),
        ((model, folder / "new", "--old", folder / "old", "--old-share", "1"), "between 0 and 1"),
        ((large, folder / "new"), "32"),
        ((blue_first, folder / "new"), "has color_order bgr"),
        ((model, folder / "new", "--freeze", "layer9"), "layer9"),
        ((model, folder / "new", "--epochs", "-1"), "schedule.epochs is -1"),
        ((model, folder / "new", "--old", few), "an old set needs 20"),
        ((model, tmp_path / "all.yaml"), "is a mixture"),
        ((model, folder / "new", "--old", folder / "new"), "would be trained on and tested"),
        ((model, folder / "new", "--benchmark", f"new people={folder / 'new'}"), "give it another"),
        ((broken, folder / "new"), "is not the configuration of a run"),
    ):
        assert sentence in complaint(capsys, "finetune", *arguments, *out)
        assert not (tmp_path / "out" / "run").exists()
    write_images(tmp_path / "demo" / "data", ["a", "b"])
    assert "holds something else" in complaint(capsys, "finetune", model, folder / "new", "--out", tmp_path / "demo")


def test_a_benchmark_without_pairs_is_refused_before_the_training(folder: Path, tmp_path: Path) -> None:
    for part in ("gallery", "probe"):
        write_images(tmp_path / "people" / part, ["a", "b"], shots=1)
    with pytest.raises(InputError, match="benchmark own compares no pairs one to one"):
        finetune(
            folder / "run", folder / "new", tmp_path / "out", benchmarks={"own": tmp_path / "people"}, values=QUICK
        )
    assert not (tmp_path / "out" / "run").exists()
