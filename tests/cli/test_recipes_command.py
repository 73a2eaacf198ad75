"""`partialfc recipes` as a user meets it."""

from __future__ import annotations

import json

import pytest
from command_line import complaint, run


def test_recipes_are_listed_and_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes", "--json") == 0
    every = json.loads(capsys.readouterr().out)
    assert len(every) > 20
    assert run("recipes", "wf12m-r100-pfc0.1") == 0
    assert "94.49" in capsys.readouterr().out
    assert run("recipes") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) < 80
    assert [line.split()[0] for line in lines[2:-3]] == [facts["name"] for facts in every]
    sentence = complaint(capsys, "recipes", "wf12m-r100-pfc0.15")
    assert "Did you mean 'wf12m-r100-pfc0.1'" in sentence


def test_recipes_are_filtered_by_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes", "WebFace42M", "VIT_L") == 0
    (row,) = capsys.readouterr().out.splitlines()[2:-3]
    name, identities, images, hours, gpu_hours, mfr, ijbc = row.split()
    assert (name, identities, images, mfr, ijbc) == ("wf42m-vit_l", "2,059,906", "42.5M", "97.85", "98.00")
    assert float(gpu_hours) == pytest.approx(64 * float(hours), rel=0.02)
