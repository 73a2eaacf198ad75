"""`partialfc bench` as a user meets it."""

from __future__ import annotations

import json

import pytest
from command_line import run


@pytest.mark.slow
@pytest.mark.multiprocess
def test_bench_head_prints_a_line_a_variant(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--classes=500", "--embedding-dim=16", "--batch-size=8", "--sample-rate=0.1", "--steps=2", "--baseline"]
    assert run("bench", "head", *options, "--operand_dtype=float32") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 3
    for line in lines:
        assert {"variant", "step_ms_median", "step_ms_min", "peak_bytes", "phases_ms"} <= line.keys()
