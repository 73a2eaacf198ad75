"""Runs commands in this process, as a user's shell would, on the small sets of tests/fixtures."""

from __future__ import annotations

from pathlib import Path

import pytest

from partialfc.cli import main

FIXTURES = Path(__file__).parents[1] / "fixtures"
INSIGHTFACE, IM2REC = FIXTURES / "insightface", FIXTURES / "im2rec"
LFW = FIXTURES / "verification" / "lfw.bin"
QUICK = [
    "--backbone.name=mini",
    "--backbone.embedding-dim=16",
    "--data.workers=0",
    "--data.global-batch-size=24",
    "--schedule.epochs=1",
    "--head.sample-rate=0.5",
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
