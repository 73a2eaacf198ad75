"""`partialfc train` as a user meets it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import IM2REC, INSIGHTFACE, LFW, QUICK, complaint, run

from partialfc.data.sources import open_source
from partialfc.data.sources.recordio import RecordWriter
from partialfc.model.files import load_model


@pytest.mark.slow
def test_train_on_every_layout_and_evaluate(
    capsys: pytest.CaptureFixture[str], folder_of_pngs: Path, tmp_path: Path
) -> None:
    for name, path in {"header": INSIGHTFACE, "im2rec": IM2REC, "folder": folder_of_pngs}.items():
        out = tmp_path / name
        status = run("train", "--data.path", path, *QUICK, "--out", out, "--benchmark", f"lfw={LFW}", "--json")
        assert status == 0
        result = json.loads(capsys.readouterr().out)
        assert result["steps"] == 2
        assert result["benchmarks"]["lfw"]["pairs"] == 40
    assert (
        run("evaluate", tmp_path / "header", "--benchmark", f"lfw={LFW}", "--out", tmp_path / "scores", "--json") == 0
    )
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "scores" / "results.json").read_text()) == {"schema_version": 1, **printed}
    scores = np.load(tmp_path / "scores" / "lfw-scores.npz")
    assert scores["scores"].shape == (40,)
    assert run("report", tmp_path / "header", "--benchmark", f"lfw={LFW}", "--json") == 0
    page = Path(json.loads(capsys.readouterr().out)["report"])
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert run("evaluate", tmp_path / "header", "--benchmark", f"lfw={LFW}") == 0
    assert "accuracy" in capsys.readouterr().out


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
    arguments = ["train", "--data.path", INSIGHTFACE, *QUICK, "--out", tmp_path / "out", "--benchmark", f"x={wrong}"]
    assert "pairs.bin" in complaint(capsys, *arguments)
    assert not (tmp_path / "out").exists()


def test_a_malicious_pickle_executes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    evil = tmp_path / "evil.bin"
    evil.write_bytes(pickle.dumps(([Attack()], [True])))
    arguments = ["train", "--data.path", INSIGHTFACE, *QUICK, "--out", tmp_path / "out", "--benchmark", f"x={evil}"]
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
    wrong = ["--backbone.freeze", "[stm]", "--backbone.init", start]
    assert "backbone.freeze names 'stm'" in complaint(capsys, *first, tmp_path / "third", *wrong)
