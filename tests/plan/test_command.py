"""`partialfc plan` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from partialfc.cli import main
from partialfc.config.options import BackboneConfig, DataConfig, TrainConfig

SMALL = ["--backbone.name=mini", "--image-size=32", "--backbone.embedding_dim=64", "--data.global_batch_size=256"]


def run(*arguments: str) -> int:
    try:
        return main(["plan", *arguments])
    except SystemExit as stopped:
        return int(stopped.code or 0)


def test_a_plan_as_text_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--classes=2000000", "--gpus=16", *SMALL) == 0
    text = capsys.readouterr().out
    assert text.startswith("2,000,000 identities, mini in bfloat16, 16 x H100 SXM 80 GB, global batch 256\n")
    assert "It fits" in text
    assert run("--classes=2000000", *SMALL) == 0  # by default as many GPUs as hold the batch at once
    assert ", 2 x H100 SXM 80 GB" in capsys.readouterr().out
    assert run("--classes=2000000", "--gpus=16", *SMALL, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] is True
    assert plan["memory"]["parts"]["centers"] == 4 * 64 * 125_000
    assert plan["sampled_classes"] == 12_500


def test_a_recipe_gives_the_defaults_and_flags_override_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--recipe", "wf42m-vit_l", "--data.global_batch_size", "128", "--gpus", "64", "--json") == 0
    asked = json.loads(capsys.readouterr().out)["workload"]
    assert (asked["classes"], asked["gpus"], asked["device"]) == (2_059_906, 64, "h100")
    backbone, data = asked["config"]["backbone"], asked["config"]["data"]
    assert (backbone["name"], backbone["checkpointing"], data["global_batch_size"]) == ("vit_l", True, 128)


def test_a_run_s_configuration_plans(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = TrainConfig(DataConfig(num_classes=1000), BackboneConfig("mini", 64))
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert run("--config", str(tmp_path / "config.yaml"), "--image-size=32", "--head.sample_rate=0.5", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["sampled_classes"], plan["workload"]["gpus"], plan["workload"]["device"]) == (500, 1, "h100")


def test_this_machine_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--classes=2000", "--gpus=1", "--device=cpu", *SMALL[:3], "--data.global_batch_size=16", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["rates"]["origin"].startswith("measured on this machine")
    assert plan["rates"]["memory_rate"] is None
    assert 0 < plan["time"]["head"] < 60
    assert 0 < plan["time"]["backbone"] < 60
    assert plan["memory"]["host"] == {}


def test_what_does_not_fit_is_said_with_remedies(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--classes=1000000000", "--gpus=8", *SMALL[:2]) == 0
    text = capsys.readouterr().out
    assert "It does not fit: " in text
    assert "--gpus 64" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpus=8"], "--classes is missing: give the number of identities, or a recipe of known data."),
        (["--classes=10", "--gpus=0"], "--gpus is 0; it must be at least 1."),
        (["--classes=10", "--backbone.name=r51"], "Did you mean 'r50'?"),
        (
            ["--classes=10", "--head.sample_rate=2"],
            "head.sample_rate is 2.0; it is a part of the classes",
        ),
        (["--classes=ten"], "--classes: 'ten' is not a whole number."),
        (["--classes=10", "--device=tpu"], "--device: 'tpu' is not one of auto, v100, "),
        (
            ["--classes=10", "--backbone.name=mini", "--backbone.checkpointing=true"],
            "mini does not take the option 'checkpointing'",
        ),
        (["--recipe=demo"], "--classes is missing"),
        (["--recipe=wf42m"], "There is no recipe 'wf42m'"),
        (
            ["--classes=10", "--gpu=3"],
            "there is no option --gpu; options are not abbreviated. Did you mean '--gpus' or ",
        ),
    ],
)
def test_mistakes_are_one_sentence(capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("partialfc: error: ")
    assert sentence in line
