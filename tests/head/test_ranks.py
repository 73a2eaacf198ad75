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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ranks of rank_scenarios left at all world sizes."""
    folder: Path = tmp_path_factory.mktemp("scenarios")
    rank_scenarios.run_scenarios(folder)
    run_ranks(4, rank_scenarios.work, folder)
    return folder


@pytest.fixture
def outside(folder: Path) -> Callable[..., str]:
    """What a process outside the group of a world size was told."""
    return lambda world_size, rank: torch.load(folder / f"outside-{world_size}-{rank}.pt", weights_only=True)


@pytest.fixture
def scenario(folder: Path) -> Scenario:
    """The results of each rank in a scenario of rank_scenarios at a world size, in rank order."""

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
            assert found["exchanged collectives"] == [7, 5, 1]
            assert found["known collectives"] == [5, 3, 1]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_heads_and_batches_that_differ_are_an_error_on_all_ranks(world_size: int, scenario: Scenario) -> None:
    ranks = scenario("disagreement", world_size)
    last = world_size - 1
    for rank, found in enumerate(ranks):
        for name in ("num_classes", "embedding_dim", "sample_rate", "seed", "dtype", "margin", "update", "scale"):
            assert f"disagree in {name}: " in found[name]
            assert f"on process {last}, but has to be the same on all" in found[name]
        for name in ("width", "embeddings int", "labels int32", "labels list", "labels short"):
            if rank == last:
                assert "the head expects" in found[name]
            else:
                assert found[name] == f"the head refuses the batch of process {last}, whose own error says why."
        for name in ("embeddings bfloat16", "embeddings float64"):
            assert "disagree in the dtype of embeddings: it is torch.float32 on process 0" in found[name]
        assert f"disagree in head.step: it is 0 on process 0 and 1 on process {last}" in found["step"]
        assert found["afterwards"] == ""


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_an_overflow_on_one_rank_skips_the_step_of_all(world_size: int, scenario: Scenario) -> None:
    for rank, found in enumerate(scenario("scaler", world_size)):
        for update in ("sparse", "deferred"):
            for case in ("one rank", "all"):
                assert found[f"{update}, {case}, 0"] == [0, True, True]
                step, untouched, finite = found[f"{update}, {case}, 1"]
                assert step == 1
                assert finite
                assert not untouched or rank  # other ranks may have no sampled row
            assert found[f"{update}, all, scale"] == 2.0**66


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_copies_and_places_of_a_head_in_a_group(world_size: int, scenario: Scenario) -> None:
    for found in scenario("copies", world_size):
        assert found["copied"]
        if world_size > 1:
            assert "build it after init_process_group" in found["other shard"]
        if world_size in (2, 3):
            assert "cannot be pickled: save its state_dict()" in found["pickled"]


@pytest.mark.parametrize(("world_size", "rank"), [(2, 2), (2, 3), (3, 3)])
def test_a_process_outside_the_group_is_refused(world_size: int, rank: int, outside: Callable[..., str]) -> None:
    assert "this process is no member of the head's group" in outside(world_size, rank)
