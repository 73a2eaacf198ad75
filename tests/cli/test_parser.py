"""The parser: precedence, spellings, help, and every mistake in one sentence."""

from __future__ import annotations

import argparse
import json
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from command_line import complaint, run

from documents import commands_below
from partialfc.cli import build_parser
from partialfc.cli.parser import Parser


def test_precedence_is_defaults_recipe_file_flags(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("head: {sample_rate: 0.3, scale: 30}\nseed: 7\n")
    lines = (
        ["train", "--data.path=x", "--head.scale=20", "--config", file, "--recipe", "demo", "--print-config"],
        ["train", "--recipe=demo", f"--config={file}", "--print-config", "--head.scale", "20", "--data.path", "x"],
    )
    for line in lines:
        assert run(*line) == 0
        config = yaml.safe_load(capsys.readouterr().out)
        assert config["backbone"]["name"] == "mini"  # recipe over defaults
        assert (config["head"]["sample_rate"], config["seed"]) == (0.3, 7)  # file over recipe
        assert config["head"]["scale"] == 20  # flag over file
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config))
    assert run("train", "--config", tmp_path / "again.yaml", "--print-config") == 0
    assert yaml.safe_load(capsys.readouterr().out) == config


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--data.path=/nowhere/at/all"], ["/nowhere/at/all"]),
        (["train"], ["data.path"]),
        (["train", "--data.path=x", "--head.sample_rte=0.1"], ["--head.sample_rte", "--head.sample-rate"]),
        (["train", "--data.path=x", "--head.sample_rate=many"], ["head.sample-rate", "many"]),
        (["train", "--data.path=x", "--head.sample_rate=1.5"], ["head.sample_rate", "1.5"]),
        (["train", "--data.path=x", "--head.margin=arc"], ["head.margin", "arcface", "cosface"]),
        (["train", "--data.path=x", "--see=1"], ["--see"]),
        (["train", "--data.path=x", "--backbone.name=r5O"], ["r5O", "r50"]),
        (["train", "--data.path=x", "--recipe=dem"], ["recipe", "demo"]),
        (["train", "--data.path=x", "--schedule.epochs=0"], ["schedule.epochs"]),
        (["train", "--data.path=x", "--config=/no/such.yaml"], ["such.yaml"]),
        (["train", "--data.path=x", "--data.workers=1.5"], ["--data.workers", "1.5", "whole number"]),
        (["train", "--data.path=x", "--data.flip=maybe"], ["--data.flip", "maybe", "true or false"]),
        (["train", "--data.path=x", "--backbone.freeze=[a"], ["--backbone.freeze", "[a", "list"]),
        (["train", "--data.path=x", "--seed"], ["--seed"]),
        (["report", "run", "--titel=x"], ["--titel", "--title"]),
        (["train", "--data.path=x", "--benchmark", "lfw"], ["lfw", "NAME=PATH"]),
        (["trian"], ["trian", "train"]),
        (["data"], ["command"]),
        (["evaluate", "/no/model", "--benchmark", "a=b"], ["/no/model"]),
        (["bench", "head"], ["classes"]),
        (["data", "faces", "--out=/tmp/never", "--pairs=7"], ["7", "20"]),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    if arguments[:2] == ["data", "faces"]:
        arguments = [*arguments[:2], f"--out={tmp_path / 'faces'}", *arguments[3:]]
    sentence = complaint(capsys, *arguments)
    for word in words:
        assert word in sentence


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("head: {sample_rte: 0.3}", ["head.sample_rte", "head.sample_rate"]),
        ("head: {sample_rate: many}", ["head.sample_rate", "many", "number"]),
        ("head: {margin: arc}", ["head.margin", "arc", "cosface"]),
        ("- seed", ["holds no options"]),
        ("config: other.yaml", ["there is no option config"]),
        ("help: true", ["there is no option help"]),
        ("seed: [", ["YAML"]),
        ("? [1]\n: 2\n", ["YAML"]),
        ("seed: 1\nhead: {}\nseed: 2\n", ["'seed' stands twice", "line 3"]),
    ],
)
def test_a_mistake_in_a_file_names_file_and_key(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, words: list[str]
) -> None:
    (tmp_path / "config.yaml").write_text(content)
    sentence = complaint(capsys, "train", "--config", tmp_path / "config.yaml")
    for word in ["config.yaml", *words]:
        assert word in sentence


def test_values_of_every_type_read_alike_in_a_file_and_on_the_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    values: dict[str, object] = {
        "data.path": "null",
        "data.num_classes": 7,
        "data.flip": False,
        "backbone.dropout": 0.25,
        "backbone.freeze": ["conv1", "bn1"],
        "backbone.init": "there",
        "head.margin_value": None,
        "head.state_dtype": "bfloat16",
        "optimizer.weight_decay": 5e-5,
    }
    file = tmp_path / "config.yaml"
    nested: dict[str, dict[str, object]] = {}
    for key, value in values.items():
        section, name = key.split(".")
        nested.setdefault(section, {})[name] = value
    file.write_text(yaml.safe_dump(nested))
    words = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]
    printed = []
    for line in ([f"--config={file}"], words, [word.replace("_", "-") for word in words]):
        assert run("train", "--backbone.name=r18", "--print-config", *line) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2]
    config = yaml.safe_load(printed[0])
    for key, value in values.items():
        section, name = key.split(".")
        assert config[section][name] == value


def test_a_file_may_hold_the_other_options_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for benchmark in ("[lfw]", "lfw"):
        (tmp_path / "config.yaml").write_text(f"data: {{path: /nowhere}}\nbenchmark: {benchmark}\n")
        sentence = complaint(capsys, "train", "--config", tmp_path / "config.yaml")
        assert "'lfw'" in sentence
        assert "NAME=PATH" in sentence


def test_a_recipe_that_is_no_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for value in ("3", "[wf12]"):
        (tmp_path / "config.yaml").write_text(f"recipe: {value}\n")
        assert "There is no recipe" in complaint(capsys, "train", "--config", tmp_path / "config.yaml")


def test_a_file_may_name_its_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Its own values come after it, and the recipe of the command line in its place."""
    (tmp_path / "config.yaml").write_text("recipe: wf12m-r100-pfc0.3\nseed: 3\nhead: {scale: 30.0}\n")
    for words, rate in (([], 0.3), (["--recipe", "wf12m-r100-pfc0.2"], 0.2)):
        assert run("train", "--config", tmp_path / "config.yaml", *words, "--print-config") == 0
        config = yaml.safe_load(capsys.readouterr().out)
        assert (config["backbone"]["name"], config["head"]["sample_rate"]) == ("r100", rate)
        assert (config["seed"], config["head"]["scale"]) == (3, 30.0)


def test_help_fits_80_columns_and_has_a_sentence_for_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    parsers = list(commands_below(build_parser()))
    assert len(parsers) >= 12
    for parser in parsers:
        assert all(len(line) < 80 for line in parser.format_help().splitlines())
        assert all(action.help for action in parser._actions if not isinstance(action, argparse._SubParsersAction))
    train = parsers[2]
    assert isinstance(train, Parser)
    everything = train.format_help(everything=True)
    assert all(len(line) < 80 for line in everything.splitlines())
    assert "curricularface, elasticface, subcenter or none (default: cosface)" in " ".join(everything.split())


def test_options_are_kebab_case() -> None:
    options = {option for parser in commands_below(build_parser()) for option in parser._option_string_actions}
    assert not [option for option in options if "_" in option]


def test_without_a_command_it_shows_what_to_do_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    shown = capsys.readouterr().out
    assert "partialfc demo" in shown
    assert "partialfc train DATA" in shown


def test_short_names_and_data_are_the_keys_of_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--backbone=r50", "--epochs=20", "--batch-size=128", "--lr", "0.1", "--sample_rate=0.2", "--workers=1"]
    long = "--backbone.name=r50 --schedule.epochs=20 --data.global_batch_size=128 --optimizer.lr=0.1"
    long += " --head.sample-rate=0.2 --data.workers=1 --data.path=here"
    printed = []
    for line in (["here", *short], [*short, "here"], long.split()):
        assert run("train", "--print-config", *line) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2]
    assert yaml.safe_load(printed[0])["data"]["path"] == "here"


def test_the_default_backbone_depends_on_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--print-config", "--device=cpu") == 0
    assert yaml.safe_load(capsys.readouterr().out)["backbone"]["name"] == "mini"
    assert run("plan", "--classes=1000", "--json") == 0
    assert json.loads(capsys.readouterr().out)["workload"]["config"]["backbone"]["name"] == "r50"


def test_help_shows_the_common_options_and_help_all_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for option in ("--help", "--help-all"):
        assert run("train", option) == 0
        shown.append(capsys.readouterr().out)
    assert all("--lr, --optimizer.lr X" in text for text in shown)
    assert ["--head.conflict-threshold" in text for text in shown] == [False, True]
    assert len(shown[0].splitlines()) < 60
    assert not any(sign in shown[1] for sign in ("<class", "Optional["))


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"partialfc {metadata.version('partialfc')}\n"
