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
from partialfc.config.options import TrainConfig
from partialfc.core.errors import InputError

CLAIM = Claim("a is better", "a", "b", "test rank-1")
STUDY = Study("toy", "A toy", "It is a plan.", {"a": Arm({}), "b": Arm({})}, {"test rank-1": "rank-1"}, [CLAIM])


def rows(**arms: list[float]) -> list[dict[str, Any]]:
    return [
        {
            "data": "faces",
            "arm": arm,
            "seed": seed,
            "figures": {"test rank-1": value},
            "steps": 9,
            "seconds": 1.0,
            "machine": "CPU",
        }
        for arm, values in arms.items()
        for seed, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("a", "by", "expected"),
    [
        # Differences of 10, 11 and 12 points: 11 ± 6.205 * 1 / sqrt(3).
        ([0.60, 0.61, 0.62], 0.0, (3, "+11.0 ± 3.6", "confirmed")),
        ([0.40, 0.39, 0.38], 0.0, (3, "-11.0 ± 3.6", "not confirmed")),
        ([0.50, 0.51, 0.49], 0.0, (3, "+0.0 ± 3.6", "not resolvable")),
        ([0.50, 0.51, 0.49], -0.04, (3, "+0.0 ± 3.6", "confirmed")),
        ([0.60, 0.61, 0.62], 0.09, (3, "+11.0 ± 3.6", "not resolvable")),
        ([0.60, 0.61], 0.0, (2, "–", "not run in full")),
        ([], 0.0, (0, "–", "not run")),
    ],
)
def test_a_claim_needs_the_whole_interval(a: list[float], by: float, expected: tuple[str, str]) -> None:
    claim = Claim("a is better", "a", "b", "test rank-1", by=by)
    found = compare(rows(a=a, b=[0.5, 0.5, 0.5]), "faces", claim)
    assert (found.seeds, found.difference, found.verdict) == expected


def test_the_page_shows_every_arm_and_the_verdict(tmp_path: Path) -> None:
    content = {"facts": {"faces": "Some faces."}, "runs": rows(a=[0.60, 0.61, 0.62], b=[0.5, 0.5, 0.5])}
    (tmp_path / "toy.json").write_text(json.dumps(content))
    page(STUDY, tmp_path / "toy.json", tmp_path / "pages")
    text = (tmp_path / "pages" / "toy.md").read_text()
    assert "| a | 3 | 61.0 ± 1.0 |" in text
    assert "| a is better | rank-1 | 3 | +11.0 ± 3.6 | confirmed |" in text
    assert "## Characters\n\nNot run." in text
    plot = (tmp_path / "pages" / "toy.svg").read_text()
    assert plot.count('r="4" fill="#2a9d5c"') == 2  # of the claim, and in the legend


def test_a_table_has_cells_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "toy.json").write_text(json.dumps({"facts": {"faces": "Some faces."}, "runs": rows(a=[0.6, 0.6])}))
    page(replace(STUDY, beside=lambda arm: {"memory": f"{arm} GiB"}), tmp_path / "toy.json", tmp_path)
    text = (tmp_path / "toy.md").read_text()
    assert "| arm | seeds | rank-1 | memory |\n|---|---|---|---|\n| a | 2 | 60.0 ± 0.0 | a GiB |" in text


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Runs without a training: which arms and seeds ran."""
    found: list[tuple[str, int]] = []

    def row(study: Study, prepared: Prepared, arm: str, config: TrainConfig, folder: Path) -> dict[str, Any]:
        found.append((arm, config.seed))
        return {"figures": {"test rank-1": 0.5}, "seconds": 1.0, "machine": "CPU"}

    monkeypatch.setattr(module, "_row", row)
    return found


def of_data(study: Study, *names: str) -> Study:
    """The study on sets that each hold a file with their name."""

    def prepare(folder: Path, small: bool) -> Prepared:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "set").write_text(folder.name)
        return Prepared(folder, small_config().with_values({"data.path": str(folder / "set")}), {}, folder.name)

    return replace(study, data=dict.fromkeys(names, prepare))


def test_what_is_done_is_not_repeated(tmp_path: Path, calls: list[tuple[str, int]]) -> None:
    study = of_data(STUDY, "faces")
    results = tmp_path / "toy.json"
    assert run(study, tmp_path, results, small=False, minutes=0, only=["faces"]) == module.NOT_DONE
    assert run(study, tmp_path, results, small=False, minutes=1, only=["faces"]) == 0
    assert run(study, tmp_path, results, small=False, minutes=0, only=["faces"]) == 0
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    content = json.loads(results.read_text())
    assert (len(content["runs"]), content["facts"]) == (6, {"faces": "faces"})
    del calls[:]
    assert run(study, tmp_path, results, small=False, minutes=1, only=["faces"], arms=["b"], seeds=5) == 0
    assert calls == [("b", 3), ("b", 4)]


def test_results_of_another_setting_are_replaced_only_if_that_is_wanted(
    tmp_path: Path, calls: list[tuple[str, int]]
) -> None:
    study = of_data(replace(STUDY, seeds=1), "faces")
    changed = replace(study, arms={**study.arms, "b": Arm({"optimizer.lr": 0.5})})
    results = tmp_path / "toy.json"
    assert run(study, tmp_path, results, small=False, minutes=1, only=["faces"]) == 0
    del calls[:]
    with pytest.raises(InputError, match=r"1 run on another set or in another setting .faces, b, 0.: .* with --anew"):
        run(changed, tmp_path, results, small=False, minutes=1, only=["faces"])
    assert run(changed, tmp_path, results, small=False, minutes=1, only=["faces"], anew=True) == 0
    assert calls == [("b", 0)]
    assert [row["arm"] for row in json.loads(results.read_text())["runs"]] == ["a", "b"]


def test_a_setting_is_all_that_decides_a_result(tmp_path: Path) -> None:
    """Not where the files are, nor what is kept; but every byte of the set, and which labels are damaged."""

    def setting(place: str, set_: str = "set", overlay: str | None = None, **values: Any) -> str:
        folder = tmp_path / place
        folder.mkdir(exist_ok=True)
        (folder / "set").write_text(set_)
        (folder / "partialfc-classes.json").write_text(place)
        paths: dict[str, Any] = {"data.path": str(folder)}
        if overlay is not None:
            (tmp_path / "data.overlay").write_text(overlay)
            paths["data.overlay"] = str(tmp_path / "data.overlay")
        config = small_config().with_values(paths | {key.replace("__", "."): value for key, value in values.items()})
        return module._setting(config, Prepared(folder, config, {}, ""))

    first = setting("here")
    assert setting("there", output__keep=7) == first
    others = [setting("here", "another"), setting("here", overlay="flips"), setting("here", overlay="tails")]
    assert len({first, setting("here", seed=1), setting("here", head__sample_rate=0.125), *others}) == 6


def test_two_data_sets_run_beside_each_other(
    tmp_path: Path, calls: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that another process adds during a run stays."""
    results = tmp_path / "toy.json"
    study = of_data(STUDY, "faces", "others")
    row = module._row

    def and_another(study_: Study, prepared: Prepared, arm: str, *rest: Any) -> dict[str, Any]:
        if prepared.facts == "faces":
            assert run(study, tmp_path, results, small=True, minutes=1, only=["others"], arms=[arm]) == 0
        return row(study_, prepared, arm, *rest)

    monkeypatch.setattr(module, "_row", and_another)
    assert run(study, tmp_path, results, small=True, minutes=1, only=["faces"]) == 0
    content = json.loads(results.read_text())
    names = [(row["data"], row["arm"]) for row in content["runs"]]
    assert names == [("others", "a"), ("faces", "a"), ("others", "b"), ("faces", "b")]
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
