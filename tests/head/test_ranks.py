"""The head on several processes beside a DDP backbone: one process's gradients, and errors that all ranks raise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_scenarios
import torch
from distributed_workers import run_ranks
from reference import relative_error

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]
Scenario = Callable[[str, int], list[Any]]


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    """The results of each rank in a scenario of rank_scenarios at a world size, in rank order."""
    folder: Path = tmp_path_factory.mktemp("scenarios")
    rank_scenarios.run_scenarios(folder)
    run_ranks(4, rank_scenarios.work, folder)

    def results(name: str, world_size: int) -> list[Any]:
        paths = [folder / f"scenarios-{world_size}-{rank}.pt" for rank in range(world_size)]
        return [torch.load(path, weights_only=True)[name] for path in paths]

    return results


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ddp_backbone_gets_the_gradient_of_one_process(world_size: int, scenario: Scenario) -> None:
    (alone,) = scenario("training", 1)
    ranks = scenario("training", world_size)
    for rank in ranks:
        assert relative_error(rank["losses"], alone["losses"]) < 1e-12
        assert relative_error(rank["gradients"], alone["gradients"]) < 1e-10
        assert relative_error(rank["backbone"], alone["backbone"]) < 1e-12
        assert int(rank["step"]) == 6
    assert relative_error(torch.cat([rank["centers"] for rank in ranks]), alone["centers"]) < 1e-12
    assert torch.equal(torch.cat([rank["sampled"] for rank in ranks]), alone["sampled"])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_bad_input_of_one_rank_is_an_error_on_all(world_size: int, scenario: Scenario) -> None:
    for found in scenario("errors", world_size):
        assert "label 50 lies outside [0, 50)" in found["label too large"]
        assert "label -1 lies outside [0, 50)" in found["label negative"]
        assert "NaN or infinity" in found["nan"]
        assert "NaN or infinity" in found["infinite"]
        assert "global batch is empty" in found["empty"]
        assert found["untouched"] == "True"
        assert found["afterwards"] == ""


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_refuses_to_stand_inside_ddp(world_size: int, scenario: Scenario) -> None:
    for found in scenario("wrapped", world_size):
        assert "wrap the backbone alone" in found["head"]
        assert "wrap the backbone alone" in found["module"]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_what_is_known_of_all_ranks_saves_collectives_and_changes_nothing(world_size: int, scenario: Scenario) -> None:
    for found in scenario("global labels", world_size):
        for exchanged, known in zip(found["exchanged"], found["known"], strict=True):
            assert torch.equal(exchanged, known)
        if world_size > 1:
            assert found["exchanged collectives"] == [5, 1]
            assert found["known collectives"] == [3, 1]
