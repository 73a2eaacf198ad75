"""`partialfc evaluate` as a user meets it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import INSIGHTFACE, LFW, QUICK, complaint, run

from partialfc.backbones import create_backbone


@pytest.mark.slow
def test_a_bare_state_dict_is_recognised(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    backbone = create_backbone("mbf", embedding_dim=32, image_size=112)
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    assert run("evaluate", tmp_path / "backbone.pth", "--benchmark", f"lfw={LFW}", "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["benchmarks"]["lfw"]["genuine_pairs"] == 20
    assert "mbf" in captured.err


def test_the_model_of_a_run_is_found_and_a_broken_one_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("train", "--data.path", INSIGHTFACE, *QUICK, "--out", tmp_path / "run", "--json") == 0
    capsys.readouterr()
    shutil.rmtree(tmp_path / "run" / "model" / "best")
    assert run("evaluate", tmp_path / "run", "--benchmark", f"lfw={LFW}", "--json") == 0  # the last one
    capsys.readouterr()
    (tmp_path / "run" / "model" / "last" / "model.safetensors").write_bytes(b"")
    assert "model.safetensors" in complaint(capsys, "evaluate", tmp_path / "run", "--benchmark", f"lfw={LFW}")


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_has_images(capsys: pytest.CaptureFixture[str], size: int) -> None:
    assert "--batch-size" in complaint(capsys, "evaluate", "model", "--benchmark", f"lfw={LFW}", "--batch-size", size)
