"""A training says before its start what is wrong with its data, and is not resumed on others."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from small_runs import interrupt_at, tiny_config, write_images

from partialfc.config.options import TrainConfig
from partialfc.core.errors import InputError
from partialfc.data.convert import convert
from partialfc.training.build import open_loader, remarks
from partialfc.training.loop import train


def config_of(data: Path, **changes: object) -> TrainConfig:
    config = tiny_config(data, device="cpu")
    output = replace(config.output, checkpoint_every=1)
    return replace(config, data=replace(config.data, **changes), output=output)  # type: ignore[arg-type]


def said(data: Path, values: dict[str, object] | None = None, **changes: object) -> list[str]:
    config = config_of(data, **changes).with_values({"head.sample_rate": 1.0, **(values or {})})
    return remarks(open_loader(config), config)


def test_a_single_identity_is_refused(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", ["anna"])
    (images / "empty").mkdir()
    for data in (images, images.parent):
        with pytest.raises(InputError, match="shows one identity, and a training needs at least two"):
            train(config_of(data), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_what_is_said_before_a_training(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", [f"{number:03d}" for number in range(50)])
    assert said(images) == []
    [rate] = said(images, {"head.sample_rate": 0.1})
    assert rate == "a step uses 0.1 of only 50 classes: with so few, --sample-rate 1 learns more"
    (images / "000" / "x.heic").touch()
    [passed_over, gaps] = said(images, num_classes=300)
    assert "1 .heic (such as 000/x.heic)" in passed_over
    assert gaps.startswith("250 of the 300 classes")
    assert "--data.min-images 1" in gaps
    shutil.rmtree(images / "007")
    [_, few_identities] = said(images)
    assert "only 49 identities" in few_identities
    assert f"partialfc finetune MODEL {images}" in few_identities
    assert said(images, {"backbone.init": "model"}) == [passed_over]


def test_gaps_in_the_labels_are_counted(tmp_path: Path) -> None:
    write_images(tmp_path / "images", ["a", "b"])
    lines = [f"0\t{label}\timages/{name}/{n}.png\n" for name, label in (("a", 5), ("b", 3_000_000)) for n in range(4)]
    (tmp_path / "all.lst").write_text("".join(lines))
    [gaps] = said(tmp_path / "all.lst")
    assert gaps.startswith("2,999,999 of the 3,000,001 classes")
    assert open_loader(config_of(tmp_path / "all.lst", min_images=1)).num_classes == 2


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"Jos\xe9")
    images = write_images(tmp_path / os.fsdecode(b"d\xe9"), ["anna", "bert"])
    (images / "bert").rename(images / name)
    with interrupt_at(1):
        train(config_of(images), tmp_path / "run", quiet=True)
    train(config_of(images), tmp_path / "run", resume=True, quiet=True)
    written = json.loads((tmp_path / "run" / "model" / "last" / "identities.json").read_text())
    assert written["identities"] == sorted(["anna", name])
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["path"] == str(images)


def rename(images: Path) -> None:
    (images / "dora").rename(images / "aaron")


def exchange_names(images: Path) -> None:
    (images / "anna").rename(images / "x")
    (images / "bert").rename(images / "anna")
    (images / "x").rename(images / "bert")


def exchange_two_images(images: Path) -> None:
    """The names stay, the contents change places."""
    first, second = (sorted((images / name).iterdir())[0] for name in ("anna", "bert"))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)


def move_one_and_copy_another(images: Path) -> None:
    """Counts stay. (The image that is copied was there before.)"""
    first, second = (sorted((images / name).iterdir())[0] for name in ("anna", "bert"))
    first.rename(images / "carl" / f"zz{first.suffix}")
    shutil.copy(second, images / "anna" / f"zz{second.suffix}")
    sorted((images / "carl").iterdir())[0].unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, "whose class 0 is anna, but now that is aaron .4 classes have other names"),
        (exchange_names, r"an image had label \d that has \d now .\d of 16 looked at"),
        (
            exchange_two_images,
            r"an image had label 0 that has 1 now .2 of 16|an image had label 1 that has 0 now .2 of",
        ),
        (move_one_and_copy_another, r"an image had label \d that has \d now"),
    ],
)
def test_other_identities_are_refused_on_resume(change: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", ["anna", "bert", "carl", "dora"])
    with interrupt_at(2):
        train(config_of(images), tmp_path / "run", quiet=True)
    change(images)
    with pytest.raises(
        InputError, match=rf"was trained on data {'.*'}{message}.*: resume with the same data, or start"
    ):
        train(config_of(images), tmp_path / "run", resume=True, quiet=True)


def test_the_same_data_elsewhere_in_another_format_or_damaged_are_taken(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", ["anna", "bert", "carl", "dora"])
    with interrupt_at(2):
        train(config_of(images), tmp_path / "run", quiet=True)
    convert(images, tmp_path / "packed", "recordio", quiet=True)
    images.rename(tmp_path / "moved")
    sorted((tmp_path / "moved" / "anna").iterdir())[0].write_bytes(b"damaged")
    for data in (tmp_path / "packed", tmp_path / "moved"):
        shutil.copytree(tmp_path / "run", tmp_path / f"run-{data.name}")
        train(config_of(data), tmp_path / f"run-{data.name}", resume=True, quiet=True)
