"""The frame of the studies: what is run, and what the page says about it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cost
import pytest
import study as module
import torch
from sets import Prepared
from small_runs import small_config
from study import Arm, Claim, Study, compare, page, run

from partialfc import CosFace, PartialFC

CLAIM = Claim("a is better", "a", "b", "test rank-1")
STUDY = Study("toy", "A toy", "It is a plan.", {"a": Arm({}), "b": Arm({})}, {"test rank-1": "rank-1"}, [CLAIM])


def rows(**arms: list[float]) -> list[dict[str, Any]]:
    return [
        {"data": "faces", "arm": arm, "seed": seed, "figures": {"test rank-1": value}, "seconds": 1.0, "machine": "CPU"}
        for arm, values in arms.items()
        for seed, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("a", "by", "expected"),
    [
        # Differences of 10, 11 and 12 points: 11 ± 4.303 * 1 / sqrt(3).
        ([0.60, 0.61, 0.62], 0.0, ("+11.0 ± 2.5", "confirmed")),
        ([0.40, 0.39, 0.38], 0.0, ("-11.0 ± 2.5", "not confirmed")),
        ([0.50, 0.51, 0.49], 0.0, ("+0.0 ± 2.5", "not resolvable")),
        ([0.50, 0.51, 0.49], -0.03, ("+0.0 ± 2.5", "confirmed")),
        ([0.60, 0.61, 0.62], 0.09, ("+11.0 ± 2.5", "not resolvable")),
        ([0.60, 0.61], 0.0, ("2 seeds", "not run in full")),
    ],
)
def test_a_claim_needs_the_whole_interval(a: list[float], by: float, expected: tuple[str, str]) -> None:
    claim = Claim("a is better", "a", "b", "test rank-1", by=by)
    assert compare(rows(a=a, b=[0.5, 0.5, 0.5]), "faces", claim) == expected


def test_the_page_shows_every_arm_and_the_verdict(tmp_path: Path) -> None:
    content = {"facts": {"faces": "Some faces."}, "runs": rows(a=[0.60, 0.61, 0.62], b=[0.5, 0.5, 0.5])}
    (tmp_path / "toy.json").write_text(json.dumps(content))
    page(STUDY, tmp_path / "toy.json", tmp_path / "pages")
    text = (tmp_path / "pages" / "toy.md").read_text()
    assert "| a | 3 | 61.0 ± 1.0 |" in text
    assert "| a is better | rank-1 | +11.0 ± 2.5 | confirmed |" in text
    assert "## Characters\n\nNot run." in text
    plot = (tmp_path / "pages" / "toy-faces.svg").read_text()
    assert plot.count("<circle") == 8  # three seeds and a mean of each arm


def test_a_table_has_cells_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "toy.json").write_text(json.dumps({"facts": {"faces": "Some faces."}, "runs": rows(a=[0.6, 0.6])}))
    page(replace(STUDY, beside=lambda arm: {"memory": f"{arm} GiB"}), tmp_path / "toy.json", tmp_path)
    text = (tmp_path / "toy.md").read_text()
    assert "| arm | seeds | rank-1 | memory |\n|---|---|---|---|\n| a | 2 | 60.0 ± 0.0 | a GiB |" in text


def test_what_is_done_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []

    def row(study: Study, prepared: Prepared, name: str, seed: int, runs: Path, epochs: float) -> dict[str, Any]:
        calls.append((name, seed))
        return {"figures": {"test rank-1": 0.5}, "seconds": 1.0, "machine": "CPU"}

    monkeypatch.setattr(module, "_row", row)
    study = replace(STUDY, data={"faces": lambda folder, small: Prepared(folder, small_config(), {}, "Faces.")})
    results = tmp_path / "toy.json"
    assert run(study, tmp_path, results, small=True, minutes=1, only=["faces"]) == 0
    assert run(study, tmp_path, results, small=False, minutes=0, only=["faces"]) == module.NOT_DONE
    assert run(study, tmp_path, results, small=False, minutes=1, only=["faces"]) == 0
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    content = json.loads(results.read_text())
    assert (len(content["runs"]), content["facts"]) == (6, {"faces": "Faces."})
    del calls[:]
    assert run(study, tmp_path, results, small=False, minutes=1, only=["faces"], arms=["b"], seeds=5) == 0
    assert calls == [("b", 3), ("b", 4)]


def test_two_data_sets_run_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that another process adds during a run stays."""
    results = tmp_path / "toy.json"
    made = {
        data: lambda folder, small: Prepared(folder, small_config(), {}, folder.name) for data in ("faces", "others")
    }
    study = replace(STUDY, data=made)

    def row(study: Study, prepared: Prepared, name: str, seed: int, runs: Path, epochs: float) -> dict[str, Any]:
        if prepared.facts == "faces":
            assert run(study, tmp_path, results, small=True, minutes=1, only=["others"], arms=[name]) == 0
        return {"figures": {"test rank-1": 0.5}, "seconds": 1.0, "machine": "CPU"}

    monkeypatch.setattr(module, "_row", row)
    assert run(study, tmp_path, results, small=True, minutes=1, only=["faces"]) == 0
    content = json.loads(results.read_text())
    assert [(row["data"], row["arm"]) for row in content["runs"]] == [
        ("others", "a"),
        ("faces", "a"),
        ("others", "b"),
        ("faces", "b"),
    ]
    assert content["facts"] == {"faces": "faces", "others": "others"}


def test_the_verdict_on_cost_needs_every_step_of_the_rule() -> None:
    def rows(**seconds: float) -> list[dict[str, Any]]:
        return [
            {"way": way, "classes": count, "seconds": seconds[way[:4].strip()], "peak_bytes": memory}
            for count in cost.CLASSES[1:3]
            for way, memory in zip(cost.CLAIMED, (3, 2, 1), strict=True)
        ]

    assert cost.verdict([]) == "not run in full"
    assert cost.verdict(rows(data=5.0, mode=4.0, Part=1.0)) == "confirmed"
    assert cost.verdict(rows(data=5.0, mode=4.0, Part=2.0)) == "not confirmed"
    assert cost.verdict(rows(data=3.0, mode=4.0, Part=1.0)) == "not confirmed"


def test_the_data_parallel_head_is_cosface() -> None:
    torch.manual_seed(0)
    plain = cost.DataParallelHead(30)
    head = PartialFC(30, cost.WIDTH, sample_rate=1.0, margin=CosFace(0.4), scale=64.0)
    with torch.no_grad():
        head.centers.copy_(plain.centers)
    embeddings, labels = torch.randn(8, cost.WIDTH), torch.arange(8)
    torch.testing.assert_close(plain(embeddings, labels), head(embeddings, labels), rtol=1e-5, atol=1e-5)
