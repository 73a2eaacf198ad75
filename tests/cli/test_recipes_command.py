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
    assert len(capsys.readouterr().out.splitlines()) == len(every) + 1
    sentence = complaint(capsys, "recipes", "wf12m-r100-pfc0.15")
    assert "Did you mean 'wf12m-r100-pfc0.1'" in sentence
