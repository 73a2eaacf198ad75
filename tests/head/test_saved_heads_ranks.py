"""Heads that three ranks saved: loaded, trained further and asked by one, two, three and four ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import saving_scenarios as scenarios
import torch
from distributed_workers import run_ranks
from reference import relative_error

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of all scenarios."""
    folder: Path = tmp_path_factory.mktemp("saved")
    run_ranks(4, scenarios.work, folder)
    scenarios.run(folder)
    return folder


def results(folder: Path, name: str, world_size: int) -> list[dict[str, Any]]:
    """What each rank found, in rank order."""
    return [torch.load(folder / f"{name}-{world_size}-{rank}.pt", weights_only=True) for rank in range(world_size)]


@pytest.mark.parametrize("kind", ["sgd", "lazy", "adamw"])
def test_a_run_goes_on_at_any_world_size(kind: str, folder: Path) -> None:
    head, optimizer = scenarios.make(kind)
    scenarios.train(head, optimizer, 0, scenarios.STEPS)
    optimizer.flush()
    saved = head.centers.detach().clone()
    scenarios.train(head, optimizer, scenarios.STEPS, scenarios.STEPS + 3)
    optimizer.flush()
    (alone,) = results(folder, "results", 1)
    for world_size in (1, 2, 3, 4):
        ranks = [rank[kind] for rank in results(folder, "results", world_size)]
        loaded = torch.cat([rank["loaded"] for rank in ranks])
        assert torch.equal(loaded, alone[kind]["loaded"])
        assert relative_error(loaded, saved) < 1e-12
        assert relative_error(torch.cat([rank["trained"] for rank in ranks]), head.centers.detach()) < 1e-12
        for rank in ranks:
            assert int(rank["step"]) == scenarios.STEPS + 3
            assert relative_error(rank["margin"], head.margin_state()["t"]) < 1e-12


def test_a_head_is_built_from_a_folder_at_any_world_size(folder: Path) -> None:
    whole, _ = scenarios.make("sgd")
    for world_size in (1, 2, 3, 4):
        ranks = results(folder, "results", world_size)
        assert torch.equal(torch.cat([rank["built"] for rank in ranks]), whole.centers)


@pytest.mark.parametrize("kind", ["sgd", "lazy"])
def test_predictions_of_any_world_size_are_those_of_one(kind: str, folder: Path) -> None:
    (alone,) = results(folder, "results", 1)
    for world_size in (2, 3, 4):
        ranks = [rank[kind] for rank in results(folder, "results", world_size)]
        assert len(ranks[-1]["logits"]) == 0
        for name in ("logits", "cosines"):
            assert relative_error(torch.cat([rank[name] for rank in ranks]), alone[kind][name]) < 1e-12
        assert torch.equal(torch.cat([rank["classes"] for rank in ranks]), alone[kind]["classes"])


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_state_dict_belongs_to_its_classes(world_size: int, folder: Path) -> None:
    for rank, found in enumerate(results(folder, "errors", world_size)):
        (warning,) = found["warnings"]
        assert "holds only classes" in warning
        assert "partialfc.save_head" in warning
        assert found["own"]
        assert "does not say which classes" in found["without classes"]
        for other in ("shard of another rank", "optimizer of another rank"):
            assert bool(rank) == ("save_head and load_head, which serve any number of ranks" in found[other])


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_what_is_wrong_on_one_rank_is_an_error_on_all(world_size: int, folder: Path) -> None:
    for found in results(folder, "errors", world_size):
        assert "not SGD: pass that one, or None" in found["optimizer"]
        assert found["saving"] == found["optimizer"]
        assert "does not hold the centers of this head" in found["head"]
        assert "holds optimizer RowwiseSGD, not RowwiseAdamW" in found["kind"]
        assert "holds margin CurricularFace(m=0.5, gradient='exact'), not ArcFace(m=0.5" in found["margin"]
        assert found["untouched"] == "True"
