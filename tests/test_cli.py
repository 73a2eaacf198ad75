"""The command line as a user meets it: results, JSON, precedence, and every mistake in one sentence."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from partialfc.backbones import create_backbone
from partialfc.cli import main
from partialfc.data.images import encode_png
from partialfc.data.sources import open_source
from partialfc.data.sources.base import read_image
from partialfc.data.sources.recordio import RecordWriter
from partialfc.model.files import load_model

FIXTURES = Path(__file__).parent / "fixtures"
INSIGHTFACE, IM2REC = FIXTURES / "insightface", FIXTURES / "im2rec"
LFW = FIXTURES / "verification" / "lfw.bin"
QUICK = [
    "--backbone.name=mini",
    "--backbone.embedding_dim=16",
    "--data.workers=0",
    "--data.global_batch_size=24",
    "--schedule.epochs=1",
    "--head.sample_rate=0.5",
]


def run(*arguments: object) -> int:
    """Exit status of one command."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        return int(exit_.code or 0)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a wrong command prints; it must end with status 2."""
    status = run(*arguments)
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert status == 2, captured.err
    assert captured.out == ""
    errors = [line for line in lines if line.startswith("partialfc: error: ")]
    assert errors == lines[-1:], captured.err
    assert "Traceback" not in captured.err
    return errors[0]


@pytest.fixture
def folder_of_pngs(tmp_path: Path) -> Path:
    """The fixture's images unpacked, a folder an identity."""
    source = open_source(INSIGHTFACE)
    root = tmp_path / "unpacked"
    for index in range(len(source)):
        sample, image = read_image(source, index)
        home = root / f"{sample.label:04d}"
        home.mkdir(parents=True, exist_ok=True)
        (home / f"{index:04d}.png").write_bytes(encode_png(image))
    return root


def test_inspect_gives_the_same_facts_for_all_layouts(capsys: pytest.CaptureFixture[str], folder_of_pngs: Path) -> None:
    facts: list[dict[str, Any]] = []
    for path in (INSIGHTFACE, IM2REC, folder_of_pngs):
        assert run("data", "inspect", path, "--json") == 0
        facts.append(json.loads(capsys.readouterr().out))
    keys = ("images", "classes", "unreadable", "min_per_class", "max_per_class", "sha256_of_decoded")
    assert len({json.dumps([fact[key] for key in keys]) for fact in facts}) == 1
    assert facts[0]["images"] == 48
    assert len({fact["format"] for fact in facts}) >= 2


def test_inspect_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data", "inspect", INSIGHTFACE) == 0
    assert "classes" in capsys.readouterr().out


def test_train_on_every_layout_and_evaluate(
    capsys: pytest.CaptureFixture[str], folder_of_pngs: Path, tmp_path: Path
) -> None:
    for name, path in {"header": INSIGHTFACE, "im2rec": IM2REC, "folder": folder_of_pngs}.items():
        out = tmp_path / name
        status = run("train", "--data.path", path, *QUICK, "--out", out, "--eval", f"lfw={LFW}", "--json")
        assert status == 0
        result = json.loads(capsys.readouterr().out)
        assert result["steps"] == 2
        assert result["benchmarks"]["lfw"]["pairs"] == 40
    assert (
        run("evaluate", tmp_path / "header", "--benchmark", f"lfw={LFW}", "--out", tmp_path / "scores", "--json") == 0
    )
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "scores" / "results.json").read_text()) == printed
    scores = np.load(tmp_path / "scores" / "lfw-scores.npz")
    assert scores["scores"].shape == (40,)
    assert run("report", tmp_path / "header", "--benchmark", f"lfw={LFW}", "--json") == 0
    page = Path(json.loads(capsys.readouterr().out)["report"])
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert run("evaluate", tmp_path / "header", "--benchmark", f"lfw={LFW}") == 0
    assert "accuracy" in capsys.readouterr().out


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
        (["train", "--data.path=x", "--head.sample_rte=0.1"], ["--head.sample_rte", "--head.sample_rate"]),
        (["train", "--data.path=x", "--head.sample_rate=many"], ["head.sample_rate", "many"]),
        (["train", "--data.path=x", "--head.sample_rate=1.5"], ["head.sample_rate", "1.5"]),
        (["train", "--data.path=x", "--head.margin=arc"], ["head.margin", "arcface", "cosface"]),
        (["train", "--data.path=x", "--see=1"], ["--see"]),
        (["train", "--data.path=x", "--backbone.name=r5O"], ["r5O", "r50"]),
        (["train", "--data.path=x", "--recipe=dem"], ["recipe", "demo"]),
        (["train", "--data.path=x", "--schedule.epochs=0"], ["schedule.epochs"]),
        (["train", "--data.path=x", "--config=/no/such.yaml"], ["such.yaml"]),
        (["train", "--data.path=x", "--eval", "lfw"], ["lfw", "NAME=PATH"]),
        (["trian"], ["trian", "train"]),
        ([], ["command"]),
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


def test_an_empty_folder_is_no_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert ".rec" in complaint(capsys, "train", "--data.path", tmp_path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("label", "word"), [(0.5, "0.5"), (2.0**24, "16777216"), (-1.0, "-1")])
def test_labels_that_no_class_can_have(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, label: float, word: str
) -> None:
    """The writer refuses such labels, so the label is changed in the file."""
    sample = open_source(INSIGHTFACE).read(0)
    with RecordWriter(tmp_path / "train.rec", header=False) as writer:
        for number in range(24):
            writer.write(sample.encoded, number % 8)
    record = (tmp_path / "train.rec").read_bytes()
    changed = record[:12] + np.float32(label).tobytes() + record[16:]
    (tmp_path / "train.rec").write_bytes(changed)
    sentence = complaint(capsys, "train", "--data.path", tmp_path, *QUICK, "--out", tmp_path / "out")
    assert word in sentence.replace(",", "")


def test_a_label_past_the_given_classes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sentence = complaint(
        capsys, "train", "--data.path", INSIGHTFACE, *QUICK, "--data.num_classes=5", "--out", tmp_path / "out"
    )
    assert "label" in sentence


def test_unreadable_images_are_counted_and_skipped_up_to_the_cap(
    capsys: pytest.CaptureFixture[str], folder_of_pngs: Path, tmp_path: Path
) -> None:
    broken = next(folder_of_pngs.glob("*/*.png"))
    broken.write_bytes(broken.read_bytes()[:100])
    assert run("data", "inspect", folder_of_pngs, "--json") == 0
    assert json.loads(capsys.readouterr().out)["unreadable"] == 1
    common = ["train", "--data.path", folder_of_pngs, *QUICK, "--json"]
    assert run(*common, "--out", tmp_path / "a", "--data.max_unreadable=1") == 0
    capsys.readouterr()
    sentence = complaint(capsys, *common, "--out", tmp_path / "b", "--data.max_unreadable=0")
    assert broken.name in sentence


def test_a_file_that_is_no_pair_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    wrong = tmp_path / "pairs.bin"
    wrong.write_bytes(b"not a pickle at all")
    arguments = ["train", "--data.path", INSIGHTFACE, *QUICK, "--out", tmp_path / "out", "--eval", f"x={wrong}"]
    assert "pairs.bin" in complaint(capsys, *arguments)
    assert not (tmp_path / "out").exists()


def test_a_malicious_pickle_executes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    evil = tmp_path / "evil.bin"
    evil.write_bytes(pickle.dumps(([Attack()], [True])))
    arguments = ["train", "--data.path", INSIGHTFACE, *QUICK, "--out", tmp_path / "out", "--eval", f"x={evil}"]
    assert "evil.bin" in complaint(capsys, *arguments)
    assert not (tmp_path / "executed").exists()


def test_an_output_folder_that_holds_another_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["train", "--data.path", INSIGHTFACE, *QUICK, "--out", tmp_path / "run"]
    assert run(*arguments, "--json") == 0
    capsys.readouterr()
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*"))
    assert "--resume" in complaint(capsys, *arguments)
    assert "head.scale" in complaint(capsys, *arguments, "--resume", "--head.scale=8")
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*")) == before
    assert run(*arguments, "--resume", "--json") == 0


def test_layers_are_frozen_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = ["train", "--data.path", INSIGHTFACE, *QUICK, "--json", "--out"]
    assert run(*first, tmp_path / "first") == 0
    start = tmp_path / "first" / "model" / "last"
    frozen = ["--backbone.freeze", "[stem,bn]", "--backbone.init", start]
    assert run(*first, tmp_path / "second", *frozen) == 0
    before, after = (load_model(folder).backbone.state_dict() for folder in (start, tmp_path / "second/model/last"))
    same = {name.split(".")[0] for name in before if torch.equal(before[name], after[name])}
    assert {"stem", "bn"} <= same
    assert not torch.equal(before["fc.weight"], after["fc.weight"])
    capsys.readouterr()
    assert "backbone.freeze names 'stm'" in complaint(capsys, *first, tmp_path / "third", "--backbone.freeze", "[stm]")


def test_recipes_are_listed_and_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes", "--json") == 0
    every = json.loads(capsys.readouterr().out)
    assert len(every) > 20
    assert run("recipes", "wf12m-r100-pfc0.1") == 0
    assert "94.49" in capsys.readouterr().out
    assert run("recipes") == 0
    assert len(capsys.readouterr().out.splitlines()) == len(every) + 1
    sentence = complaint(capsys, "recipes", "wf12m-r100-pfc0.15")
    assert "Did you mean 'wf12m-r100-pfc0.1'" in sentence


def test_a_bare_state_dict_is_recognised(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    backbone = create_backbone("r18", embedding_dim=32, image_size=112)
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    assert run("evaluate", tmp_path / "backbone.pth", "--benchmark", f"lfw={LFW}", "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["lfw"]["pairs"] == 40
    assert "r18" in captured.err


def test_data_faces_writes_real_formats(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "faces"
    options = ["--identities=6", "--shots=3", "--pairs=20", "--pair_identities=8", "--image_size=32"]
    assert run("data", "faces", "--out", out, *options, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["images"] == 18
    assert run("data", "inspect", out / "train", "--json") == 0
    inspected = json.loads(capsys.readouterr().out)
    assert (inspected["images"], inspected["classes"], inspected["unreadable"]) == (18, 6, 0)
    assert "exists" in complaint(capsys, "data", "faces", "--out", out, *options)
    assert run("train", "--data.path", out / "train", *QUICK, "--out", tmp_path / "run", "--json") == 0


def test_bench_head_prints_a_line_a_variant(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--classes=500", "--embedding-dim=16", "--batch-size=8", "--sample-rate=0.1", "--steps=2", "--baseline"]
    assert run("bench", "head", *options, "--operand-dtype=float32") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 3
    for line in lines:
        assert {"variant", "step_ms_median", "step_ms_min", "peak_bytes", "phases_ms"} <= line.keys()


def test_the_model_of_a_run_is_found_and_a_broken_one_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("train", "--data.path", INSIGHTFACE, *QUICK, "--out", tmp_path / "run", "--json") == 0
    capsys.readouterr()
    shutil.rmtree(tmp_path / "run" / "model" / "best")
    assert run("evaluate", tmp_path / "run", "--benchmark", f"lfw={LFW}", "--json") == 0  # the last one
    capsys.readouterr()
    (tmp_path / "run" / "model" / "last" / "model.safetensors").write_bytes(b"")
    assert "model.safetensors" in complaint(capsys, "evaluate", tmp_path / "run", "--benchmark", f"lfw={LFW}")
